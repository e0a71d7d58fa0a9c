"""Times that are given, in place of a stopwatch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
from builder import Builder

from onnxprune.analysis import Analysis
from onnxprune.latency import TimeCost, measure_parts, time_cost, timed_choices
from onnxprune.progress import Progress
from onnxprune.stopwatch import Reading
from onnxprune.targets import widths

DIGITS = Path(__file__).parent.parent / "models" / "digits_resnet.onnx"
US = 1e-6

# relative times of a layer, onnxruntime on a processor with AVX-512, against 128 channels
CLIFFS = {48: 0.40, 60: 0.51, 63: 0.57, 64: 0.51, 80: 0.67, 96: 0.77, 112: 0.89, 126: 1.0, 127: 1.12, 128: 1.0}


def staircase(width: int) -> float:
    """The table above, for every width."""
    return CLIFFS[min(w for w in CLIFFS if w >= width)] if width not in CLIFFS else CLIFFS[width]


def chain(*channels: int) -> onnx.ModelProto:
    """Convolutions one behind the other, each with its activation."""
    g = Builder()
    x = g.input("x", [1, 3, 6, 6])
    for k, n in enumerate(channels):
        x = g.Relu(g.conv(x, n, name=f"conv{k}"))
    return g.model(g.gemm(g.Flatten(g.GlobalAveragePool(x)), 4))


def residual(width: int = 32, inner: int = 64) -> onnx.ModelProto:
    g = Builder()
    x = g.Relu(g.conv(g.input("x", [1, 3, 6, 6]), width, name="stem"))
    for k in range(2):
        y = g.conv(g.Relu(g.conv(x, inner, name=f"a{k}")), width, name=f"b{k}")
        x = g.Relu(g.Add(y, x))
    return g.model(g.gemm(g.Flatten(g.MaxPool(x, kernel_shape=[6, 6])), 4))


def conv_time(model: onnx.ModelProto, of: Callable[[int, int], float]) -> float:
    """A pretended time: what ``of`` says of the output and input width of every 3 x 3 convolution."""
    shapes = {t.name: tuple(t.dims) for t in model.graph.initializer}
    found = [shapes[node.input[1]] for node in model.graph.node if node.op_type == "Conv"]
    return sum(of(shape[0], shape[1]) for shape in found if shape[2] == 3)


class Pretended:
    """In place of a stopwatch: times from a function of the model."""

    def once(self, key: str, measure: Callable[[], float]) -> float:
        return measure()

    def __init__(self, of: Callable[[int, int], float], doubt: float = 0.0) -> None:
        self.of, self.doubt = of, doubt
        self.measured = self.remembered = 0
        self.seen: set[str] = set()

    def times(self, models: Mapping[str, onnx.ModelProto], enough: Mapping[str, float]) -> dict[str, Reading]:
        assert enough.keys() == models.keys()
        self.measured += len(set(models) - self.seen)
        self.seen |= set(models)
        times = {key: 1 * US + conv_time(model, self.of) for key, model in models.items()}
        return {key: Reading(seconds, self.doubt * seconds) for key, seconds in times.items()}


def known(analysis: Analysis, of: Callable[[int, int], float]) -> tuple[TimeCost, list[np.ndarray]]:
    """The cost model and the choices that follow from pretended times."""
    whole = conv_time(analysis.graph.model, of)
    kinds = measure_parts(analysis, analysis.nominal, Pretended(of), Progress(), whole)
    return time_cost(analysis, kinds, whole), timed_choices(kinds, widths(analysis))
