"""Multiply-accumulates and memory of a model as it stands, counted on its graph at concrete shapes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
import onnx

from onnxprune.analysis import Analysis
from onnxprune.costs import PeakMemory
from onnxprune.errors import InputError
from onnxprune.flat import forms
from onnxprune.graph import Graph, Node
from onnxprune.macs import all_terms, layers_within
from onnxprune.probe import Probe, Shapes, probe, random_feeds, run_probe
from onnxprune.runtime import Runtime, expose
from onnxprune.turns import macs_of_turns

# what they give has as many elements as the values say, and no channel of it is ever cut
_FINDING = frozenset({"Compress", "If", "Loop", "NonMaxSuppression", "NonZero", "Unique"})
Result = TypeVar("Result")
_SIZES = ((1, 224, 224, 16), (1, 256, 256, 32), (1, 640, 640, 128))


def nominal_shapes(graph: Graph, runtime: Runtime, feeds: Mapping[str, np.ndarray] | None) -> Shapes:
    """Shapes at which costs are counted: one sample, of the data's size where there are data."""
    shapes = Shapes((_nominal_probe(graph, runtime, feeds),))
    return dataclasses.replace(shapes, turns=macs_of_turns(graph, shapes, runtime))


def _nominal_probe(graph: Graph, runtime: Runtime, feeds: Mapping[str, np.ndarray] | None) -> Probe:
    if feeds is not None:
        return run_probe(graph, feeds, runtime)
    for sizes in _SIZES:
        try:
            return run_probe(graph, random_feeds(graph, sizes), runtime)
        except InputError:
            raise
        except Exception:  # this size does not suit the model; onnxruntime's errors share no base class
            continue
    return probe(graph, runtime).probes[0]


def count_model_macs(model: onnx.ModelProto, data: Mapping[str, np.ndarray] | None = None) -> int:
    """Multiply-accumulates of a model for one sample (or for the data given).

    Functions and branches that do not depend on the input are counted as what they stand for. Of an `If` that does,
    both branches are counted, although one run takes one of them; of a Loop or a Scan, the first turn as often as it
    turns.
    """
    return count(model, data)[0]


def count_peak_memory(model: onnx.ModelProto, data: Mapping[str, np.ndarray] | None = None) -> int:
    """The most bytes of activations that are alive at once (see `PeakMemory`), for one sample or for the data given."""
    return count(model, data)[1]


def count(
    model: onnx.ModelProto,
    data: Mapping[str, np.ndarray] | None = None,
    runtime: Runtime | None = None,
    found: Mapping[str, np.ndarray] | None = None,
) -> tuple[int, int]:
    """Both, from one run of the model.

    Args:
        model: whose work is counted.
        data: what it is fed; one random sample where there are none.
        runtime: one that the model is known to suit.
        found: what another model found in the data (`findings`), on which this one is then to work.
    """
    analysis = _bare(model, data, runtime or Runtime("cpu", 0).suited(model), found or {})
    return round(analysis.macs), round(PeakMemory(analysis).total(np.zeros(0)))


def findings(model: onnx.ModelProto, data: Mapping[str, np.ndarray], runtime: Runtime) -> dict[str, np.ndarray]:
    """What the operators give that find as much as the values say (boxes, say), by tensor.

    A model that finds more works more. Two models are compared fairly only where both work on the same findings.
    """
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    if not any(node.op_type in _FINDING for node in nodes):
        return {}

    def values(graph: Graph) -> dict[str, np.ndarray]:
        names = [name for node in graph.nodes if _finds(node, graph) for name in node.outputs if name]
        given = runtime.session(expose(graph.model, names), optimise=False).run(names, dict(data)) if names else []
        return {name: value for name, value in zip(names, given, strict=True) if isinstance(value, np.ndarray)}

    return _of_first_form(model, runtime, values)


def _of_first_form(model: onnx.ModelProto, runtime: Runtime, work: Callable[[Graph], Result]) -> Result:
    """What is found with the branches laid open or, where both do not run on the same data, without."""
    *opened, plain = forms(Graph(model), runtime)
    for flat in opened:
        with contextlib.suppress(Exception):  # onnxruntime's errors share no base class
            return work(Graph(flat.model))
    return work(Graph(plain.model))


def _finds(node: Node, graph: Graph) -> bool:
    if node.domain or node.op not in _FINDING or node.choice:
        return False
    if node.op == "Compress" and node.inputs[1] in graph.computed_from_constants:  # it takes what the file says
        return False
    return node.op != "Loop" or not layers_within(graph.model.graph.node[node.index])  # else its own work counts


def _given(graph: Graph, found: Mapping[str, np.ndarray]) -> Graph:
    """The graph with inputs in place of what its operators would find."""
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    gone = [node for node in graph.nodes if _finds(node, graph) and all(name in found for name in node.outputs if name)]
    for node in reversed(gone):
        del model.graph.node[node.index]
        for name in filter(None, node.outputs):
            kind = onnx.helper.np_dtype_to_tensor_dtype(found[name].dtype)
            model.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, found[name].shape))
    return Graph(model, graph.folder)


def _bare(
    model: onnx.ModelProto,
    data: Mapping[str, np.ndarray] | None,
    runtime: Runtime,
    found: Mapping[str, np.ndarray],
) -> Analysis:
    """The model as it stands, without groups."""

    def seen(graph: Graph) -> tuple[Graph, Shapes]:
        feeds = data
        if data is not None and found:
            graph = _given(graph, found)
            feeds = {**data, **{spec.name: found[spec.name] for spec in graph.inputs if spec.name in found}}
        return graph, nominal_shapes(graph, runtime, feeds)

    graph, shapes = _of_first_form(model, runtime, seen)
    return Analysis(graph, shapes, (), (), (), all_terms(graph.nodes, shapes), (), shapes)
