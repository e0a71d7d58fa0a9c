"""Proof before writing: the cut model must compute what the original computes with the removed channels silenced.

Sums over fewer channels are rounded otherwise, and some networks make much of that. What differs by more than rounding
does as a rule is compared with what a few roundings of the weights do to it in the silenced original.

Where normalised axes were allowed to shrink (``approximate``), the nodes that take a statistic of fewer channels give
something else on purpose. They are checked for shapes and finite values; all the others are compared as ever, the
silenced original being given what those nodes give in the cut model, with zeros for the channels that went.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from onnxprune.analysis import Analysis
from onnxprune.errors import InputError, InternalError
from onnxprune.graph import Graph, Node
from onnxprune.plan import Plan, approximate_nodes, removed_positions
from onnxprune.precision import NARROW, types, without_rounding
from onnxprune.probe import Feeds, size_nodes
from onnxprune.runtime import Runtime, expose, in_slices
from onnxprune.tensors import array_of, graphs, stored

_PIECE = 1 << 20  # elements that are compared at once
_TINY = 1e-2  # tensors smaller than this all over are compared absolutely (saturated gates)
_RANKING = frozenset({"TopK", "NonMaxSuppression", "ArgMax", "ArgMin", "NonZero"})  # a tie may fall either way
_FORCED = "onnxprune/taken"  # the name of a condition that stands in for all others
_ALIKE = 1e-6
_TOLERANCE = {"float32": 1e-4, "float64": 1e-6, "float16": 2e-2}
_SHAKEN = 2.0**-22  # of every weight in float32, at random: a few roundings
_ROUNDING = 4.0  # times what that does to a tensor, it may differ (scores of thousands in front of a softmax, say)
_UNCLEAR = 1e-2  # of its largest value, not even then


@dataclass(frozen=True)
class Proof:
    """Largest difference found, relative to the largest value of the tensor it was found in."""

    max_relative_difference: float
    tensor: str
    compared: int
    inputs: str


def prove(
    analysis: Analysis,
    plan: Plan,
    cut: onnx.ModelProto,
    feeds: list[Feeds],
    runtime: Runtime,
    close: Callable[[onnx.ModelProto], onnx.ModelProto] | None = None,
) -> Proof:
    """Compare the cut model (with sliced, not reconstructed weights) with the silenced original, inside and out.

    Whatever the data say, every `If` takes either branch as well, wherever the original then runs.

    Args:
        analysis: of the original.
        plan: what was removed.
        cut: the model that was rewritten from the plan.
        feeds: inputs to try.
        runtime: its number of threads, and whether it runs models in float32; the proof runs on the CPU.
        close: puts bodies back, of models that do not run without.

    Raises:
        InternalError: the two differ; the model must not be written.
    """
    graph, whole, how = analysis.graph, silence(analysis, plan), ""
    if close is not None:
        whole, cut = close(whole), close(cut)
    names = [name for node in graph.nodes for name in node.outputs if name]
    have = {name for node in cut.graph.node for name in node.output}
    shared = [name for name in names if name in have]
    approximate = [graph.nodes[index] for index in approximate_nodes(analysis, plan)]
    replaced = [name for node in approximate for name in node.outputs if name in have]
    if approximate:
        whole = _given_outputs(whole, approximate, analysis)
        how = f"; {len(approximate)} nodes take a statistic of fewer channels, and are checked for finite values only"
    plain = [without_rounding(model, analysis.shapes.probes[0].shapes) for model in (whole, cut)]
    if plain[0] is not whole and plain[1] is not cut:
        (whole, cut) = plain
        how += "; values between QuantizeLinear and DequantizeLinear scaled, but not rounded"
    runtime = _suited([whole, cut], replace(runtime, provider="cpu"))
    repaired = {name for node in approximate for name in node.inputs if graph.is_stored(name)}
    probes = analysis.shapes.probes
    bulk = {  # bytes of the tensors of both models, at the larger of the sizes
        name: 8 * max((math.prod(p.shapes[name]) for p in probes if name in p.shapes), default=0)
        for name in shared
        if name not in replaced and name not in repaired
    }

    if runtime.as_float32:
        how += "; in float32 copies of both models"
    skip = _after_a_ranking(graph)
    inside = size_nodes(graph, probes)[1]
    sizes = {name for index in inside for name in graph.nodes[index].outputs}
    worst, where, compared, rounded = 0.0, "", 0, set()
    lost = "with the other branch taken, the original runs and the cut model does not"
    for silent, new, feed in _either_way(whole, cut, feeds, runtime, lost):
        given = _widened(analysis, plan, dict(zip(replaced, _run(new, replaced, feed, runtime), strict=True)))
        if given is None:
            continue
        first = (silent, {**feed, **given})
        both = functools.partial(_side_by_side, runtime, first, (new, feed))
        for name, (a, b) in in_slices(bulk, both):
            if name in skip or not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray):
                continue
            if name in graph.outputs and (a.shape != b.shape or a.dtype != b.dtype):
                raise InternalError(f"output {name!r} changed from {a.dtype}{a.shape} to {b.dtype}{b.shape}")
            if name in sizes:  # those inside follow the channels
                if name in graph.outputs and not np.array_equal(a, b):
                    raise InternalError(
                        f"output {name!r}, a size, changed; nothing was written. Please report the model"
                    )
                continue
            if a.shape != b.shape or a.dtype.kind != "f":
                continue
            compared += 1
            gap = difference(a, b)
            if gap > worst:
                worst, where = gap, name
            if gap > _TOLERANCE.get(str(a.dtype), 2e-2):
                if gap > _by_rounding(name, a, first, runtime):
                    raise InternalError(
                        f"the proof failed: {name!r} differs by {gap:.1e} of its largest value from the original with"
                        " the removed channels silenced; nothing was written. Please report the model"
                    )
                rounded.add(name)
    if rounded:
        how += f"; {len(rounded)} tensors by no more than a few roundings of the weights move them"
    return Proof(worst, where, compared, f"{len(feeds)} batches, every inner tensor that kept its shape{how}")


def prove_alike(flat: onnx.ModelProto, nested: onnx.ModelProto, feeds: list[Feeds], runtime: Runtime) -> None:
    """Compare the cut model with itself after its branches were put back: they compute the same, whichever are taken.

    Raises:
        InternalError: they do not.
    """
    runtime = _suited([flat, nested], replace(runtime, provider="cpu"))
    have = {name for node in nested.graph.node for name in node.output}
    names = [name for node in flat.graph.node for name in node.output if name in have - {""}]
    lost = "the model does not run any more when its branches are put back"
    for open_, closed, feed in _either_way(flat, nested, feeds, runtime, lost):
        first, second = (_run(model, names, feed, runtime) for model in (open_, closed))
        for name, a, b in zip(names, first, second, strict=True):
            if isinstance(a, np.ndarray) and a.dtype.kind == "f":
                alike = a.shape == b.shape and difference(a, b) < _ALIKE
            else:
                alike = not isinstance(a, np.ndarray) or np.array_equal(a, b)
            if not alike:
                raise InternalError(
                    f"the proof failed: {name!r} changes when branches are put back; nothing was written. Please"
                    " report the model"
                )


def _either_way(
    first: onnx.ModelProto, second: onnx.ModelProto, feeds: Sequence[Feeds], runtime: Runtime, lost: str
) -> Iterator[tuple[onnx.ModelProto, onnx.ModelProto, Feeds]]:
    """Two models and inputs: as they are, and with every `If` taking the same branch, wherever the first one then runs.

    (It does not where its inputs are not all among the feeds, as those of approximate nodes.)

    Raises:
        InternalError: the second one does not run then (``lost``).
    """
    yield from ((first, second, feed) for feed in feeds)
    ifs = any(_is_if(node) for graph in graphs(first) for node in graph.node)
    for taken in (True, False) if ifs else ():
        one, other = _taking(first, taken), _taking(second, taken)
        for feed in feeds:
            if not _runs(one, feed, runtime):
                continue
            if not _runs(other, feed, runtime):
                raise InternalError(f"the proof failed: {lost}; nothing was written. Please report the model")
            yield one, other, feed


def _taking(model: onnx.ModelProto, taken: bool) -> onnx.ModelProto:
    """A copy in which every `If` takes the same branch."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.initializer.append(numpy_helper.from_array(np.array(taken), _FORCED))
    for graph in graphs(copy):
        for node in filter(_is_if, graph.node):
            node.input[0] = _FORCED
    return copy


def _is_if(node: onnx.NodeProto) -> bool:
    return node.op_type == "If" and node.domain in ("", "ai.onnx")


def _runs(model: onnx.ModelProto, feed: Feeds, runtime: Runtime) -> bool:
    """Whether a model runs: the data need not be meant for the branches that it takes."""
    try:
        _run(model, [value.name for value in model.graph.output], feed, runtime)
    except Exception:  # onnxruntime's errors share no base class
        return False
    return True


def _run(model: onnx.ModelProto, names: Sequence[str], feed: Feeds, runtime: Runtime) -> list[Any]:
    """What a model gives for some tensors, as it stands."""
    return list(runtime.session(expose(model, names), optimise=False).run(names, dict(feed))) if names else []


def _by_rounding(name: str, array: np.ndarray, of: tuple[onnx.ModelProto, Feeds], runtime: Runtime) -> float:
    """How far a tensor of a model may be from what it is for no other reason than rounding."""
    rng, shaken = np.random.default_rng(0), onnx.ModelProto()
    shaken.CopyFrom(of[0])
    for tensor in shaken.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            values = array_of(tensor)
            turned = values * (1.0 + _SHAKEN * rng.standard_normal(values.shape))
            tensor.CopyFrom(stored(turned.astype(np.float32), tensor))
    return min(_ROUNDING * difference(array, _run(shaken, [name], of[1], runtime)[0]), _UNCLEAR)


def _side_by_side(
    runtime: Runtime,
    first: tuple[onnx.ModelProto, Feeds],
    second: tuple[onnx.ModelProto, Feeds],
    names: Sequence[str],
) -> list[tuple[Any, Any]]:
    """What two models give for some tensors."""
    return list(zip(*(_run(model, names, feed, runtime) for model, feed in (first, second)), strict=True))


def _suited(models: Sequence[onnx.ModelProto], runtime: Runtime) -> Runtime:
    """A runtime in float32 where the models' own type would hide small differences."""
    if not runtime.as_float32 and types(models[0]) & NARROW:
        with contextlib.suppress(InputError):  # operators that there are for float16 alone
            wide = replace(runtime, as_float32=True)
            for model in models:
                wide.session(model, optimise=False)
            return wide
    return runtime


def _given_outputs(model: onnx.ModelProto, nodes: Sequence[Node], analysis: Analysis) -> onnx.ModelProto:
    """The model with inputs in place of what these nodes give."""
    types = analysis.shapes.probes[0].types
    for index in sorted((node.index for node in nodes), reverse=True):
        del model.graph.node[index]
    names = [name for node in nodes for name in node.outputs if name]
    model.graph.input.extend(onnx.helper.make_tensor_value_info(name, types[name], None) for name in names)
    return model


def _widened(analysis: Analysis, plan: Plan, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    """Tensors of the cut model with zeros where the original has more; None at sizes that the plan does not tell.

    Raises:
        InternalError: some value is not finite.
    """
    removed = removed_positions(analysis, plan) if found else {}
    wide = {}
    for name, array in found.items():
        if not np.isfinite(array.astype(np.float64)).all():
            raise InternalError(f"{name!r} is a statistic of fewer channels, and not finite; nothing was written")
        for axis, size in enumerate(analysis.shapes.shape(name) or ()):
            gone = removed.get((name, axis))
            if gone is None:
                continue
            if array.shape[axis] != size - len(gone):  # a product with a dynamic size, at another one
                return None
            shape = (*array.shape[:axis], size, *array.shape[axis + 1 :])
            full = np.zeros(shape, array.dtype)
            full[(slice(None),) * axis + (np.delete(np.arange(size), gone),)] = array
            array = full
        wide[name] = array
    return wide


def silence(analysis: Analysis, plan: Plan) -> onnx.ModelProto:
    """The original with zeros in the removed slices of the weights that make or read a removed channel."""
    graph = analysis.graph
    removed = {axis: gone for axis, gone in removed_positions(analysis, plan).items() if axis[0] in analysis.weights}
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    protos = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            protos.update((node.output[0], a.t) for a in node.attribute if a.name == "value")
    for name in {tensor for tensor, _ in removed if tensor in protos}:
        mask = np.zeros(graph.array(name).shape, bool)
        for (tensor, axis), gone in removed.items():
            if tensor == name:
                mask[(slice(None),) * axis + (gone,)] = True
        protos[name].CopyFrom(stored(graph.silenced(name, mask), protos[name]))
    return model


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Largest absolute difference over the largest absolute value; infinite where only one of the two is finite."""
    gap, largest = 0.0, _TINY
    for start in range(0, a.size, _PIECE):  # wide copies of all would take several times the memory
        one, two = (v.reshape(-1)[start : start + _PIECE].astype(np.float64) for v in (a, b))
        finite = np.isfinite(one)
        if not np.array_equal(finite, np.isfinite(two)):
            return float("inf")
        one, two = one[finite], two[finite]
        gap = max(gap, float(np.abs(one - two).max(initial=0.0)))
        largest = max(largest, float(np.abs(one).max(initial=0.0)))
    return gap / largest


def _after_a_ranking(graph: Graph) -> set[str]:
    later: set[str] = set()
    for node in graph.nodes:
        if node.op in _RANKING or set(node.inputs) & later:
            later.update(node.outputs)
    return later
