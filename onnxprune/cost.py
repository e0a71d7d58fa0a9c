"""What a model costs: its parameters, and the time it takes on this machine."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from scipy.special import stdtrit

from onnxprune.errors import InputError
from onnxprune.graph import FLOATS
from onnxprune.runtime import Runtime

Array = npt.NDArray[Any]
Runnable: TypeAlias = bytes | onnx.ModelProto | ort.InferenceSession

_WARM_UP_RUNS = 3
_WARM_UP_SHARE = 0.1  # of the time allowed; slow models are warm after one run
_STARTS, _FEWEST_STARTS = 6, 4  # sessions of a pair, one after the other, for a ratio
_ROUNDS = (3, 500)  # fewest and most of each


@dataclass(frozen=True)
class Latency:
    """Time of one run in milliseconds, by the runtime's clock: median, 10th and 90th percentile, over how many runs."""

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
    rounds = _rounds(models, feeds, runtime, runtime.clock, seconds, min_runs, max_runs)
    return [_summary([1000 * t for t in each]) for each in rounds]


@dataclass(frozen=True)
class Ratio:
    """How many times less a second model takes than a first, with a 95 % interval, and seconds of the first.

    ``starts`` are the ratios of fresh sessions of both: where a session's memory comes to lie makes a difference that
    stays as long as it does, and that the models share no more than their runs. The ratio is their geometric mean, the
    interval Student's. ``clock`` is wall, or thread: the processor time of the one thread that computes.
    """

    ratio: float
    low: float
    high: float
    seconds: float
    rounds: int
    clock: str
    starts: tuple[float, ...]

    @staticmethod
    def of(starts: Sequence[float], seconds: float, rounds: int, clock: str) -> Ratio:
        """The ratio that at least two starts say."""
        logs = np.log(starts)
        count, middle = len(logs), float(np.mean(logs))
        half = float(stdtrit(count - 1, 0.975) * np.std(logs, ddof=1) / np.sqrt(count))
        low, ratio, high = np.exp([middle - half, middle, middle + half]).tolist()
        return Ratio(ratio, low, high, seconds, rounds, clock, tuple(starts))

    def __add__(self, other: Ratio) -> Ratio:
        """What two measurements of the same models say together."""
        rounds = self.rounds + other.rounds
        seconds = (self.rounds * self.seconds + other.rounds * other.seconds) / rounds
        return Ratio.of((*self.starts, *other.starts), seconds, rounds, self.clock)


def measure_ratio(
    before: onnx.ModelProto,
    after: onnx.ModelProto,
    feeds: Mapping[str, Array],
    runtime: Runtime,
    *,
    seconds: float = 3.0,
) -> Ratio:
    """Time two models in turns, in several fresh sessions one after the other; of each start the rounds' median ratio.

    Args:
        before: the first model.
        after: the second.
        feeds: one batch.
        runtime: provider and threads.
        seconds: to spend; slow models take longer, in fewer starts.

    Raises:
        InputError: onnxruntime refuses a model, or cannot run it on these feeds.
    """
    starts: list[float] = []
    times: list[float] = []
    begin = time.perf_counter()
    while len(starts) < _FEWEST_STARTS or (len(starts) < _STARTS and time.perf_counter() - begin < seconds):
        first, second = _rounds([before, after], feeds, runtime, runtime.clock, seconds / _STARTS, *_ROUNDS)
        starts.append(float(np.median(np.array(first) / np.maximum(second, 1e-9))))
        times += first
    return Ratio.of(starts, float(np.median(times)), len(times), "thread" if runtime.computes_alone else "wall")


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
            run = functools.partial(_run, sessions[index], feeds)
            runtime.take_turn(run, times[index][-1] if times[index] else np.nan)
            before = clock()
            run()
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
