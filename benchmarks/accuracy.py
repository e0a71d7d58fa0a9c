"""Accuracy after pruning, without training and without labels: one command, one table.

    python benchmarks/accuracy.py [--only digits] [--speedups 2,4] [--select greedy,lasso,l1] [--shared ../shared]

The digits networks of `models/` are always there; the CIFAR-10 and ImageNet networks are used where the folder given
by --shared has them. Calibration and test samples are disjoint. Every run is a process of its own, so that its time and
its peak memory are those of the command line. Writes benchmarks/accuracy.md and benchmarks/accuracy.json; rows of other
runs stay in them, each with its date.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import onnxruntime as ort

HERE = Path(__file__).parent
MODELS = HERE.parent / "models"
Data = tuple[np.ndarray, np.ndarray]  # model inputs, labels


@dataclass(frozen=True)
class Case:
    """A network with its calibration options and its test data."""

    name: str
    model: Path
    options: tuple[str, ...]
    test: Callable[[], Data]


@dataclass(frozen=True)
class Row:
    """One line of the table; accuracies in per cent, the interval is Wilson's at 95 %."""

    network: str
    speedup: float
    select: str
    reconstruct: bool
    counted: float
    before: float
    after: float
    low: float
    high: float
    seconds: float
    peak_mib: float
    date: str

    @property
    def key(self) -> tuple[str, str, bool, float]:
        """What a row is about."""
        return self.network, self.select, self.reconstruct, self.speedup


def digits(name: str) -> Case:
    def test() -> Data:
        with np.load(MODELS / f"{name}.test.npz") as file:
            return file["images"][:, None].astype(np.float32) / 255, file["labels"]

    return Case(name, MODELS / f"{name}.onnx", (), test)


def cifar(name: str, shared: Path) -> Case:
    """The JPEG copy of the training images calibrates, that of the test images tests."""
    data = shared / "data"
    with np.load(data / "cifar10_test.npz") as file:
        return _cifar(name, shared, data / "cifar10_calibration.npz", file["images"], file["labels"])


def lossless(name: str, shared: Path, folder: Path) -> Case:
    """Of some training images as they were, every other one calibrates; the rest tests."""
    with np.load(shared / "data/cifar10_lossless_train4000.npz") as file:
        images, labels = file["images"], file["labels"]
    np.savez(folder / "lossless.npz", images=images[::2])
    return replace(_cifar(name, shared, folder / "lossless.npz", images[1::2], labels[1::2]), name=f"{name} lossless")


def _cifar(name: str, shared: Path, data: Path, images: np.ndarray, labels: np.ndarray) -> Case:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def test() -> Data:
        x = (images.astype(np.float32) / 255 - np.float32(mean)) / np.float32(std)
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2)), labels

    options = ("--data", str(data), "--mean", ",".join(map(str, mean)), "--std", ",".join(map(str, std)))
    return Case(name, shared / f"models/{name}.onnx", options, test)


def squeezenet(shared: Path, folder: Path) -> Case:
    """Every other image, in the order of the classes, calibrates; the rest tests."""
    images = sorted((shared / "data/imagenet_sample").glob("*.jpg"))
    for path in images[::2]:
        (folder / path.name).symlink_to(path.resolve())

    def test() -> Data:
        from PIL import Image

        crops = [np.asarray(Image.open(p).convert("RGB"), np.float32)[14:241, 14:241, ::-1] for p in images[1::2]]
        x = (np.stack(crops) - np.float32((104, 117, 123))).transpose(0, 3, 1, 2)
        return np.ascontiguousarray(x), np.arange(1, len(images), 2)

    options = ("--data", str(folder), "--bgr", "--scale", "1", "--mean", "104,117,123", "--crop", "227")
    return Case("squeezenet1.0", shared / "models/squeezenet1.0_imagenet.onnx", options, test)


def accuracy(model: Path, data: Data) -> tuple[float, int]:
    """Share of right answers, and of how many."""
    x, labels = data
    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    right = 0
    for start in range(0, len(x), 100):
        scores = session.run(None, {name: x[start : start + 100]})[0]
        right += int((scores.reshape(len(scores), -1).argmax(axis=1) == labels[start : start + 100]).sum())
    return right / len(x), len(x)


def wilson(share: float, count: int) -> tuple[float, float]:
    z = 1.959963984540054
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    reach = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return middle - reach, middle + reach


def measure(case: Case, data: Data, before: float, speedup: float, select: str, reconstruct: bool, threads: int) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        output, report = Path(folder) / "pruned.onnx", Path(folder) / "report.json"
        command = [sys.executable, "-c", _RUN, str(case.model), "--speedup", str(speedup), "--select", select]
        command += [*case.options, "--threads", str(threads), "-o", str(output), "--report", str(report), "--quiet"]
        start = time.perf_counter()
        peak = subprocess.run(
            command + ([] if reconstruct else ["--no-reconstruct"]), check=True, capture_output=True, text=True
        ).stdout.splitlines()[-1]
        seconds = time.perf_counter() - start
        after, count = accuracy(output, data)
        counted = json.loads(report.read_text())["achieved"]["macs"]
    low, high = wilson(after, count)
    shares = [round(100 * v, 2) for v in (before, after, low, high)]
    today = str(datetime.date.today())
    return Row(
        case.name, speedup, select, reconstruct, round(counted, 3), *shares, round(seconds, 1), float(peak), today
    )


_RUN = (
    f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from peak import peak_mib; "
    "from onnxprune.cli import main; status = main(sys.argv[1:]); print(peak_mib()); sys.exit(status)"
)


_NOTE = """Seconds are those of busy machines. Rows called lossless are of images that the networks were trained on and
know almost by heart, every other one of which calibrates; all others are of images that they have not seen."""


def table(rows: list[Row]) -> str:
    lines = [
        "# Accuracy without training",
        "",
        f"{platform.machine()}, onnxruntime {ort.__version__}, Python"
        f" {platform.python_version()}. Default number of samples; no labels, no gradients; MACs counted on the"
        " written file; 95 % intervals.",
        "",
        _NOTE,
        "",
        "| network | select | fitted | asked | counted | before | after | interval | seconds | peak MiB | date |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.network} | {r.select} | {'yes' if r.reconstruct else 'no'} | {r.speedup:g}x | {r.counted:.2f}x "
        f"| {r.before:.2f} % | **{r.after:.2f} %** | {r.low:.1f} to {r.high:.1f} | {r.seconds:.0f} | {r.peak_mib:.0f} "
        f"| {r.date} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="networks whose name contains this regular expression")
    parser.add_argument("--speedups", default="1.5,2,3,4")
    parser.add_argument("--select", default="greedy,lasso,l1")
    parser.add_argument("--fitted", default="yes", help="'yes', 'no' (without reconstruction) or 'yes,no'")
    parser.add_argument("--effort", choices=("quick", "thorough"), help="what --quick or --thorough gives")
    parser.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=HERE / "accuracy")
    args = parser.parse_args()
    file = args.output.with_suffix(".json")
    rows = {row.key: row for row in (Row(**entry) for entry in json.loads(file.read_text()))} if file.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        cases = [digits("digits_cnn"), digits("digits_resnet")]
        if (args.shared / "data").is_dir():
            cases += [cifar(n, args.shared) for n in ("resnet20", "resnet56", "resnet56_bn")]
            cases += [lossless(n, args.shared, Path(folder)) for n in ("resnet20", "resnet56")]
            cases.append(squeezenet(args.shared, Path(folder)))
        for case in (c for c in cases if re.search(args.only, c.name)):
            if args.effort:
                option = f"--{args.effort}"
                case = replace(case, name=f"{case.name} {option}", options=(*case.options, option))
            data = case.test()
            before, _ = accuracy(case.model, data)
            for select in args.select.split(","):
                for speedup in map(float, args.speedups.split(",")):
                    for fitted in args.fitted.split(","):
                        row = measure(case, data, before, speedup, select, fitted == "yes", args.threads)
                        print(row, file=sys.stderr)
                        rows[row.key] = row
                        found = sorted(rows.values(), key=lambda r: r.key)
                        args.output.with_suffix(".md").write_text(table(found))
                        file.write_text(json.dumps([asdict(r) for r in found], indent=1))


if __name__ == "__main__":
    main()
