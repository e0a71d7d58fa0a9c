"""Normalisations and reductions, pooling among them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from onnxprune.axes import Refusal, Relation
from onnxprune.rules.base import FIRST, Kept, OpView, Repair, Row, Table, add, letters, relate

SUMS = "ReduceL1 ReduceL2 ReduceSum ReduceSumSquare"
MIXTURES = "ReduceMax ReduceMin ReduceProd"


def _batch_normalization(op: OpView) -> Relation | Refusal:
    """`n c *, c, c, c, c -> n c *`; in training mode left alone"""
    if op.attributes.get("training_mode", 0) or len([s for s in op.out_sizes if s is not None]) > 1:
        return Refusal("BatchNormalization in training mode mixes the batch")
    names = letters(op.in_shape(0))
    vector = names[1] if len(names) > 1 else "c"
    return relate([" ".join(names), *[vector] * 4], [" ".join(names)])


def _reduced_axes(op: OpView) -> set[int] | None:
    """The axes that are reduced; None where they are computed at run time."""
    rank = len(op.in_shape(0))
    given = op.value(1, "axes")
    if given is None and op.has(1):
        return None
    axes = {int(a) % rank for a in given.ravel()} if given is not None else set()
    return axes or (set() if op.attributes.get("noop_with_empty_axes", 0) else set(range(rank)))


def _mend_mean(op: OpView, kept: Kept) -> Repair:
    """A factor: the removed positions, zero as they were, go on being counted."""
    axes = _reduced_axes(op) or set()
    return Repair(factor=math.prod(kept.in_size(op, 0, axis) / op.in_shape(0)[axis] for axis in axes))


def _reduce(op: OpView) -> Relation | Refusal:
    """The axes that are left; reduced ones are summed (`~`) or mixed (`!`)."""
    axes = _reduced_axes(op)
    if axes is None:
        return Refusal(f"{op.op} over axes that are computed at run time")
    names = letters(op.in_shape(0))
    keep = bool(op.attributes.get("keepdims", 1))
    mark = "~" if op.op in (*SUMS.split(), "ReduceMean", "ReduceLogSum") else "!"
    source = " ".join(f"{mark}{n}" if k in axes else n for k, n in enumerate(names))
    result = " ".join("1" if k in axes else n for k, n in enumerate(names) if keep or k not in axes)
    return relate([source], [result])


def _softmax(op: OpView) -> Relation | Refusal:
    """The same axes; the normalised one is mixed."""
    rank = len(op.in_shape(0))
    names = letters(op.in_shape(0))
    if op.version < 13:  # everything from the axis on is flattened into one distribution
        first = op.axis(1)
        mixed = set(range(first, rank))
    else:
        mixed = {op.axis(-1)}
    text = " ".join(f"!{n}" if k in mixed else n for k, n in enumerate(names))
    return relate([text], [text])


def _instance_normalization(op: OpView) -> Relation | Refusal:
    """`n c !*, c, c -> n c !*`"""
    names = letters(op.in_shape(0))
    full = " ".join([*names[:2], *(f"!{n}" for n in names[2:])])
    return relate([full, names[1], names[1]], [full])


def _layer_normalization(op: OpView) -> Relation | Refusal:
    """`... !d, !d, !d -> ... !d`"""
    names = letters(op.in_shape(0))
    first = op.axis(-1)
    full = [f"!{n}" if k >= first else n for k, n in enumerate(names)]
    vectors = [_aligned(op, k, full) for k in range(1, len(op.in_sizes))]
    outputs = ["" if s is None else " ".join(full) if k == 0 else "*" for k, s in enumerate(op.out_sizes)]
    return relate([" ".join(full), *vectors], outputs)


def _aligned(op: OpView, k: int, full: list[str]) -> str:
    """The axes of an operand that is broadcast to the first one; empty where it is absent."""
    if not op.has(k):
        return ""
    small, shape = op.in_shape(k), op.in_shape(0)
    tail = zip(small, shape[len(shape) - len(small) :], full[len(full) - len(small) :], strict=True)
    return " ".join(name if size == whole else "1" for size, whole, name in tail)


def _group_sizes(op: OpView) -> dict[str, int]:
    return {"g": int(op.attributes["num_groups"])}


def _scaled(op: OpView, kept: Kept, scale: int, share: float) -> Repair:
    """Make up for a variance that is taken of this share of the positions, the others being zero.

    With them the variance would be ``share`` times as large; what the mean adds to it is left out.
    """
    values = op.value(scale)
    if share == 1 or values is None:  # computed in the model: the variance of what is left has to do
        return Repair()
    for axis, left in enumerate(kept.inputs[scale]):
        values = values if left is None else np.take(values, left, axis)
    epsilon = {k: v / share for k, v in op.attributes.items() if k == "epsilon"}
    return Repair(attributes=epsilon, inputs={scale: (values / math.sqrt(share)).astype(values.dtype)})


def _share(op: OpView, kept: Kept, first: int) -> float:
    """The share of positions that is left, of the axes from the first on."""
    shape = op.in_shape(0)
    return math.prod(kept.in_size(op, 0, axis) / shape[axis] for axis in range(first, len(shape)))


def _mend_layer(op: OpView, kept: Kept) -> Repair:
    """Scale and epsilon, where channels go: as if they were zero."""
    return _scaled(op, kept, 1, _share(op, kept, op.axis(-1)))


def _mend_instance(op: OpView, kept: Kept) -> Repair:
    """Scale and epsilon, where positions go: as if they were zero."""
    return _scaled(op, kept, 1, _share(op, kept, 2))


def _mend_skip(op: OpView, kept: Kept) -> Repair:
    """Scale and epsilon, where channels go: as if they were zero."""
    return _scaled(op, kept, 2, _share(op, kept, len(op.in_shape(0)) - 1))


def _mend_groups(op: OpView, kept: Kept) -> Repair:
    """The number of groups; scale and epsilon, where channels of every group go."""
    left = kept.inputs[0][1]
    if left is None:
        return Repair()
    per_group = op.in_shape(0)[1] // int(op.attributes["num_groups"])
    groups = len(np.unique(left // per_group))
    scaled = _scaled(op, kept, 1, len(left) / (groups * per_group))
    return Repair(attributes={"num_groups": groups, **scaled.attributes}, inputs=scaled.inputs)


def _normalised_axes(op: OpView) -> set[int]:
    return {int(a) % len(op.in_shape(0)) for a in op.attributes.get("axes", (0, 2, 3))}


def _mend_mean_variance(op: OpView, kept: Kept) -> Repair:
    """A factor, where channels go: as if they were zero."""
    share = math.prod(kept.in_size(op, 0, axis) / op.in_shape(0)[axis] for axis in _normalised_axes(op))
    return Repair(factor=share**-0.5)


def _mean_variance(op: OpView) -> Relation | Refusal:
    """The same axes; the normalised ones are mixed."""
    axes = _normalised_axes(op)
    text = " ".join(f"!{n}" if k in axes else n for k, n in enumerate(letters(op.in_shape(0))))
    return relate([text], [text])


def _lp_normalization(op: OpView) -> Relation | Refusal:
    """The same axes; the normalised one is mixed."""
    axis = op.axis(-1)
    text = " ".join(f"!{n}" if k == axis else n for k, n in enumerate(letters(op.in_shape(0))))
    return relate([text], [text])


def _skip_normalization(op: OpView) -> Relation | Refusal:
    """The sum of two inputs (and a bias), normalised over the last axis; the sum itself may be an output too."""
    names = letters(op.in_shape(0))
    names[-1] = f"!{names[-1]}"
    others = [_aligned(op, k, names) for k in range(1, len(op.in_sizes))]
    full = " ".join(names)
    outputs = ["" if s is None else full if k in (0, 3) else "*" for k, s in enumerate(op.out_sizes)]
    return relate([full, *others], outputs)


def _spatial_pool(op: OpView) -> Relation | Refusal:
    """`n c * -> n c *`; with indices left alone"""
    if len(op.out_sizes) > 1 and op.out_sizes[1] is not None:
        return Refusal("MaxPool returns flat indices, which count the channels")
    return relate(["n c *"], ["n c *"])


def register(table: Table) -> None:
    """Add the rows of this file."""
    # a channel whose scale and bias are zero comes out as zero, whatever its mean and variance
    add(table, "BatchNormalization", Row(_batch_normalization, weights=(1, 2), zero=((1, 2),)))
    instance = Row(_instance_normalization, repair=_mend_instance, weights=(1, 2), zero=((1, 2),), approximable=True)
    add(table, "InstanceNormalization", instance)
    # the older sets have none of their own, and onnxruntime's optimizer puts it there all the same
    layer = Row(_layer_normalization, repair=_mend_layer, weights=(1, 2), zero=((1, 2),), approximable=True)
    add(table, "LayerNormalization SimplifiedLayerNormalization", layer)
    add(table, "RMSNormalization", replace(layer, since=23))
    skip = Row(_skip_normalization, repair=_mend_skip, weights=(2, 3), approximable=True)
    add(table, "SkipLayerNormalization SkipSimplifiedLayerNormalization", skip, domain="com.microsoft")
    for since, vector in ((18, "g"), (21, "(g !c)")):
        by_group = Row(
            f"n (g !c) *, {vector}, {vector} -> n (g !c) *",
            since=since,
            repair=_mend_groups,
            sizes=_group_sizes,
            weights=(1, 2),
            zero=((1, 2),),
            approximable=True,
        )
        add(table, "GroupNormalization", by_group)
    by_variance = Row(_mean_variance, repair=_mend_mean_variance, zero=FIRST, approximable=True, poles=(0,))
    add(table, "MeanVarianceNormalization", by_variance)
    add(table, "LpNormalization", Row(_lp_normalization, zero=FIRST, approximable=True))
    add(table, "LRN", Row("n !c * -> n !c *", zero=FIRST, approximable=True))
    add(table, "Softmax LogSoftmax Hardmax", Row(_softmax))
    add(table, f"{SUMS} {MIXTURES}", Row(_reduce, zero=FIRST))
    add(table, "ReduceMean", Row(_reduce, repair=_mend_mean, zero=FIRST, approximable=True))
    add(table, "ReduceLogSum ReduceLogSumExp", Row(_reduce))
    add(table, "AveragePool LpPool MaxPool", Row(_spatial_pool, zero=FIRST))
    add(table, "GlobalAveragePool GlobalLpPool GlobalMaxPool", Row("n c * -> n c *", zero=FIRST))
