"""Normalisations and reductions, pooling among them."""

from __future__ import annotations

import math

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


def _layer_normalization(op: OpView) -> Relation | Refusal:
    """`... !d, !d, !d -> ... !d`"""
    names = letters(op.in_shape(0))
    first = op.axis(-1)
    full = [f"!{n}" if k >= first else n for k, n in enumerate(names)]
    return relate([" ".join(full)], [" ".join(full)])


def _group_sizes(op: OpView) -> dict[str, int]:
    return {"g": int(op.attributes["num_groups"])}


def _mend_groups(op: OpView, kept: Kept) -> Repair:
    """The number of groups."""
    per_group = op.in_shape(0)[1] // int(op.attributes["num_groups"])
    return Repair(attributes={"num_groups": kept.in_size(op, 0, 1) // per_group})


def _mean_variance(op: OpView) -> Relation | Refusal:
    """The same axes; the normalised ones are mixed."""
    axes = {int(a) % len(op.in_shape(0)) for a in op.attributes.get("axes", (0, 2, 3))}
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
    shape, skip = op.in_shape(0), op.in_shape(1)
    tail = zip(skip, shape[len(shape) - len(skip) :], names[len(shape) - len(skip) :], strict=True)
    other = " ".join(n if a == b else "1" for a, b, n in tail)
    vectors = [names[-1] if op.has(k) else "" for k in range(2, len(op.in_sizes))]
    full = " ".join(names)
    outputs = ["" if s is None else full if k in (0, 3) else "*" for k, s in enumerate(op.out_sizes)]
    return relate([full, other, *vectors], outputs)


def _spatial_pool(op: OpView) -> Relation | Refusal:
    """`n c * -> n c *`; with indices left alone"""
    if len(op.out_sizes) > 1 and op.out_sizes[1] is not None:
        return Refusal("MaxPool returns flat indices, which count the channels")
    return relate(["n c *"], ["n c *"])


def register(table: Table) -> None:
    """Add the rows of this file."""
    # a channel whose scale and bias are zero comes out as zero, whatever its mean and variance
    add(table, "BatchNormalization", Row(_batch_normalization, weights=(1, 2), zero=((1, 2),)))
    add(table, "InstanceNormalization", Row("n c *, c, c -> n c *", weights=(1, 2), zero=((1, 2),)))
    # the older sets have none of their own, and onnxruntime's optimizer puts it there all the same
    add(table, "LayerNormalization SimplifiedLayerNormalization", Row(_layer_normalization))
    add(table, "RMSNormalization", Row(_layer_normalization, since=23))
    skip = Row(_skip_normalization)
    add(table, "SkipLayerNormalization SkipSimplifiedLayerNormalization", skip, domain="com.microsoft")
    for since, vector in ((18, "g"), (21, "(g !c)")):
        text = f"n (g !c) *, {vector}, {vector} -> n (g !c) *"
        by_group = Row(text, since=since, repair=_mend_groups, sizes=_group_sizes, weights=(1, 2), zero=((1, 2),))
        add(table, "GroupNormalization", by_group)
    add(table, "MeanVarianceNormalization", Row(_mean_variance, zero=FIRST))
    add(table, "LpNormalization", Row(_lp_normalization))
    add(table, "LRN", Row("n !c * -> n !c *", zero=FIRST))
    add(table, "Softmax LogSoftmax Hardmax", Row(_softmax))
    add(table, f"{SUMS} {MIXTURES}", Row(_reduce, zero=FIRST))
    add(table, "ReduceMean", Row(_reduce, repair=_mend_mean, zero=FIRST))
    add(table, "ReduceLogSum ReduceLogSumExp", Row(_reduce))
    add(table, "AveragePool LpPool MaxPool", Row(_spatial_pool, zero=FIRST))
    add(table, "GlobalAveragePool GlobalLpPool GlobalMaxPool", Row("n c * -> n c *", zero=FIRST))
