"""Two models side by side: how alike their outputs are on data, what they cost, how long they take."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from onnxprune.cost import Latency, measure_latency, params
from onnxprune.counting import count, findings
from onnxprune.data import Calibration, InputSpec, Preprocessing, load_calibration
from onnxprune.errors import InputError
from onnxprune.graph import Graph, model_of
from onnxprune.images import fits, is_float, shape_text
from onnxprune.progress import Progress
from onnxprune.runtime import Runtime
from onnxprune.tensors import size_of

Array = npt.NDArray[Any]

DEFAULT_BATCH = 32
_NO_NUMBERS = "has NaN or infinite numbers in it"
_UNLIKE = "has another shape in the one model than in the other for some of the data, or is all zeros in the first"
_Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True)
class Fidelity:
    """How alike two models are on data.

    ``agreement`` is the share of samples with the same most probable class, with its Wilson 95 % interval;
    None where the first floating-point output is not of the form [samples, classes]. ``relative_error`` holds
    per floating-point output ‖a - b‖ / ‖a‖ over all the data (infinite where the shapes differ, NaN where numbers are
    not finite), ``equal`` per output of whole numbers, or of yes and no, the share of entries that are the same (none
    where the shapes differ).
    """

    samples: int
    agreement: float | None
    agreement_low: float | None
    agreement_high: float | None
    relative_error: Mapping[str, float]
    is_random: bool
    equal: Mapping[str, float] = field(default_factory=dict)

    @property
    def doubts(self) -> tuple[str, ...]:
        """What cannot be said, for people."""
        return tuple(
            f"output {name!r} {_NO_NUMBERS if math.isnan(error) else _UNLIKE}: how alike the two models are there"
            " cannot be said"
            for name, error in self.relative_error.items()
            if not math.isfinite(error)
        )


@dataclass(frozen=True)
class Side:
    """What one of the two models is and costs; MACs are those of one record of the data."""

    name: str
    macs: int
    params: int
    bytes: int
    latency_ms: Latency | None


@dataclass(frozen=True)
class Comparison:
    """The outcome of `compare`; ``b`` is measured against ``a``. Latency is that of a batch of ``batch`` samples."""

    a: Side
    b: Side
    fidelity: Fidelity
    data: str
    batch: int
    warnings: tuple[str, ...]


def compare(
    a: str | Path | onnx.ModelProto,
    b: str | Path | onnx.ModelProto,
    *,
    data: object = None,
    samples: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    threads: int = 0,
    provider: str = "cpu",
    preprocessing: Preprocessing | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Run two models on the same data, and time them in turns.

    Args:
        a: the model to compare with, as a path or in memory.
        b: the model that is compared.
        data: as of `onnxprune.prune`; what lies beside ``a`` is used where it is None.
        samples: at most so many, drawn with the seed.
        batch_size: samples fed at once; latency is of a batch of that size, of a single sample where it is None.
        seed: of the draw.
        threads: of onnxruntime, 0 for one per core.
        provider: of onnxruntime, by its short name.
        preprocessing: of uint8 images.
        progress: told of the stages.

    Raises:
        InputError: a model or the data cannot be used, or the two differ in inputs or outputs.
    """
    progress = progress or Progress()
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch size: expected at least 1, found {batch_size}; try {DEFAULT_BATCH}")
    runtime = Runtime(provider, threads)
    with progress.stage("load"):
        first, second = map(model_of, (a, b))
        runtime = runtime.suited(first)
        runtime = runtime if runtime.as_float32 else runtime.suited(second)
        inputs = common_inputs(first, second)
        calibration = load_calibration(
            data,
            inputs,
            model_path=None if isinstance(a, onnx.ModelProto) else Path(a),
            samples=samples,
            seed=seed,
            preprocessing=preprocessing or Preprocessing(),
        )
    sessions = [runtime.session(model, spinning=True) for model in (first, second)]
    batch_of = batch_size or DEFAULT_BATCH
    fidelity = measure_fidelity(first, second, calibration, batch_of, runtime, progress, sessions)
    with progress.stage("latency"):
        batch = min(batch_size or 1, len(calibration)) if calibration.batchable else 1
        feeds = calibration.feeds(range(batch))
        latencies: Sequence[Latency | None] = (None, None)  # not that of a copy in other types
        if not runtime.as_float32:
            latencies = measure_latency(sessions, feeds, runtime)
    names = [each.graph.name or "model" if isinstance(each, onnx.ModelProto) else str(each) for each in (a, b)]
    one = calibration.feeds([0])
    found = findings(first, one, runtime)
    sides = [_side(*each, one, found) for each in zip(names, (first, second), latencies, strict=True)]
    warnings = (*calibration.warnings, *runtime.fallen, *fidelity.doubts)
    fed = next((len(array) for array in feeds.values() if array.ndim), 1)
    return Comparison(sides[0], sides[1], fidelity, calibration.source, fed, warnings)


def _side(
    name: str,
    model: onnx.ModelProto,
    latency: Latency | None,
    feeds: Mapping[str, Array],
    found: Mapping[str, Array],
) -> Side:
    return Side(name, count(model, feeds, found=found)[0], params(model), size_of(model), latency)


def measure_fidelity(
    original: onnx.ModelProto,
    pruned: onnx.ModelProto,
    calibration: Calibration,
    batch_size: int,
    runtime: Runtime,
    progress: Progress | None = None,
    sessions: Sequence[ort.InferenceSession] = (),
) -> Fidelity:
    """Run both models over all records and count how alike their outputs are; in sessions where they are given.

    Raises:
        InputError: the models differ in inputs or outputs, or cannot be run on the data.
    """
    common_inputs(original, pruned)
    names = [output.name for output in original.graph.output]
    sessions = sessions or [runtime.session(model) for model in (original, pruned)]
    run_original, run_pruned = (_runner(session, names, calibration.source) for session in sessions)
    tally = _Tally(names)
    progress = progress or Progress()
    batches = list(_batches(calibration, batch_size))
    with progress.stage("fidelity", len(batches)):
        for batch in batches:
            feeds = calibration.feeds(batch)
            tally.add(run_original(feeds), run_pruned(feeds))
            progress.advance()
    return tally.fidelity(len(calibration), calibration.is_random)


def _batches(calibration: Calibration, batch_size: int) -> Iterator[range]:
    size = batch_size if calibration.batchable else 1
    for first in range(0, len(calibration), size):
        yield range(first, min(first + size, len(calibration)))


def _runner(session: ort.InferenceSession, names: list[str], source: str) -> Callable[[Mapping[str, Array]], list[Any]]:
    def run(feeds: Mapping[str, Array]) -> list[Any]:
        try:
            return list(session.run(names, feeds))
        except Exception as error:  # onnxruntime's errors share no public base class
            line = next(iter(str(error).splitlines()), type(error).__name__)[:300]
            raise InputError(f"onnxruntime cannot run the model on the data ({source}): {line}") from error

    return run


class _Tally:
    """Sums over batches; nothing grows with the number of samples."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.norm: dict[str, float] = {}
        self.gap: dict[str, float] = {}
        self.entries: dict[str, int] = {}
        self.equal: dict[str, int] = {}
        self.rows = 0
        self.alike = 0
        self.is_scores = True

    def add(self, left: list[Any], right: list[Any]) -> None:
        first = True
        for name, a, b in zip(self.names, left, right, strict=True):
            if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)):
                continue
            same = a.shape == b.shape
            if a.dtype.kind in "iub":
                self.entries[name] = self.entries.get(name, 0) + max(a.size, b.size)
                self.equal[name] = self.equal.get(name, 0) + (int((a == b).sum()) if same else 0)
            if not is_float(a.dtype):
                continue
            wide = a.astype(np.float64)
            with np.errstate(invalid="ignore", over="ignore"):  # infinite ones: `Fidelity.doubts` says so
                gap = float(np.square(wide - b.astype(np.float64)).sum()) if same else math.inf
            self.norm[name] = self.norm.get(name, 0.0) + float(np.square(wide).sum())
            self.gap[name] = self.gap.get(name, 0.0) + gap
            if first:
                self._count(a, b)
            first = False

    def _count(self, a: Array, b: Array) -> None:
        if a.ndim != 2 or a.shape[1] < 2 or a.shape != b.shape:
            self.is_scores = False
            return
        self.rows += len(a)
        self.alike += int((a.argmax(axis=1) == b.argmax(axis=1)).sum())

    def fidelity(self, records: int, is_random: bool) -> Fidelity:
        errors = {name: _ratio(math.sqrt(gap), math.sqrt(self.norm[name])) for name, gap in self.gap.items()}
        equal = {name: self.equal[name] / count for name, count in self.entries.items() if count}
        if not (self.is_scores and self.rows):
            return Fidelity(records, None, None, None, errors, is_random, equal)
        low, high = wilson(self.alike, self.rows)
        return Fidelity(self.rows, self.alike / self.rows, low, high, errors, is_random, equal)


def _ratio(gap: float, norm: float) -> float:
    if math.isnan(gap) or math.isnan(norm):
        return math.nan
    return gap / norm if norm else math.inf if gap else 0.0


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval for a share (Wilson 1927, equation for the score interval).

    >>> tuple(round(end, 4) for end in wilson(95, 100))
    (0.8882, 0.9785)
    """
    share, square = successes / trials, _Z95**2
    middle = (share + square / (2 * trials)) / (1 + square / trials)
    half = _Z95 / (1 + square / trials) * math.sqrt(share * (1 - share) / trials + square / (4 * trials**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def common_inputs(a: onnx.ModelProto, b: onnx.ModelProto) -> tuple[InputSpec, ...]:
    """Inputs that both models take, a dimension being dynamic only where it is in both.

    Raises:
        InputError: the inputs or outputs differ in name, type or shape.
    """
    left, right = ({spec.name: spec for spec in Graph(model).inputs} for model in (a, b))
    if list(left) != list(right):
        raise InputError(_names_differ("inputs", list(left), list(right)))
    merged = []
    for name, first in left.items():
        second = right[name]
        if not _agree(first, second):
            raise InputError(
                f"the two models differ in input '{name}': expected {first.dtype} {shape_text(first.shape)} as in the "
                f"first, found {second.dtype} {shape_text(second.shape)}; try two versions of the same model"
            )
        shape = tuple(x if x is not None else y for x, y in zip(first.shape, second.shape, strict=True))
        merged.append(InputSpec(name, shape, first.dtype, first.stacks))
    outputs = [{value.name: value.type.tensor_type.elem_type for value in model.graph.output} for model in (a, b)]
    if list(outputs[0]) != list(outputs[1]):
        raise InputError(_names_differ("outputs", list(outputs[0]), list(outputs[1])))
    for name, kind in outputs[0].items():
        if kind != outputs[1][name]:
            text = [onnx.TensorProto.DataType.Name(each[name]) for each in outputs]
            raise InputError(
                f"the two models differ in output '{name}': expected {text[0]} as in the first, found {text[1]}; try "
                "two versions of the same model"
            )
    return tuple(merged)


def _agree(a: InputSpec, b: InputSpec) -> bool:
    if a.dtype != b.dtype or len(a.shape) != len(b.shape):
        return False
    fixed = tuple(x if x is not None else y if y is not None else 1 for x, y in zip(a.shape, b.shape, strict=True))
    return fits(a.shape, fixed) and fits(b.shape, fixed)


def _names_differ(what: str, expected: list[str], found: list[str]) -> str:
    return (
        f"the two models differ in their {what}: expected {', '.join(map(repr, expected)) or 'none'} as in the first, "
        f"found {', '.join(map(repr, found)) or 'none'}; try two versions of the same model"
    )
