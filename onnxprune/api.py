"""The pipeline, readable as a table of contents."""

from __future__ import annotations

import functools
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx

from onnxprune.analysis import Analysis, analyse
from onnxprune.biases import add_biases, drop_biases
from onnxprune.comparison import compare, measure_fidelity
from onnxprune.cost import Latency, measure_latency, params
from onnxprune.costs import CostModel
from onnxprune.counting import count_model_macs, count_peak_memory, nominal_shapes
from onnxprune.data import Calibration, InputSpec, Preprocessing, load_calibration
from onnxprune.deployed import deployed_feeds
from onnxprune.errors import InputError, InternalError
from onnxprune.files import write_model
from onnxprune.graph import Graph, read_model
from onnxprune.groups import Kind, Seed
from onnxprune.macs import uncounted
from onnxprune.normalise import normalise
from onnxprune.pipeline import Chooser
from onnxprune.plan import Plan, removed_positions
from onnxprune.probe import Feeds, probe
from onnxprune.progress import Progress
from onnxprune.promise import MISSED, Timing
from onnxprune.report import (
    Achieved,
    DataEntry,
    GroupEntry,
    Measures,
    Report,
    Target,
)
from onnxprune.report.overview import frozen_entries
from onnxprune.rewrite import CannotRepair, rewrite
from onnxprune.runtime import Runtime
from onnxprune.samplers import samplable
from onnxprune.selection import FROM_ACTIVATIONS, METHODS
from onnxprune.stopwatch import default_cache
from onnxprune.targets import UNITS, Limit, Wanted, counted_costs, limits, multiple_of, widths
from onnxprune.tensors import digest, size_of, with_scratch
from onnxprune.verify import Proof, prove

__all__ = ["Inspection", "Result", "analyze", "compare", "count_model_macs", "prune"]

DEFAULT_SAMPLES = 2000
SLACK = 1.05  # a speed-up of X is met by [X, 1.05 X]
_SAMPLING = {"macs", "params"}  # costs to which a sampler adds nothing
_HELD_OUT_SHARE = 0.1
_NOT_IN_ITS_TYPES = (
    "onnxruntime has no kernels for the types of this model: it was run, proven and compared in float32 copies, and"
    " latency was not measured"
)
_FEWEST_TO_SPLIT = 10
_MOST_HELD_OUT = 500
_FINISHED_AT_MOST = 3  # networks, where the first do not keep a promise about time


@dataclass(frozen=True, eq=False)
class Result:
    """A pruned model, with the report and the plan that led to it.

    Where the original keeps tensors in files of their own, so does ``model``, in temporary ones that go with the
    result: `save` puts them beside the model.
    """

    model: onnx.ModelProto
    report: Report
    plan: Plan

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write the model, whole or not at all.

        Raises:
            InputError: the file exists and ``force`` is not given.
        """
        write_model(self.model, Path(path), force=force)


@dataclass(frozen=True, eq=False)
class Inspection:
    """What may be removed from a model, before any data is looked at."""

    analysis: Analysis
    reachable: float  # the largest speed-up in multiply-accumulates


@with_scratch
def prune(
    model: str | Path | onnx.ModelProto,
    *,
    speedup: float = 2.0,
    by: str = "macs",
    max_macs: float | None = None,
    max_params: float | None = None,
    max_memory: float | None = None,
    round_to: int | str | None = None,
    target: str | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    batch: int | None = None,
    data: object = None,
    samples: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    threads: int = 0,
    provider: str = "cpu",
    select: str = "greedy",
    reconstruct: bool = True,
    only: str | None = None,
    exclude: str | None = None,
    samplers: bool = True,
    best_effort: bool = False,
    preprocessing: Preprocessing | None = None,
    progress: Progress | None = None,
) -> Result:
    """Make a smaller dense model that costs 1 / ``speedup`` of the original and computes nearly the same.

    Args:
        model: a file, or the model itself.
        speedup: cost before / after, counted on the model that comes out.
        by: what cost is: macs (multiply-accumulates), params (stored floating-point numbers), memory (the most bytes
            of activations that are alive at once), or latency (time of a run, measured with ``provider`` and
            ``threads`` at the deployed sizes).
        max_macs: at most so many may be left, besides.
        max_params: the same of parameters.
        max_memory: the same of the peak of the activations' bytes.
        round_to: keep multiples of so many channels, or whole groups; "auto" is the target's number.
        target: a deployment that is not at hand, by its name in `onnxprune.targets.TARGETS`.
        shapes: deployed sizes: whole shapes of inputs, by name; those of a sample where none is given.
        batch: deployed size of the open first axis of the inputs.
        data: calibration data (see `onnxprune.data`); nothing means a neighbour of the file, or random data.
        samples: how many of them to use.
        batch_size: samples per run; chosen by memory if not given.
        seed: of every random draw.
        threads: of the runtime; 0 is its own choice.
        provider: cpu, cuda, tensorrt, openvino, coreml or dml.
        select: how channels are chosen: greedy, lasso, l1, slimming or random.
        reconstruct: fit the remaining weights again by least squares.
        only: regular expression; only layers with such a node name are made narrower.
        exclude: regular expression; layers with such a node name are left as they are.
        samplers: let convolutions at the entry of residual blocks choose the channels they read (a Gather in front),
            where channels are chosen by activations and cost is counted in macs or params; else the stream that all
            blocks share is cut.
        best_effort: go as far as possible where the speed-up cannot be reached.
        preprocessing: how uint8 images become the model's input.
        progress: receives the stages.

    Raises:
        InputError: the model, the data or an option cannot be used.
        UnreachableTarget: the speed-up cannot be reached and ``best_effort`` is not given.
        InternalError: the proof failed.
    """
    most = {"macs": max_macs, "params": max_params, "memory": max_memory}
    wanted = Wanted(speedup, by, {name: value for name, value in most.items() if value is not None})
    multiple = multiple_of(round_to, target)
    _check_options(select, samples, batch_size)
    progress = progress or Progress()
    runtime = Runtime(provider, threads)
    with progress.stage("load"):
        path = None if isinstance(model, onnx.ModelProto) else Path(model)
        original = model if isinstance(model, onnx.ModelProto) else read_model(Path(model))
        runtime = runtime.suited(original)
        graph = Graph(original, path.parent if path else None)
        calibration = load_calibration(
            data,
            graph.inputs,
            model_path=path,
            samples=samples or DEFAULT_SAMPLES,
            seed=seed,
            preprocessing=preprocessing or Preprocessing(),
        )
        if calibration.is_random:  # at sizes that the model is known to run at
            sizes = _of_one_sample(graph, [p.feeds for p in probe(graph, runtime, seed=seed).probes])
            calibration = load_calibration(None, graph.inputs, samples=samples, seed=seed, dynamic=sizes)
        fit_data, held_out = _split(calibration)
    with progress.stage("groups"):
        sampling = samplers and select in FROM_ACTIVATIONS and {by, *wanted.most} <= _SAMPLING
        prepared = _prepare(graph, runtime, calibration, reconstruct, only, exclude, sampling)
    analysis = prepared.analysis
    sample = calibration.feeds([0])
    deployed = deployed_feeds(graph.inputs, sample, shapes, batch)
    before = _measures(original, sample)
    costs = counted_costs(analysis, {by, *wanted.most}, prepared.copies)
    choices = widths(analysis, multiple)
    budget = limits(analysis, wanted, costs, before.counted(), choices, best_effort)
    timing = None
    if by == "latency":
        if runtime.as_float32:
            raise InputError(
                "onnxruntime has no kernels for the types of this model, so its latency cannot be measured"
            )
        cut = functools.partial(_cut, prepared)
        timing = Timing(analysis, original, deployed, runtime, wanted, cut, default_cache(), progress)
        choices = timing.measure(choices, best_effort)
    warnings = list(calibration.warnings)
    if hidden := uncounted(analysis.graph.model):
        warnings.append(f"{hidden} layers in bodies of If, Loop or Scan stay as they are, and are not counted")
    if len(calibration) < _FEWEST_TO_SPLIT:
        warnings.append(
            f"only {len(calibration)} samples: fidelity is measured on those that the weights were fitted to"
        )
    if reconstruct:
        warnings += _quantised(analysis)
    chooser = Chooser(analysis, fit_data, runtime, progress, select, seed, batch_size)
    uses_data = reconstruct or select in FROM_ACTIVATIONS
    if uses_data:
        chooser.collect()
    chooser.rank()

    def allocate(found: list[Limit]) -> np.ndarray:
        return chooser.allocate(found, choices, measured=uses_data)

    counts = np.empty(0, np.int64)
    for _ in range(_FINISHED_AT_MOST):
        before_that, counts = counts, timing.solve(allocate, budget) if timing else allocate(budget)
        if np.array_equal(before_that, counts):
            break
        plan, pruned, proof = _finish(prepared, chooser, counts, original, runtime, reconstruct)
        if timing is None or timing.keeps_promise(pruned, counts):
            break
    with progress.stage("measure"):
        times: Sequence[Latency | None] = (None, None)
        if runtime.as_float32:
            warnings.append(_NOT_IN_ITS_TYPES)
        else:
            times = measure_latency([original, pruned], deployed, runtime)
        fidelity = measure_fidelity(original, pruned, held_out, batch_size or 32, runtime)
        before, after = replace(before, latency_ms=times[0]), _measures(pruned, sample, times[1])
        achieved = Achieved.of(before, after)
    entry = timing.entry() if timing else None
    if entry is not None:
        achieved = replace(achieved, latency=entry.measured.ratio)
    warnings += [*chooser.notes, *_misses(wanted, achieved, after)]
    report = Report(
        target=Target(wanted.speedup, wanted.by),
        limits=wanted.most,
        before=before,
        after=after,
        achieved=achieved,
        groups=tuple(
            GroupEntry(
                g.name, g.units, len(plan.kept[g.name]), g.producers, g.consumers, chooser.errors.get(g.group.index)
            )
            for g in analysis.groups
        ),
        frozen=frozen_entries(analysis),
        prunable_macs=analysis.prunable_macs,
        removed=_removed(analysis, plan, graph, prepared),
        proof=proof,
        fidelity=fidelity,
        data=DataEntry(calibration.source, len(calibration), calibration.digest, calibration.is_random),
        seed=seed,
        timings=dict(progress.timings),
        versions=_versions(),
        hashes={"model": plan.model, "pruned": digest(pruned), "data": calibration.digest},
        warnings=tuple(warnings),
        options={
            "select": select,
            "reconstruct": reconstruct,
            "only": only,
            "exclude": exclude,
            "multiple": multiple,
            "samplers": samplers,
        },
        latency=entry,
    )
    return Result(pruned, report, plan)


@with_scratch
def analyze(
    model: str | Path | onnx.ModelProto,
    *,
    data: object = None,
    only: str | None = None,
    exclude: str | None = None,
    threads: int = 0,
    preprocessing: Preprocessing | None = None,
) -> Inspection:
    """Find what may be removed from a model; data only serve to know the sizes of dynamic inputs."""
    runtime = Runtime("cpu", threads)
    original = model if isinstance(model, onnx.ModelProto) else read_model(Path(model))
    path = None if isinstance(model, onnx.ModelProto) else Path(model)
    runtime = runtime.suited(original)
    graph = Graph(original, path.parent if path else None)
    calibration = None
    if data is not None:
        calibration = load_calibration(data, graph.inputs, samples=4, preprocessing=preprocessing or Preprocessing())
    analysis = _prepare(graph, runtime, calibration, False, only, exclude).analysis
    cost = CostModel(analysis)
    least = cost.total(np.ones(len(analysis.groups)))
    return Inspection(analysis, analysis.macs / least if least else float("inf"))


# ------------------------------------------------------------------------------------------------------ the parts


@dataclass(frozen=True, eq=False)
class _Prepared:
    analysis: Analysis
    copies: Mapping[str, str]
    biases: tuple[str, ...]


def _check_options(select: str, samples: int | None, batch_size: int | None) -> None:
    if select not in METHODS:
        raise InputError(f"unknown selection {select!r}; expected one of {', '.join(METHODS)}")
    for name, value in (("samples", samples), ("batch size", batch_size)):
        if value is not None and value < 1:
            raise InputError(f"expected a number of {name} of at least 1, found {value}")


def _split(calibration: Calibration) -> tuple[Calibration, Calibration]:
    """Records to fit on, and held-out ones to judge by; too few to part serve as both."""
    count = min(int(len(calibration) * _HELD_OUT_SHARE), _MOST_HELD_OUT)
    return calibration.split(count) if count else (calibration, calibration)


def _prepare(
    graph: Graph,
    runtime: Runtime,
    calibration: Calibration | None,
    reconstruct: bool,
    only: str | None,
    exclude: str | None,
    sampling: bool = False,
) -> _Prepared:
    """Normalise, find shapes and groups; sizes that cannot be repaired freeze their axes."""
    model, copies = normalise(graph, runtime)
    biases = add_biases(model) if reconstruct else []
    graph = Graph(model, graph.folder)
    batch = None
    if calibration is not None:
        batch = calibration.feeds(list(range(min(3, len(calibration)))) if calibration.batchable else [0])
    shapes = probe(graph, runtime, batch)
    one = calibration.feeds([0]) if calibration is not None else None
    nominal = nominal_shapes(graph, runtime, one)
    seeds: tuple[Seed, ...] = ()
    while True:
        analysis = analyse(graph, shapes, nominal, only, exclude, seeds)
        sampled = samplable(analysis) if sampling else frozenset()
        if sampled:
            analysis = analyse(graph, shapes, nominal, only, exclude, seeds, sampled)
        half = {g.name: tuple(range(max(g.units // 2, 1))) for g in analysis.groups}
        try:
            rewrite(analysis, Plan("", half))
            return _Prepared(analysis, copies, tuple(biases))
        except CannotRepair as error:
            more = tuple(Seed(Kind.STATED, str(error), error.node, error.op, error.tensor, axis) for axis in error.axes)
            if not set(more) - set(seeds):
                raise InternalError(f"freezing did not help: {error}") from error
            seeds += more


def _cut(prepared: _Prepared, counts: np.ndarray) -> onnx.ModelProto:
    """The network with the first units of every group, which takes as long as with any others."""
    kept = {g.name: tuple(range(int(n))) for g, n in zip(prepared.analysis.groups, counts, strict=True)}
    return rewrite(prepared.analysis, Plan("", kept), copies=prepared.copies)


def _finish(
    prepared: _Prepared,
    chooser: Chooser,
    counts: np.ndarray,
    original: onnx.ModelProto,
    runtime: Runtime,
    reconstruct: bool,
) -> tuple[Plan, onnx.ModelProto, Proof]:
    """Choose units, fit weights, prove the cut, and make the model."""
    analysis = prepared.analysis
    arrays: Mapping[str, np.ndarray] = {}
    if reconstruct:
        arrays = chooser.sweep(counts)
    else:
        chooser.choose(counts)
    names = {info.group.index: info.name for info in analysis.groups}
    plan = Plan(digest(original), {names[g]: tuple(int(i) for i in kept) for g, kept in sorted(chooser.kept.items())})
    with chooser.progress.stage("prove"):
        spare = [name for name in prepared.biases if name not in arrays]
        sliced = rewrite(analysis, plan, copies=prepared.copies)
        tried = [p.feeds for p in analysis.shapes.probes]
        proof = prove(analysis, plan, sliced, tried, runtime)
        pruned = rewrite(analysis, plan, arrays, prepared.copies)
        drop_biases(pruned, spare)
        _check_written(pruned, original)
    return plan, pruned, proof


def _measures(model: onnx.ModelProto, batch: Mapping[str, np.ndarray], latency: Latency | None = None) -> Measures:
    macs, memory = count_model_macs(model, batch), count_peak_memory(model, batch)
    return Measures(macs, params(model), size_of(model), latency, memory)


def _quantised(analysis: Analysis) -> list[str]:
    """A word on layers whose weights are integers: sliced exactly, and not fitted."""
    scaled = {name for n in analysis.graph.nodes if n.op == "DequantizeLinear" for name in n.outputs}
    readers = {name for info in analysis.groups for name in info.consumers}
    count = len({n.index for n in analysis.graph.nodes if n.label in readers and scaled & set(n.inputs[1:2])})
    said = "read quantised weights: their channels are taken out exactly, and nothing is fitted again there"
    return [f"{count} layer{'s' if count > 1 else ''} {said}"] if count else []


def _misses(wanted: Wanted, achieved: Achieved, after: Measures) -> list[str]:
    """What was asked for and not met on the files."""
    found = []
    ratio, unit = achieved.of_unit(wanted.by), UNITS[wanted.by]
    tight = not wanted.most  # another limit may ask for more than the ratio does
    low, high = wanted.speedup * (1 - (MISSED if wanted.by == "latency" else 1e-9)), wanted.speedup * SLACK
    if ratio is not None and not (low <= ratio and (ratio <= high or not tight)):
        found.append(f"asked for {wanted.speedup:g}x in {unit}, counted {ratio:.3g}x: the widths allow no closer")
    for name, most in wanted.most.items():
        if after.counted()[name] > most:
            found.append(f"asked for at most {most:g} {UNITS[name]}, counted {after.counted()[name]:g}")
    return found


def _check_written(model: onnx.ModelProto, original: onnx.ModelProto) -> None:
    try:
        onnx.checker.check_model(original)
    except Exception:  # onnxruntime is more lenient than the checker; what it took before it may take again
        return
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise InternalError(f"the pruned model does not pass onnx.checker: {error}") from error


def _of_one_sample(graph: Graph, feeds: Sequence[Feeds]) -> dict[str, tuple[int, ...]]:
    """Sizes of the inputs for one sample, from sizes at which the model is known to run.

    The batch is the first axis where that is dynamic, and every other dynamic axis that is always as long (the second
    one of a recurrent state).
    """
    batches = {tuple(f[spec.name].shape[0] for f in feeds) for spec in graph.inputs if spec.shape[:1] == (None,)}
    several = len(feeds) > 1  # at one size alone, alike may be by chance

    def size(spec: InputSpec, axis: int) -> int:
        found = tuple(f[spec.name].shape[axis] for f in feeds)
        is_batch = axis == 0 or (several and found in batches)
        return 1 if spec.shape[axis] is None and is_batch else found[0]

    return {spec.name: tuple(size(spec, axis) for axis in range(len(spec.shape))) for spec in graph.inputs}


def _removed(
    analysis: Analysis, plan: Plan, original: Graph, prepared: _Prepared
) -> dict[str, dict[int, tuple[int, ...]]]:
    """Removed positions of stored tensors, by the names that the original has.

    Of a tensor and its aliases (Identity) that lost different positions, all are named, if need be with nothing
    removed: each stands for itself. A tensor that several operators read under one name and that was not cut alike for
    all of them is left out: its name does not say what was removed.
    """
    graph, known = analysis.graph, set(original.stored_names()) | original.computed_from_constants
    found: dict[str, dict[int, tuple[int, ...]]] = {}
    for (tensor, axis), gone in sorted(removed_positions(analysis, plan).items()):
        if graph.is_stored(tensor) and tensor not in prepared.biases:
            found.setdefault(tensor, {})[axis] = tuple(int(i) for i in gone)
    for node in original.nodes:
        alias, source = node.outputs[0], node.inputs[0] if node.inputs else ""
        if node.op == "Identity" and graph.is_stored(alias) and found.get(alias) != found.get(source):
            found.setdefault(alias, {})
    uneven = {origin for copy, origin in prepared.copies.items() if found.get(copy) != found.get(origin)}
    return {name: axes for name, axes in found.items() if name in known - uneven}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("onnxprune", "onnx", "onnxruntime", "onnxruntime-gpu", "numpy", "scipy", "scikit-learn"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
