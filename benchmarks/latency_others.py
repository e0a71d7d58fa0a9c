"""Torch-Pruning at the measured time of `--by latency`: rows for the curves of `latency.py`.

    python benchmarks/latency_others.py --shared ../shared [--nets resnet56] [--multiples 16,1]

For every row of onnxprune that latency.json holds for a CIFAR ResNet: the same weights and images in the hands of
Torch-Pruning, with `round_to` as given, at the least sparsity whose exported model, measured against the original in
turns on one thread, takes no longer. Needs what accuracy_others.py needs.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import onnx
from accuracy import Case, cifar
from accuracy_others import CIFAR, by_torch_pruning
from latency import HERE, Tables, measured, seen

_SLACK = 0.98  # of the ratio that is enough: what two measurements of one model differ by


def rows_of(case: Case, asked: float, ratio: float, multiple: int, methods: list[str]) -> list[dict[str, Any]]:
    """One row for every method and variant."""
    rows = []

    def ratio_of(model: onnx.ModelProto) -> float:
        return measured(case, model, 1, 1.0).ratio / _SLACK

    for method, make in by_torch_pruning(case, ratio, multiple, ratio_of):
        if not any(name in method for name in methods):
            continue
        row = {"network": case.name, "by": f"{method}, round_to={multiple}", "asked": asked, "threads": 1}
        found = make()
        if not found:
            rows.append(row | {"ratio": "does not get there"})
        for variant, model in found:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "made.onnx"
                onnx.save(model, path)
                rows.append(row | {"by": row["by"] + variant} | seen(case, path, 1))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared")
    parser.add_argument("--nets", default=",".join(CIFAR))
    parser.add_argument("--multiples", default="16,1")
    parser.add_argument("--methods", default="magnitude L2,Taylor", help="parts of their names")
    options = parser.parse_args()
    tables = Tables()
    for net in options.nets.split(","):
        case = cifar(net, options.shared)
        ours = [r for r in tables.found["curves"].values() if r["network"] == net and r["by"] == "latency"]
        for row in ours:
            for multiple in map(int, options.multiples.split(",")):
                if isinstance(row["ratio"], float):
                    found = rows_of(case, row["asked"], row["ratio"], multiple, options.methods.split(","))
                    for other in found:
                        tables.note("curves", f"{net} {other['by']} for {row['asked']:g}x", other)


if __name__ == "__main__":
    main()
