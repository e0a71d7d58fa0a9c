"""What two other pruners make of the models of `coverage.py`: onnxsim of a file, Torch-Pruning of its architecture.

    python benchmarks/coverage_others.py FILE [FILE ...]

One line of JSON per file. onnxsim's `apply_structured_pruning` is called on the file as it is and after `simplify`; the
result has to load, to run, and to equal the original in which the removed channels are silenced: what was removed is
read off the weights. Torch-Pruning's documented call is made on the module that was exported; the result has to run
with fewer parameters and the outputs' shapes. Needs onnxsim, torch, torch-pruning and what `coverage_export` needs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper

RATIO = 0.25  # of the channels
TOLERANCE = 1e-4  # of the largest value of an output
TINY = 1e-2


def _words(error: Exception) -> str:
    return f"failed: {(str(error).splitlines() or [type(error).__name__])[0][:120]}"


def _arrays(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    found = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                found[node.output[0]] = numpy_helper.to_array(attribute.t)
    return found


def _removed(before: np.ndarray, after: np.ndarray, axis: int) -> np.ndarray:
    """Indices of an axis that are gone: slices keep their order, and random weights tell which is which.

    Raises:
        ValueError: the slices of one are not among those of the other.
    """
    kept, at = [], 0
    for k in range(after.shape[axis]):
        wanted = np.take(after, k, axis).ravel()
        while at < before.shape[axis] and not np.isin(wanted, np.take(before, at, axis)).all():
            at += 1
        if at == before.shape[axis]:
            raise ValueError("the weights that are left are not slices of the original's")
        kept.append(at)
        at += 1
    return np.setdiff1d(np.arange(before.shape[axis]), kept)


def _silenced(model: onnx.ModelProto, made: onnx.ModelProto) -> onnx.ModelProto:
    """The original with zeros where the weights of layers lost slices."""
    layers = ("Conv", "ConvTranspose", "Gemm", "MatMul")
    weights = {name for node in model.graph.node if node.op_type in layers for name in node.input[:2]}
    after, silent = _arrays(made), onnx.ModelProto()
    silent.CopyFrom(model)
    for tensor in silent.graph.initializer:
        new = after.get(tensor.name)
        old = numpy_helper.to_array(tensor)
        if tensor.name not in weights or new is None or new.shape == old.shape:
            continue
        array = old.copy()
        for axis in range(old.ndim):
            if old.shape[axis] != new.shape[axis]:
                array[(slice(None),) * axis + (_removed(old, new, axis),)] = 0
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return silent


def _run(model: onnx.ModelProto) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    feeds = {}
    for value in session.get_inputs():
        sizes = {"batch": 3, "height": 128, "width": 128}
        shape = [d if isinstance(d, int) else sizes.get(d, 3) for d in value.shape]
        random = rng.standard_normal(shape).astype(np.float32)
        feeds[value.name] = random if "float" in value.type else np.ones(shape, np.int64)
    return session.run(None, feeds)


def _alike(a: np.ndarray, b: np.ndarray) -> bool:
    if a.shape != b.shape:
        return False
    if a.dtype.kind != "f":
        return bool(np.array_equal(a, b))
    return bool(np.abs(a - b).max(initial=0) <= TOLERANCE * max(np.abs(a).max(initial=0), TINY))


def by_onnxsim(path: Path, simplify: bool) -> str:
    """pruned, approximate, unchanged, or failed and why."""
    import onnxsim

    try:
        model = onnx.load(path)
        if simplify:
            model = onnxsim.simplify(model)[0]
        made = onnxsim.apply_structured_pruning(model, RATIO)
        sizes = [sum(int(np.prod(a.shape)) for a in _arrays(m).values()) for m in (model, made)]
        if sizes[1] >= sizes[0]:
            return "unchanged"
        got = _run(made)
        try:
            wanted = _run(_silenced(model, made))
        except ValueError as error:
            return f"approximate: {error}"
        return "pruned" if all(map(_alike, wanted, got)) else "approximate"
    except Exception as error:  # whatever it raises is its answer
        return _words(error)


def by_torch_pruning(family: str) -> str:
    """pruned, unchanged, or failed and why."""
    import torch
    from coverage_models import MODELS
    from torch import nn

    # isort: split
    import torch_pruning as tp  # imports torchvision

    def shapes(found: Any) -> list[tuple[int, ...]]:
        return [tuple(x.shape) for x in (found if isinstance(found, tuple | list) else [found])]

    try:
        torch.manual_seed(0)
        torch.set_num_threads(1)
        network, inputs = MODELS[family]()
        network.eval()
        with torch.no_grad():
            wanted = shapes(network(*inputs))
        before = sum(p.numel() for p in network.parameters())
        last = [m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1:]
        last += [m for m in network.modules() if isinstance(m, nn.Linear) and m.out_features in (10, 1000)]
        tp.pruner.BasePruner(
            network,
            inputs if len(inputs) > 1 else inputs[0],
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=RATIO,
            ignored_layers=last,
        ).step()
        with torch.no_grad():
            if shapes(network(*inputs)) != wanted:
                return "failed: the outputs changed their shapes"
        return "pruned" if sum(p.numel() for p in network.parameters()) < before else "unchanged"
    except Exception as error:  # whatever it raises is its answer
        return _words(error)


def main() -> None:
    for path in map(Path, sys.argv[1:]):
        family = "__".join(path.stem.split("__")[:-2]).replace("__", "/", 1)
        found = {"onnxsim": by_onnxsim(path, False), "onnxsim_simplified": by_onnxsim(path, True)}
        if path.stem.endswith("__torchscript__fixed"):  # once for each architecture
            found["torch_pruning"] = by_torch_pruning(family)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
