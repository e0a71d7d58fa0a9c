"""Export architectures with random weights through PyTorch's two exporters, for `coverage.py`.

    python benchmarks/coverage_export.py FOLDER [--only REGEX] [--all] [--opset N]

Needs torch, torchvision, timm, transformers and onnxscript; nothing else of the project does. Two files per
architecture (`--all`: four; `--opset`: one, by the older exporter); a file that exists is kept. What an exporter
refuses leaves a `.failed` file with its words.
"""

from __future__ import annotations

import argparse
import functools
import re
import warnings
from pathlib import Path

import torch
from coverage_models import MODELS, Detections, Logits
from coverage_writing import is_done, write

warnings.filterwarnings("ignore")

# exporter, batch: BatchNormalization is folded into convolutions, or, by the "kept" ones, left in the file
VARIANTS = (
    ("torchscript", "fixed"),
    ("torchscript-kept", "dynamic"),
    ("dynamo", "dynamic"),
    ("dynamo-kept", "fixed"),
)


def randomise(model: torch.nn.Module) -> None:
    """Give statistics, and parameters that are all alike, values of their own.

    A fresh network has many vectors of ones and zeros, which exporters merge, although no trained network has them.
    """
    for module in model.modules():
        if getattr(module, "running_var", None) is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    for parameter in model.parameters():
        if parameter.numel() > 1 and parameter.is_floating_point() and bool((parameter == parameter.view(-1)[0]).all()):
            parameter.add_(torch.randn_like(parameter) * 0.1)


def export(name: str, exporter: str, dynamic: bool, path: Path) -> None:
    """Write one model."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model.eval()
    randomise(model)
    names = [f"input{k}" for k in range(len(inputs))]
    options: dict[str, object] = {"input_names": names}
    if isinstance(model, Detections):  # one image, of a size that may vary
        inputs, axes, low, high = inputs[:1], {2: "height", 3: "width"}, 32, 2048
    else:
        axes, low, high = {0: "batch"}, 1, 64
        options["output_names"] = ["output"]
    if exporter.startswith("torchscript"):
        if dynamic:
            options["dynamic_axes"] = dict.fromkeys(names, axes)
            if not isinstance(model, Detections):
                options["dynamic_axes"]["output"] = axes
        if exporter.endswith("kept"):
            options["training"] = torch.onnx.TrainingMode.PRESERVE
        opset = int(exporter.rpartition("-")[2]) if exporter[-1].isdigit() else 17
        torch.onnx.export(model, inputs, str(path), dynamo=False, opset_version=opset, **options)
        return
    if dynamic:
        dims = {axis: torch.export.Dim(n, min=low, max=high) for axis, n in axes.items()}
        each = tuple(dims for _ in inputs)
        options["dynamic_shapes"] = (each,) if isinstance(model, Logits) else each
    if exporter.endswith("kept"):
        options["optimize"] = False
    torch.onnx.export(model, inputs, str(path), dynamo=True, external_data=False, verbose=False, **options)


def export_small(largest: float, name: str, exporter: str, dynamic: bool, path: Path) -> None:
    """The same, but for files of more megabytes."""
    with torch.no_grad():
        export(name, exporter, dynamic, path)
    if path.stat().st_size > largest * 1e6:
        raise ValueError(f"{path.stat().st_size / 1e6:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--all", action="store_true", help="every variant of every architecture, not two of each")
    parser.add_argument("--opset", type=int)
    parser.add_argument("--largest", type=float, default=240.0, help="MB; larger files are not kept")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    variants = ((f"torchscript-{options.opset}", "dynamic"),) if options.opset else VARIANTS
    for which, (exporter, batch) in enumerate(variants):
        for turn, name in enumerate(MODELS):
            # the first variant, and one of the others in turn
            if not re.search(options.only, name) or not (
                options.all or which in (0, 1 + turn % max(len(variants) - 1, 1))
            ):
                continue
            path = options.folder / f"{name.replace('/', '__')}__{exporter}__{batch}.onnx"
            if not is_done(path):
                write(path, functools.partial(export_small, options.largest, name, exporter, batch == "dynamic"))


if __name__ == "__main__":
    main()
