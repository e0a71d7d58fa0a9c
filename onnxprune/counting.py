"""Multiply-accumulates and memory of a model as it stands, counted on its graph at concrete shapes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from onnxprune.analysis import Analysis
from onnxprune.costs import PeakMemory
from onnxprune.errors import InputError
from onnxprune.graph import Graph
from onnxprune.macs import mac_terms
from onnxprune.normalise import normalise
from onnxprune.probe import Shapes, probe, random_feeds, run_probe
from onnxprune.runtime import Runtime

_SIZES = ((1, 224, 224, 16), (1, 256, 256, 32), (1, 640, 640, 128))


def nominal_shapes(graph: Graph, runtime: Runtime, feeds: Mapping[str, np.ndarray] | None) -> Shapes:
    """Shapes at which costs are counted: one sample, of the data's size where there are data."""
    if feeds is not None:
        return Shapes((run_probe(graph, feeds, runtime),))
    for sizes in _SIZES:
        try:
            return Shapes((run_probe(graph, random_feeds(graph, sizes), runtime),))
        except InputError:
            raise
        except Exception:  # this size does not suit the model; onnxruntime's errors share no base class
            continue
    return Shapes(probe(graph, runtime).probes[:1])


def count_model_macs(model: onnx.ModelProto, data: Mapping[str, np.ndarray] | None = None) -> int:
    """Multiply-accumulates of a model for one sample (or for the data given).

    Functions and branches that do not depend on the input are counted as what they stand for.
    """
    return count(model, data)[0]


def count_peak_memory(model: onnx.ModelProto, data: Mapping[str, np.ndarray] | None = None) -> int:
    """The most bytes of activations that are alive at once (see `PeakMemory`), for one sample or for the data given."""
    return count(model, data)[1]


def count(
    model: onnx.ModelProto, data: Mapping[str, np.ndarray] | None = None, runtime: Runtime | None = None
) -> tuple[int, int]:
    """Both, from one run of the model; ``runtime`` is one that the model is known to suit."""
    analysis = _bare(model, data, runtime or Runtime("cpu", 0).suited(model))
    return round(analysis.macs), round(PeakMemory(analysis).total(np.zeros(0)))


def _bare(model: onnx.ModelProto, data: Mapping[str, np.ndarray] | None, runtime: Runtime) -> Analysis:
    """The model as it stands, without groups."""
    graph = Graph(normalise(Graph(model), runtime)[0])
    shapes = nominal_shapes(graph, runtime, data)
    terms = tuple(term for node in graph.nodes for term in mac_terms(node, shapes))
    return Analysis(graph, shapes, (), (), (), terms, (), shapes)
