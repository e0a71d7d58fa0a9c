"""Other forms of ONNX files, as converters, optimisers and quantisers write them, for `coverage.py`.

    python benchmarks/coverage_rewritten.py FILES... --folder FOLDER [--only REGEX]

Of every file: optimised by onnxruntime (basic, extended with its com.microsoft operators, the layout of the machine),
quantised (QDQ and QOperator, per channel and per tensor), with float16 weights, at other opsets, with external data,
with weights that are also graph inputs, as `Constant` nodes, or in one function. Needs nothing beyond what the project
needs. A file that exists is kept; what a tool refuses leaves a `.failed` file with its words.
"""

from __future__ import annotations

import argparse
import functools
import logging
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from coverage_writing import is_done, write
from onnx import helper, version_converter
from onnxruntime import quantization

from onnxprune.graph import Graph, read_model
from onnxprune.probe import probe
from onnxprune.runtime import Runtime

logging.disable(logging.WARNING)
CALIBRATION = 4  # samples


def _optimised(level: ort.GraphOptimizationLevel) -> Callable[[Path, Path], None]:
    def make(source: Path, target: Path) -> None:
        options = ort.SessionOptions()
        options.graph_optimization_level = level
        options.optimized_model_filepath = str(target)
        options.log_severity_level = 4
        ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    return make


class _Reader(quantization.CalibrationDataReader):
    def __init__(self, source: Path) -> None:
        graph = Graph(read_model(source), source.parent)
        feeds = probe(graph, Runtime("cpu", 1)).probes[0].feeds
        rng = np.random.default_rng(0)
        self.rows = iter(
            {n: rng.standard_normal(a.shape).astype(a.dtype) if a.dtype.kind == "f" else a for n, a in feeds.items()}
            for _ in range(CALIBRATION)
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch."""
        return next(self.rows, None)


def _quantised(layout: quantization.QuantFormat, **options: object) -> Callable[[Path, Path], None]:
    def make(source: Path, target: Path) -> None:
        quantization.quantize_static(str(source), str(target), _Reader(source), quant_format=layout, **options)

    return make


def _dynamic(source: Path, target: Path) -> None:
    quantization.quantize_dynamic(str(source), str(target), weight_type=quantization.QuantType.QInt8)


def _float16(keep: bool) -> Callable[[Path, Path], None]:
    def make(source: Path, target: Path) -> None:
        from onnxruntime.transformers import float16

        model = onnx.shape_inference.infer_shapes(onnx.load(source))
        onnx.save(float16.convert_float_to_float16(model, keep_io_types=keep), target)

    return make


def _opset(version: int) -> Callable[[Path, Path], None]:
    def make(source: Path, target: Path) -> None:
        onnx.save(version_converter.convert_version(onnx.load(source), version), target)

    return make


def _external(source: Path, target: Path) -> None:
    name = f"{target.stem.removesuffix('.part')}.data"
    onnx.save(onnx.load(source), target, save_as_external_data=True, location=name, size_threshold=64)


def _inputs(source: Path, target: Path) -> None:
    """IR version 3 and before: every initializer is a graph input as well."""
    model = onnx.load(source)
    model.ir_version = 3
    listed = {value.name for value in model.graph.input}
    for tensor in model.graph.initializer:
        if tensor.name not in listed:
            model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    onnx.save(model, target)


def _constants(source: Path, target: Path) -> None:
    """Every initializer a Constant node."""
    model = onnx.load(source)
    nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in model.graph.initializer]
    nodes += list(model.graph.node)
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    onnx.save(model, target)


def _function(source: Path, target: Path) -> None:
    """The whole network in one function, with its weights as arguments."""
    model = onnx.load(source)
    graph = model.graph
    stored = [tensor.name for tensor in graph.initializer]
    given = [v.name for v in graph.input if v.name not in stored] + stored
    made = [v.name for v in graph.output]
    inside = helper.make_function("own", "Network", given, made, list(graph.node), list(model.opset_import))
    del graph.node[:], graph.value_info[:]
    graph.node.append(helper.make_node("Network", given, made, domain="own", name="network"))
    model.functions.append(inside)
    model.opset_import.append(helper.make_opsetid("own", 1))
    model.ir_version = max(model.ir_version, 8)
    onnx.save(model, target)


_QDQ, _OPERATOR = quantization.QuantFormat.QDQ, quantization.QuantFormat.QOperator
_INT8 = {"weight_type": quantization.QuantType.QInt8}
WAYS: dict[str, Callable[[Path, Path], None]] = {
    "ort-basic": _optimised(ort.GraphOptimizationLevel.ORT_ENABLE_BASIC),
    "ort-extended": _optimised(ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED),
    "ort-all": _optimised(ort.GraphOptimizationLevel.ORT_ENABLE_ALL),
    "qdq-channel": _quantised(_QDQ, per_channel=True, **_INT8),
    "qdq-tensor": _quantised(_QDQ),
    "qoperator": _quantised(_OPERATOR, per_channel=True, **_INT8),
    "quantised-dynamic": _dynamic,
    "float16": _float16(False),
    "float16-inside": _float16(True),
    "opset-8": _opset(8),
    "opset-11": _opset(11),
    "opset-18": _opset(18),
    "opset-22": _opset(22),
    "external": _external,
    "ir3": _inputs,
    "constants": _constants,
    "function": _function,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for source in options.files:
        for way, make in WAYS.items():
            # the batch is left as the name of the source says it
            *name, last = source.stem.split("__")
            stem = "__".join([*name, way, last] if name else [source.stem, way, ""])
            path = options.folder / f"{stem}.onnx"
            if not is_done(path) and re.search(options.only, stem):
                write(path, functools.partial(make, source))


if __name__ == "__main__":
    main()
