"""What a model costs: its parameters, and the time it takes on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from onnxprune.errors import InputError
from onnxprune.graph import FLOATS
from onnxprune.runtime import Runtime

Array = npt.NDArray[Any]
Runnable: TypeAlias = bytes | onnx.ModelProto | ort.InferenceSession

_WARM_UP_RUNS = 3
_WARM_UP_SHARE = 0.1  # of the time allowed; slow models are warm after one run


@dataclass(frozen=True)
class Latency:
    """Wall-clock time of one run in milliseconds: median, 10th and 90th percentile, and over how many runs."""

    median: float
    p10: float
    p90: float
    runs: int


def params(model: onnx.ModelProto) -> int:
    """Count the floating-point numbers stored in a model: initializers and Constants, bodies included."""
    return sum(
        int(np.prod(tensor.dims, dtype=np.int64)) for tensor in _stored(model.graph) if tensor.data_type in FLOATS
    )


def _stored(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                yield attribute.t
            for body in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _stored(body)


def measure_latency(
    models: Sequence[Runnable],
    feeds: Mapping[str, Array],
    runtime: Runtime,
    *,
    seconds: float = 2.0,
    min_runs: int = 10,
    max_runs: int = 200,
) -> list[Latency]:
    """Time models on the same inputs, their runs interleaved so that a change of the machine's pace meets all alike.

    The order within a round alternates (A B, B A, A B, …): none always runs on what another left in the caches.

    Args:
        models: that take these feeds, or sessions of them.
        feeds: one batch.
        runtime: provider and threads.
        seconds: to spend on all models together; a run that has begun is finished.
        min_runs: of each model, however long they take.
        max_runs: of each model.

    Raises:
        InputError: onnxruntime refuses a model, or cannot run it on these feeds.
    """
    rounds = _rounds(models, feeds, runtime, time.perf_counter, seconds, min_runs, max_runs)
    return [_summary([1000 * t for t in each]) for each in rounds]


@dataclass(frozen=True)
class Ratio:
    """How many times less a second model takes than a first, with a 95 % interval, and seconds of the first.

    ``clock`` is wall, or thread: the processor time of the one thread that computes.
    """

    ratio: float
    low: float
    high: float
    seconds: float
    rounds: int
    clock: str


def measure_ratio(
    before: onnx.ModelProto,
    after: onnx.ModelProto,
    feeds: Mapping[str, Array],
    runtime: Runtime,
    *,
    seconds: float = 3.0,
    max_runs: int = 400,
) -> Ratio:
    """Time two models in turns: the median of the rounds' ratios, and the order statistics that enclose it.

    Raises:
        InputError: onnxruntime refuses a model, or cannot run it on these feeds.
    """
    first, second = _rounds([before, after], feeds, runtime, runtime.clock, seconds, 20, max_runs)
    ratios = np.sort(np.array(first) / np.maximum(second, 1e-9))
    count, middle = len(ratios), float(np.median(ratios))
    half = 1.96 * np.sqrt(count) / 2  # ranks of a median are binomial
    low, high = (int(np.clip(count / 2 + side * half, 0, count - 1)) for side in (-1, 1))
    name = "thread" if runtime.computes_alone else "wall"
    return Ratio(middle, float(ratios[low]), float(ratios[high]), float(np.median(first)), count, name)


def _rounds(
    models: Sequence[Runnable],
    feeds: Mapping[str, Array],
    runtime: Runtime,
    clock: Callable[[], float],
    seconds: float,
    min_runs: int,
    max_runs: int,
) -> list[list[float]]:
    """Seconds of every model in every round, after some runs to warm up."""
    sessions = [
        model if isinstance(model, ort.InferenceSession) else runtime.session(model, spinning=True) for model in models
    ]
    for session in sessions:
        start = time.perf_counter()
        for _ in range(_WARM_UP_RUNS):
            _run(session, feeds)
            if time.perf_counter() - start > seconds * _WARM_UP_SHARE:
                break
    times: list[list[float]] = [[] for _ in sessions]
    start = time.perf_counter()
    for round_number in range(max_runs):
        if round_number >= min_runs and time.perf_counter() - start > seconds:
            break
        order = range(len(sessions))
        for index in order if round_number % 2 == 0 else reversed(order):
            before = clock()
            _run(sessions[index], feeds)
            times[index].append(clock() - before)
    return times


def _summary(times: Sequence[float]) -> Latency:
    p10, median, p90 = (float(value) for value in np.percentile(times, (10, 50, 90)))
    return Latency(median, p10, p90, len(times))


def _run(session: ort.InferenceSession, feeds: Mapping[str, Array]) -> None:
    try:
        session.run(None, feeds)
    except Exception as error:  # onnxruntime's errors share no public base class
        line = next(iter(str(error).splitlines()), type(error).__name__)[:300]
        raise InputError(f"onnxruntime cannot run the model on the inputs that it is timed with: {line}") from error
