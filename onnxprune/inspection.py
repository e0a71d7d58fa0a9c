"""What may be removed from a model, without the parts that remove it: `onnxprune inspect` answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from onnxprune.analysis import Analysis
from onnxprune.costs import CostModel
from onnxprune.cuttable import cuttable
from onnxprune.data import Preprocessing, load_calibration
from onnxprune.graph import Graph, model_of
from onnxprune.runtime import Runtime
from onnxprune.tensors import with_scratch


@dataclass(frozen=True, eq=False)
class Inspection:
    """What may be removed from a model, before any data is looked at."""

    analysis: Analysis
    reachable: float  # the largest speed-up in multiply-accumulates


@with_scratch
def analyze(
    model: str | Path | onnx.ModelProto,
    *,
    data: object = None,
    only: str | None = None,
    exclude: str | None = None,
    approximate: bool = False,
    threads: int = 0,
    preprocessing: Preprocessing | None = None,
) -> Inspection:
    """Find what may be removed from a model; data only serve to know the sizes of dynamic inputs."""
    runtime = Runtime("cpu", threads)
    original = model_of(model)
    path = None if isinstance(model, onnx.ModelProto) else Path(model)
    runtime = runtime.suited(original)
    graph = Graph(original, path.parent if path else None)
    calibration = None
    if data is not None:
        calibration = load_calibration(data, graph.inputs, samples=4, preprocessing=preprocessing or Preprocessing())
    analysis = cuttable(graph, runtime, calibration, False, only, exclude, approximate=approximate).analysis
    cost = CostModel(analysis)
    least = cost.total(np.ones(len(analysis.groups)))
    return Inspection(analysis, analysis.macs / least if least else float("inf"))
