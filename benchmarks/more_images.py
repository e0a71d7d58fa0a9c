"""Never worse with more samples, never worse than the same selection without fits: every model at hand, one table.

    python benchmarks/more_images.py [--shared ../shared] [--only REGEX] [--counts 10,30,100,300] [--draws 1]

Every model of `models/` and of the folder given by --shared is pruned to half its MACs (or as far as it goes) with the
defaults on so many samples. The error of its outputs on other samples, squared and relative to their variance (the mean
over floating-point outputs), stands beside that of the original in which the same channels are silenced and nothing is
fitted. The detectors see photographs, the audio networks tones that start, die away and lie over one another in noise.
With several draws (other samples to fit to and to judge by) the means stand there, and how sure it is that an error
grows where there are more samples. Writes benchmarks/more_images.md and .json; rows of other runs stay in them.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper
from scipy import stats

import onnxprune

HERE = Path(__file__).parent
JUDGED = 64  # samples that nothing is fitted to
FRAMES = 512  # of sound, of which some are drawn: the same ones and more of them, the more are asked for
SPEEDUP = 2.0
Feeds = dict[str, np.ndarray]
MEAN, STD = np.float32((0.485, 0.456, 0.406)), np.float32((0.229, 0.224, 0.225))


def drawn(draw: int, judged: np.ndarray, given: np.ndarray, count: int) -> np.ndarray:
    """Images to judge by, and so many to fit to behind them: the first ones, or some that another draw picks."""
    if draw:
        rng = np.random.default_rng(draw)
        judged, given = (images[rng.permutation(len(images))] for images in (judged, given))
    return np.concatenate([judged[:JUDGED], given[:count]])


def digits(path: Path, count: int, draw: int) -> list[Feeds]:
    with np.load(path.with_suffix(".calib.npz")) as calibration, np.load(path.with_suffix(".test.npz")) as test:
        images = drawn(draw, test["images"], calibration["images"], count)
    return [{"input": image[None, None].astype(np.float32) / 255} for image in images]


def cifar(path: Path, count: int, draw: int) -> list[Feeds]:
    data = path.parent.parent / "data"
    with np.load(data / "cifar10_calibration.npz") as calibration, np.load(data / "cifar10_test.npz") as test:
        images = drawn(draw, test["images"], calibration["images"], count)
    x = (images.astype(np.float32) / 255 - MEAN) / STD
    return [{"input": np.ascontiguousarray(image.transpose(2, 0, 1)[None])} for image in x]


def photographs(
    name: str, size: tuple[int, int], bgr: bool, mean: float | np.ndarray, scale: float
) -> Callable[[Path, int, int], list[Feeds]]:
    """A photograph per sample, as large as asked for (width, height)."""

    def load(path: Path, count: int, draw: int) -> list[Feeds]:
        from PIL import Image

        folder = next(p for p in path.parents if (p / "data").is_dir()) / "data/imagenet_sample"
        chosen = np.random.default_rng(draw).permutation(sorted(folder.glob("*.jpg")))[: JUDGED + count]
        found = []
        for file in chosen:
            x = np.asarray(Image.open(file).convert("RGB").resize(size), np.float32)
            x = ((x[:, :, ::-1] if bgr else x) - mean) * np.float32(scale)
            found.append({name: np.ascontiguousarray(x.transpose(2, 0, 1)[None], np.float32)})
        return found

    return load


def mnist(path: Path, count: int, draw: int) -> list[Feeds]:
    data = next(p for p in path.parents if (p / "data").is_dir()) / "data"
    with np.load(data / "mnist_train.npz") as calibration, np.load(data / "mnist_test.npz") as test:
        images = drawn(draw, test["images"], calibration["images"], count)
    return [{"Input3": image[None, None].astype(np.float32)} for image in images]


def tones(rng: np.random.Generator, length: int) -> np.ndarray:
    """Some tones with overtones, at 16 to 22 kHz, in noise."""
    time = np.arange(length, dtype=np.float32)
    sound = 10.0 ** rng.uniform(-4, -1) * rng.standard_normal(length)
    for _ in range(int(rng.integers(1, 6))):
        start, pitch = rng.uniform(0, length), rng.uniform(0.005, 0.15)
        shape = (time >= start) * np.exp(-np.maximum(time - start, 0) / rng.uniform(500, 20_000))
        sound += sum(rng.uniform(0, 0.2) / k * np.sin(pitch * k * time) * shape for k in (1, 2, 3))
    return sound.astype(np.float32)


def notes(path: Path, count: int, draw: int) -> list[Feeds]:
    rng = np.random.default_rng(draw)
    name = "serving_default_input_2:0"
    return [{name: tones(rng, 43_844).reshape(1, -1, 1)} for _ in range(JUDGED + count)]


def frames(path: Path, count: int, draw: int) -> list[Feeds]:
    """Windows of sound, each with the state that the ones before it leave."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    voices = path.stem.startswith("silero")
    rng, found = np.random.default_rng(draw), []
    while len(found) < max(FRAMES, JUDGED + count):
        sound = tones(rng, 8 * 576)
        state = np.zeros((2, 1, 128) if voices else (1, 2, 128, 2), np.float32)
        for part in sound.reshape(8, 576):
            feeds = {"input": part[None], "state": state, "sr": np.array(16_000)}
            if not voices:
                feeds = {"input_4": part[None, None, :512], "input_5": state}
            found.append(feeds)
            state = session.run(None, feeds)[1]
    order = rng.permutation(len(found))[: JUDGED + count]
    return [found[k] for k in order]


LOADERS: Mapping[str, Callable[[Path, int, int], list[Feeds]]] = {
    "digits_": digits,
    "resnet": cifar,
    "squeezenet": photographs("data", (227, 227), True, np.float32((104, 117, 123)), 1.0),
    "ultraface": photographs("input", (320, 240), False, 127.0, 1 / 128),
    "fastestdet": photographs("input.1", (352, 352), True, 0.0, 1 / 255),
    "yunet": photographs("input", (320, 320), True, 0.0, 1.0),
    "mnist": mnist,
    "basic_pitch": notes,
    "dtln": frames,
    "silero": frames,
}


def outputs(model: onnx.ModelProto, samples: list[Feeds]) -> list[np.ndarray]:
    """Every output that holds floats, of all samples."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = [session.run(None, feeds) for feeds in samples]
    stacked = [np.stack(each) for each in zip(*found, strict=True)]
    return [each.astype(np.float64) for each in stacked if each.dtype.kind == "f"]


def error(wanted: list[np.ndarray], found: list[np.ndarray]) -> float:
    """Squared, relative to the variance over the samples; the mean over the outputs that vary."""
    each = []
    for a, b in zip(wanted, found, strict=True):
        spread = float(np.square(a - a.mean(axis=0)).sum())
        if spread > 0.0:
            each.append(float(np.square(a - b).sum()) / spread)
    return float(np.mean(each))


def silenced(model: onnx.ModelProto, removed: Mapping[str, Mapping[int, tuple[int, ...]]]) -> onnx.ModelProto:
    """The model with zeros where channels went: the same selection, nothing fitted."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    stored = {t.name: t for t in made.graph.initializer}
    stored |= {n.output[0]: a.t for n in made.graph.node if n.op_type == "Constant" for a in n.attribute}
    for node in [n for n in made.graph.node if n.op_type == "Identity" and n.input[0] in stored]:
        copy = made.graph.initializer.add()  # exporters store what several nodes share once
        copy.CopyFrom(stored[node.input[0]])
        copy.name = node.output[0]
        stored[copy.name] = copy
        made.graph.node.remove(node)
    for name, axes in removed.items():
        array = numpy_helper.to_array(stored[name]).copy()
        for axis, gone in axes.items():
            array[(slice(None),) * axis + (list(gone),)] = 0.0
        stored[name].CopyFrom(numpy_helper.from_array(array, name))
    return made


@dataclass(frozen=True)
class Cell:
    """A model with so many samples: the errors of every draw."""

    samples: int
    counted: float
    fitted: list[float]
    silenced: list[float]


def measured(path: Path, count: int, draws: int, threads: int) -> Cell:
    """One cell of the table."""
    load = next(loader for start, loader in LOADERS.items() if path.stem.startswith(start))
    model = onnx.load(path)
    counted, fitted, unfitted, given = [], [], [], 0
    for draw in range(draws):
        samples = load(path, count, draw)
        judged, given = samples[:JUDGED], len(samples) - JUDGED
        done = onnxprune.prune(path, speedup=SPEEDUP, data=samples[JUDGED:], best_effort=True, threads=threads)
        wanted = outputs(model, judged)
        counted.append(done.report.achieved.macs)
        fitted.append(error(wanted, outputs(done.model, judged)))
        unfitted.append(error(wanted, outputs(silenced(model, done.report.removed), judged)))
    return Cell(given, round(max(counted), 2), fitted, unfitted)


def table(rows: Mapping[str, list[Cell]]) -> str:
    counts = sorted({cell.samples for cells in rows.values() for cell in cells})
    cells = {name: {cell.samples: cell for cell in each} for name, each in rows.items()}
    pairs = [pair for each in rows.values() for c in each for pair in zip(c.fitted, c.silenced, strict=True)]
    worse = sum(not fitted <= silenced for fitted, silenced in pairs)  # what is no number among them
    lines = [
        "# With more samples, and beside the same selection without fits",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, onnxruntime {ort.__version__}, {datetime.date.today()}. Half"
        " the MACs, or as far as the model goes; squared error of the outputs on"
        f" {JUDGED} other samples, relative to their variance; in brackets that of the original in which the same"
        f" channels are silenced; of several draws, the means. Of {len(pairs)} networks {worse} are worse than that.",
        "",
        f"| model | counted | draws | {' | '.join(f'{c} samples' for c in counts)} |",
        "|---" * (3 + len(counts)) + "|",
    ]
    for name, each in sorted(cells.items()):
        texts = [f"{np.mean(c.fitted):.4g} ({np.mean(c.silenced):.3g})" if (c := each.get(n)) else "" for n in counts]
        draws = max(len(c.fitted) for c in each.values())
        lines.append(f"| {name} | {max(c.counted for c in each.values()):.2f}x | {draws} | {' | '.join(texts)} |")
    lines += ["", "## Where the mean error grows with the samples", ""]
    grown = []
    for name, each in sorted(cells.items()):
        for few, more in itertools.pairwise(sorted(each)):
            change = np.subtract(each[more].fitted, each[few].fitted) / np.mean(each[few].fitted)
            if change.mean() > 0.0:
                grown.append(f"| {name} | {few} to {more} | {change.mean():.1%} | {interval(change)} |")
    if grown:
        lines += ["The interval of 95 % is that of the mean over the draws (Student's t of the differences).", ""]
        lines += ["| model | samples | grows by | interval |", "|---|---|---|---|", *grown]
    else:
        lines.append("Nowhere.")
    return "\n".join(lines) + "\n"


def interval(change: np.ndarray) -> str:
    """In which the mean lies, of 95 of 100 such sets of draws."""
    if len(change) < 2:
        return ""
    half = stats.t.ppf(0.975, len(change) - 1) * stats.sem(change)
    return f"{change.mean() - half:+.1%} to {change.mean() + half:+.1%}"


def models(shared: Path) -> Iterator[Path]:
    yield from sorted((HERE.parent / "models").glob("*.onnx"))
    yield from sorted((shared / "models").rglob("*.onnx"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="models whose name contains this regular expression")
    parser.add_argument("--counts", default="10,30,100,300")
    parser.add_argument("--draws", type=int, default=1, help="of the samples")
    parser.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=HERE / "more_images")
    args = parser.parse_args()
    file = args.output.with_suffix(".json")
    known = json.loads(file.read_text()) if file.exists() else {}
    rows = {name: [Cell(**cell) for cell in cells] for name, cells in known.items()}
    for path in models(args.shared):
        if not re.search(args.only, path.stem):
            continue
        try:
            cells = [measured(path, int(count), args.draws, args.threads) for count in args.counts.split(",")]
        except onnxprune.UnreachableTarget as reason:  # not one channel can go
            print(f"{path.stem}: {reason}", file=sys.stderr)
            continue
        print(path.stem, cells, file=sys.stderr, flush=True)
        rows[path.stem] = cells
        file.write_text(json.dumps({name: [asdict(c) for c in each] for name, each in rows.items()}, indent=1))
        args.output.with_suffix(".md").write_text(table(rows))


if __name__ == "__main__":
    main()
