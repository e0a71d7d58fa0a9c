"""One member of a family: from the speed-up to the model that is written, and its report."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from onnx.inliner import inline_local_functions

from onnxprune.biases import drop_biases
from onnxprune.comparison import measure_fidelity
from onnxprune.cost import Latency, measure_latency
from onnxprune.counting import findings
from onnxprune.cuttable import Cuttable
from onnxprune.errors import InputError, InternalError, UnreachableTarget
from onnxprune.files import write_model
from onnxprune.fitting import Fitting
from onnxprune.graph import Graph
from onnxprune.origins import origins
from onnxprune.pipeline import Chooser
from onnxprune.plan import Plan, approximate_nodes, removed_positions
from onnxprune.prepare import Prepared, measures, versions
from onnxprune.promise import MISSED, Timing
from onnxprune.report import Achieved, GroupEntry, Measures, Report, Target
from onnxprune.report.overview import frozen_entries
from onnxprune.rewrite import rewrite
from onnxprune.stopwatch import default_cache
from onnxprune.targets import UNITS, Limit, Wanted, limits
from onnxprune.tensors import digest, with_scratch
from onnxprune.verify import Proof, prove, prove_alike

SLACK = 1.05  # a speed-up of X is met by [X, 1.05 X]
_NOT_IN_ITS_TYPES = (
    "onnxruntime has no kernels for the types of this model: it was run, proven and compared in float32 copies, and"
    " latency was not measured"
)
_TIMED = 1.0  # seconds for the latency of both files in the report
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
            InputError: the file exists and ``force`` is not given, or there is no such folder.
        """
        write_model(self.model, Path(path), force=force)


@dataclass(frozen=True, eq=False)
class Aim:
    """What one member has to meet: limits, the kept counts to choose from, and a promise about time."""

    wanted: Wanted
    limits: list[Limit]
    choices: Sequence[np.ndarray]
    timing: Timing | None

    def counts(self, chooser: Chooser) -> np.ndarray:
        """The kept counts with which it is met, as far as is known."""
        if self.timing is not None:
            return self.timing.solve(chooser.allocate, self.limits)
        return chooser.allocate(self.limits, self.choices)


def within_reach(prepared: Prepared, wanted: Wanted) -> bool:
    """Whether the limits that are counted can be met."""
    try:
        limits(prepared.analysis, wanted, prepared.costs, prepared.before.counted(), prepared.choices, False)
    except UnreachableTarget:
        return False
    return True


def aim(prepared: Prepared, wanted: Wanted) -> Aim:
    """See what can be reached, before any pass over the data.

    Raises:
        UnreachableTarget: the speed-up or a limit cannot be met, and that is not to be passed over.
    """
    settings, analysis, choices = prepared.settings, prepared.analysis, prepared.choices
    before = prepared.before.counted()
    found = limits(analysis, wanted, prepared.costs, before, choices, settings.best_effort)
    if wanted.by != "latency":
        return Aim(wanted, found, choices, None)
    if prepared.runtime.as_float32:
        raise InputError("onnxruntime has no kernels for the types of this model, so its latency cannot be measured")
    if prepared.runtime.fallen:
        raise InputError(f"{prepared.runtime.fallen[0]}, whose time says nothing of it; try --by macs, or that machine")
    cut = functools.partial(_cut, prepared.network)
    timing = Timing(
        analysis,
        prepared.original,
        prepared.deployed,
        prepared.runtime,
        wanted,
        cut,
        default_cache(),
        prepared.progress,
    )
    timing.measure(choices, settings.best_effort)
    return Aim(wanted, found, choices, timing)


@with_scratch
def finish(prepared: Prepared, goal: Aim, shared: Mapping[str, float]) -> Result:
    """Allocate, choose, fit, prove, measure.

    Args:
        prepared: what all members start from; ranked.
        goal: of this one.
        shared: seconds of the stages that all members have in common.

    Raises:
        InternalError: the proof failed.
    """
    settings, analysis, chooser = prepared.settings, prepared.analysis, prepared.chooser
    original, runtime, progress = prepared.original, prepared.runtime, prepared.progress
    wanted, timing = goal.wanted, goal.timing
    earlier = dict(progress.timings)

    counts = np.array([-1])  # of no network
    for _ in range(_FINISHED_AT_MOST):
        before_that, counts = counts, goal.counts(chooser)
        if np.array_equal(before_that, counts):
            break
        made = _cut_and_prove(prepared, goal, counts)
        if timing is None or timing.keeps_promise(made.model, counts):
            break
    plan, pruned = made.plan, made.model
    warnings = list(prepared.warnings)
    with progress.stage("measure"):
        sessions = [runtime.session(model, spinning=True) for model in (original, pruned)]
        times: Sequence[Latency | None] = (None, None)
        if runtime.as_float32:
            warnings.append(_NOT_IN_ITS_TYPES)
        else:
            times = measure_latency(sessions, prepared.deployed, runtime, seconds=_TIMED)
        fidelity = None
        if prepared.held_out is not None:
            fidelity = measure_fidelity(
                original, pruned, prepared.held_out, chooser.at_once, runtime, sessions=sessions
            )
        sample = prepared.calibration.feeds([0])
        before = replace(prepared.before, latency_ms=times[0])
        found = findings(original, sample, replace(runtime, provider="cpu"))  # both work on as many boxes, say
        after = measures(pruned, sample, runtime, times[1], found)
        achieved = Achieved.of(before, after)
    entry = timing.entry() if timing else None
    if entry is not None:
        achieved = replace(achieved, latency=entry.measured.ratio)
        warnings += entry.doubts()
    doubts = fidelity.doubts if fidelity is not None else ()
    warnings += [*runtime.fallen, *made.notes, *doubts, *_misses(wanted, achieved, after)]
    report = Report(
        target=Target(wanted.speedup, wanted.by),
        limits=wanted.most,
        before=before,
        after=after,
        achieved=achieved,
        groups=tuple(
            GroupEntry(
                g.name, g.units, len(plan.kept[g.name]), g.producers, g.consumers, made.errors.get(g.group.index)
            )
            for g in analysis.groups
        ),
        frozen=frozen_entries(analysis),
        prunable_macs=analysis.prunable_macs,
        removed=_removed(prepared, plan),
        proof=made.proof,
        fidelity=fidelity,
        data=prepared.data,
        seed=settings.seed,
        timings=_own(shared, earlier, progress.timings),
        versions=versions(),
        hashes={"model": plan.model, "pruned": digest(pruned), "data": prepared.data.digest},
        warnings=tuple(warnings),
        options={
            "select": settings.select,
            "budget": settings.budget,
            "reconstruct": settings.reconstruct,
            "quick": settings.quick,
            "thorough": settings.thorough,
            "only": settings.only,
            "exclude": settings.exclude,
            "multiple": settings.multiple,
            "samplers": settings.samplers,
            "approximate": settings.approximate,
            "stats": None if settings.stats is None else str(settings.stats),
        },
        latency=entry,
        approximate=tuple(analysis.graph.nodes[index].label for index in approximate_nodes(analysis, plan)),
    )
    return Result(pruned, report, plan)


# ------------------------------------------------------------------------------------------------------ the parts


def _cut(network: Cuttable, counts: np.ndarray) -> onnx.ModelProto:
    """The network with the first units of every group, which takes as long as with any others."""
    kept = {g.name: tuple(range(int(n))) for g, n in zip(network.analysis.groups, counts, strict=True)}
    return network.flat.closed(rewrite(network.analysis, Plan("", kept), copies=network.flat.copies))


@dataclass(frozen=True, eq=False)
class _Proven:
    """A network that was cut, and is proven to be what it should be; with what `Fitting` says of it."""

    plan: Plan
    model: onnx.ModelProto
    proof: Proof
    errors: Mapping[int, float]
    notes: Sequence[str]


def _cut_and_prove(prepared: Prepared, goal: Aim, counts: np.ndarray) -> _Proven:
    """Choose units, fit weights, prove the cut, and make the model."""
    analysis, network = prepared.analysis, prepared.network
    fitting = _fitted(prepared, goal, counts)
    arrays = fitting.arrays
    names = {info.group.index: info.name for info in analysis.groups}
    kept = {names[g]: tuple(int(i) for i in units) for g, units in sorted(fitting.kept.items())}
    plan = Plan(prepared.digest, kept)
    with prepared.progress.stage("prove"):
        spare = [name for name in network.biases if name not in arrays]
        sliced = rewrite(analysis, plan, copies=network.flat.copies)
        tried = [p.feeds for p in analysis.shapes.probes]
        proof = prove(analysis, plan, sliced, tried, prepared.runtime, network.flat.turning)
        if network.flat.branches:
            nested = network.flat.closed(sliced)
            prove_alike(network.flat.turning(sliced), nested, tried, prepared.runtime)
        pruned = rewrite(analysis, plan, arrays, network.flat.copies)
        drop_biases(pruned, spare)
        pruned = network.flat.closed(pruned)
        _check_written(pruned, prepared.original)
    return _Proven(plan, pruned, proof, fitting.errors, fitting.notes)


def _fitted(prepared: Prepared, goal: Aim, counts: np.ndarray) -> Fitting:
    """Which units stay, and the weights that go with them."""
    chooser = prepared.chooser
    if not prepared.settings.reconstruct:
        return chooser.choose(counts)
    if prepared.kept is not None:
        return chooser.fit_once(counts)
    if goal.timing is not None:  # other widths would have to be timed first
        return chooser.sweep(counts)
    return chooser.fit(counts, goal.limits, goal.choices)


def _misses(wanted: Wanted, achieved: Achieved, after: Measures) -> list[str]:
    """What was asked for and not met on the files."""
    found = []
    ratio, unit = achieved.of_unit(wanted.by), UNITS[wanted.by]
    tight = not wanted.most  # another limit may ask for more than the ratio does
    low, high = wanted.speedup * (1 - (MISSED if wanted.by == "latency" else 1e-9)), wanted.speedup * SLACK
    if ratio is not None and not (low <= ratio and (ratio <= high or not tight)):
        how = "measured" if wanted.by == "latency" else "counted"
        asked = f"asked for {wanted.speedup:g}x in {unit}, {how} {ratio:.3g}x"
        found.append(f"{asked}: no widths were found that come closer and lose no more")
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


def _removed(prepared: Prepared, plan: Plan) -> dict[str, dict[int, tuple[int, ...]]]:
    """Removed positions of stored tensors, by the names that the original has.

    Of a tensor and its aliases (Identity) that lost different positions, all are named, if need be with nothing
    removed: each stands for itself. A tensor that several operators read under one name and that was not cut alike for
    all of them is left out: its name does not say what was removed.
    """
    analysis, original, network = prepared.analysis, prepared.graph, prepared.network
    graph = analysis.graph
    known = {*original.stored_names(), *original.computed_from_constants, *network.flat.names.values()}
    found: dict[str, dict[int, tuple[int, ...]]] = {}
    own = network.flat.names
    for (tensor, axis), gone in sorted(removed_positions(analysis, plan).items()):
        if graph.is_stored(tensor) and tensor not in network.biases:
            found.setdefault(own.get(tensor, tensor), {})[axis] = tuple(int(i) for i in gone)
    for node in original.nodes:
        alias, source = node.outputs[0], node.inputs[0] if node.inputs else ""
        if node.op == "Identity" and graph.is_stored(alias) and found.get(alias) != found.get(source):
            found.setdefault(alias, {})
        if node.op == "Transpose" and alias in found and graph.is_stored(alias) and original.is_stored(source):
            order = node.attributes.get("perm", range(len(graph.stored(alias).dims))[::-1])
            if found.get(source) == {order[axis]: gone for axis, gone in found[alias].items()}:
                del found[alias]  # follows from what it was turned from, which others read as well
    copies = network.flat.copies
    uneven = {origin for copy, origin in copies.items() if found.get(copy) != found.get(origin)}
    for node in graph.nodes:  # what integers stand for, where a zero in the file is not one, or they are not cut alike
        source = node.inputs[0] if node.op == "DequantizeLinear" else ""
        if source in found and (source in graph.zero_points or copies.get(source, source) in uneven):
            found[node.outputs[0]] = found[source]
    made = {name: axes for name, axes in found.items() if name not in known}
    if made and prepared.original.functions:  # which may turn what they are given
        inlined = Graph(inline_local_functions(prepared.original), original.folder)
        found = {**origins(inlined, made, prepared.runtime), **found}
        known |= set(inlined.stored_names())  # what functions store is called as in the model with functions inlined
    return {name: axes for name, axes in found.items() if name in known - uneven}


def _own(shared: Mapping[str, float], earlier: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    """Seconds of the stages of one member: those of all before it are shared, those of other members left out."""
    return {
        name: shared.get(name, 0.0) + seconds - earlier.get(name, 0.0)
        for name, seconds in now.items()
        if name in shared or seconds > earlier.get(name, 0.0)
    }
