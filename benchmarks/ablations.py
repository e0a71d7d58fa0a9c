"""The ablations of He et al. 2017, made again: one command, three kinds of tables.

    python benchmarks/ablations.py [--shared ../shared] [--network resnet20] [--parts layer,residual,images]

layer: one layer narrowed alone to several widths, its reader fitted again, under greedy elimination, LASSO, Wanda, the
first k channels, those with the largest filters ("max response") and random ones, and the first two refined by swaps:
the error of the reader's output on images that nothing was fitted to, relative to its variance (the paper's figure 4).
residual: the whole network at one speed-up, with and without the shortcut's error in the target of a branch (section
3.3), and without the joint fits. images: the same against the number of calibration images, with and without
reconstruction. Writes benchmarks/ablations.md and .json; tables of other runs stay in them.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnxruntime as ort
from accuracy import Case, accuracy, cifar, digits, squeezenet

import onnxprune
from onnxprune.batches import LARGEST, Batches
from onnxprune.calibrate import Sweep
from onnxprune.collecting import collect
from onnxprune.data import Preprocessing
from onnxprune.prepare import prepare
from onnxprune.progress import Progress
from onnxprune.readers import Reader
from onnxprune.reconstruct import solve
from onnxprune.select import Problem, Ranking, greedy, lasso, ordered, swapped, wanda
from onnxprune.selection import filter_norms, problems_of
from onnxprune.settings import Settings
from onnxprune.surroundings import Behind

HERE = Path(__file__).parent
SHARES = (0.8, 0.6, 0.5, 0.4, 0.3, 0.2)  # of the channels, kept
RIDGE = 1e-4
Table = tuple[str, list[str], list[list[str]]]  # title, head, rows


def options_of(case: Case) -> dict[str, Any]:
    """A case's command line as arguments of `onnxprune.prune`."""
    words = [word for word in case.options if word != "--bgr"]
    given = dict(zip(words[::2], words[1::2], strict=True))
    found: dict[str, Any] = {
        k: tuple(map(float, given[f"--{k}"].split(","))) for k in ("mean", "std") if f"--{k}" in given
    }
    found |= {k: kind(given[f"--{k}"]) for k, kind in (("scale", float), ("crop", int)) if f"--{k}" in given}
    return {"data": given.get("--data"), "preprocessing": Preprocessing(bgr="--bgr" in case.options, **found)}


def layers(case: Case, threads: int) -> Iterator[Table]:
    """Relative errors of single layers."""
    prepared = prepare(case.model, Settings(**options_of(case), threads=threads, samplers=False), Progress())
    chooser, analysis = prepared.chooser, prepared.analysis
    alone = [g for g in analysis.groups if sum(g.group.index in r.columns for r in chooser.readers) == 1]
    chosen = [alone[len(alone) * k // 4] for k in (1, 2, 3)]
    readers = [next(r for r in chooser.readers if g.group.index in r.columns) for g in chosen]

    def summed(data: Any) -> list[Any]:
        return collect(analysis, readers, Batches(data, LARGEST, 0), prepared.runtime, Progress())

    fitted, judged = summed(chooser.first), summed(prepared.held_out)
    rng = np.random.default_rng(0)
    for k, (group, reader) in enumerate(zip(chosen, readers, strict=True)):
        problems = problems_of(group.group.index, readers, {reader.index: fitted[k]}, {})
        rankings = {
            "greedy": greedy(problems),
            "LASSO": lasso(problems),
            "Wanda": wanda(problems),
            "max response": ordered(np.argsort(-filter_norms(group, analysis), kind="stable")),
            "first k": ordered(np.arange(group.units)),
            "random": ordered(rng.permutation(group.units)),
        }
        ways: dict[str, Callable[[int], np.ndarray]] = {name: ranking.kept for name, ranking in rankings.items()}
        for name in ("greedy", "LASSO"):
            ways[f"{name}, then swaps"] = functools.partial(exchanged, problems, rankings[name])
        counts = [max(round(share * group.units), 1) for share in SHARES]
        rows = []
        for name, kept in ways.items():
            errors = [error(reader, group.group.index, fitted[k], judged[k], kept(c)) for c in counts]
            rows.append([name, *(f"{e:.4f}" for e in errors)])
        title = f"{case.name}, {group.name}: relative error of what {reader.layer.node.label} gives, by kept channels"
        yield title, ["selection", *(f"{c} of {group.units}" for c in counts)], rows


def exchanged(problems: list[Problem], ranking: Ranking, count: int) -> np.ndarray:
    """So many units of a ranking, of which some are exchanged for better ones."""
    return swapped(problems, ranking.kept(count))


def error(reader: Reader, group: int, fitted: list[Any], judged: list[Any], kept: np.ndarray) -> float:
    """Squared error of a fitted reader on other images, relative to the variance of the target."""
    left = np.setdiff1d(np.arange(reader.width), np.delete(reader.columns[group], kept, axis=0).ravel())
    missed = energy = 0.0
    for s, other, weights in zip(fitted, judged, reader.weights, strict=True):
        missed += other.error(solve(s, left, weights, RIDGE))
        energy += float((other.energy - other.cross[-1] ** 2 / other.rows).sum())
    return missed / energy


class WithoutResidual(Sweep):
    """A sweep whose targets leave the shortcut's error where it is."""

    def _behind(self, reader: Reader, here: Any) -> Behind:
        found = super()._behind(reader, here)
        return replace(found, residual="", limits=None) if found.residual else found


def measured(case: Case, speedup: float, threads: int, **options: Any) -> tuple[float, float]:
    """Accuracy in per cent, and mean divergence of the answers from the original's, on the test images."""
    made = onnxprune.prune(case.model, speedup=speedup, threads=threads, **options_of(case), **options)
    data = case.test()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made.onnx"
        onnx.save(made.model, path)
        share, _ = accuracy(path, data)
        answers = [_log_shares(p, data[0][:2000]) for p in (case.model, path)]
    kl = (np.exp(answers[0]) * (answers[0] - answers[1])).sum(axis=1).mean()
    return 100 * share, float(kl)


def _log_shares(path: Path, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    scores = session.run(None, {session.get_inputs()[0].name: x})[0].astype(np.float64)
    scores = scores.reshape(len(scores), -1) - scores.max(axis=1, keepdims=True)
    found: np.ndarray = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    return found


def residual(case: Case, speedup: float, threads: int) -> Iterator[Table]:
    """What the residual target and the joint fits are worth."""
    rows = []
    for name, patches in {
        "all": {},
        "without the residual target": {"Sweep": WithoutResidual},
        "without joint fits": {"find_blocks": lambda *_: ()},
        "with neither": {"Sweep": WithoutResidual, "find_blocks": lambda *_: ()},
    }.items():
        with mock.patch.multiple("onnxprune.pipeline", **patches) if patches else mock.MagicMock():
            share, kl = measured(case, speedup, threads)
        rows.append([name, f"{share:.2f} %", f"{kl:.4f}"])
    yield f"{case.name} at {speedup:g}x", ["fits", "accuracy", "divergence"], rows


def images(case: Case, speedup: float, threads: int, counts: list[int]) -> Iterator[Table]:
    """Accuracy against the number of images."""
    rows = []
    for count in counts:
        fitted = measured(case, speedup, threads, samples=count)
        plain = measured(case, speedup, threads, samples=count, reconstruct=False)
        rows.append([str(count), f"{fitted[0]:.2f} %", f"{fitted[1]:.4f}", f"{plain[0]:.2f} %", f"{plain[1]:.4f}"])
    head = ["images", "accuracy", "divergence", "not reconstructed", "divergence"]
    yield f"{case.name} at {speedup:g}x, by calibration images", head, rows


def page(tables: Mapping[str, Any]) -> str:
    """All tables, also those of other runs."""
    lines = [
        "# Ablations",
        "",
        "No labels; divergence is the mean Kullback-Leibler divergence of the answers from the original's.",
    ]
    for title, table in tables.items():
        lines += ["", f"## {title}", "", table["when"], ""]
        lines += [f"| {' | '.join(table['head'])} |", "|---" * len(table["head"]) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in table["rows"]]
    return "\n".join(lines) + "\n"


def case_of(network: str, shared: Path, folder: Path) -> Case:
    """The network with its data."""
    if network.startswith("squeezenet"):
        return squeezenet(shared, folder)
    return digits(network) if network.startswith("digits") else cifar(network, shared)


def run(args: argparse.Namespace, case: Case) -> None:
    """Make the tables and write them."""
    parts = {
        "layer": lambda: layers(case, args.threads),
        "residual": lambda: residual(case, args.speedup, args.threads),
        "images": lambda: images(case, args.speedup, args.threads, [int(n) for n in args.images.split(",")]),
    }
    file = args.output.with_suffix(".json")
    tables: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for part in args.parts.split(","):
        for title, head, rows in parts[part]():
            when = f"{datetime.date.today()}, {platform.machine()}, onnxruntime {ort.__version__}"
            tables[title] = {"when": when, "head": head, "rows": rows}
            file.write_text(json.dumps(tables, indent=1))
            args.output.with_suffix(".md").write_text(page(tables))
            print(title, *rows, sep="\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="resnet20", help="resnet20, resnet56, squeezenet1.0 or digits_cnn, say")
    parser.add_argument("--parts", default="layer,residual,images")
    parser.add_argument("--speedup", type=float, default=2.0)
    parser.add_argument("--images", default="20,50,100,200,500,1000,2000,5000")
    parser.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=HERE / "ablations")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(args, case_of(args.network, args.shared, Path(folder)))


if __name__ == "__main__":
    main()
