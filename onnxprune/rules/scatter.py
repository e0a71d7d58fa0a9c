"""Operators that pick, sort, place or sample along some axes and carry the others."""

from __future__ import annotations

import numpy as np

from onnxprune.axes import IndexMap, Refusal, Relation, parse
from onnxprune.rules.base import FIRST, Kept, OpView, Repair, Row, Sizes, Table, add, letters, relate
from onnxprune.rules.contract import mend_group


def _along_one(op: OpView) -> Relation | Refusal:
    """CumSum, CumProd: the values along one axis are added up."""
    axis = op.value(1)
    if axis is None:
        return Refusal(f"{op.op} along an axis that is computed at run time")
    text = _marked(op, {int(axis.ravel()[0]) % len(op.in_shape(0))})
    return relate([text], [text])


def _marked(op: OpView, mixed: set[int]) -> str:
    return " ".join(f"!{n}" if k in mixed else n for k, n in enumerate(letters(op.in_shape(0))))


def _arg(op: OpView) -> Relation | Refusal:
    """The other axes; the one that is searched is mixed."""
    axis = op.axis(0)
    names = letters(op.in_shape(0))
    keep = op.attributes.get("keepdims", 1)
    result = " ".join("1" if k == axis else n for k, n in enumerate(names) if keep or k != axis)
    return relate([_marked(op, {axis})], [result])


def _top_k(op: OpView) -> Relation | Refusal:
    """The other axes; the sorted one is mixed."""
    axis = op.axis(-1)
    result = " ".join("1" if k == axis else n for k, n in enumerate(letters(op.in_shape(0))))
    return relate([_marked(op, {axis})], [result, result])


def _shared(first: Sizes | None, second: Sizes | None, axis: int, *more: Sizes | None) -> list[str]:
    """A letter per axis where the operands have the same size, unclaimed where they do not, ``@`` at the axis."""
    names = []
    for k, (a, b) in enumerate(zip(first or [], second or [], strict=True)):
        same = a == b and all(other is not None and other[k] == a for other in more)
        names.append("@" if k == axis else f"a{k}" if same else "1")
    return names


def _fill(names: list[str], token: str) -> str:
    return " ".join(token if n == "@" else n for n in names)


def _gather_elements(op: OpView) -> Relation | Refusal:
    """Axes of equal size; the one that is gathered along is mixed."""
    names = _shared(op.in_sizes[0], op.in_sizes[1], op.axis(0))
    return relate([_fill(names, "!d"), _fill(names, "i")], [_fill(names, "i")])


def _scatter_elements(op: OpView) -> Relation | Refusal:
    """Axes of equal size; the one that is scattered along is mixed."""
    names = _shared(op.in_sizes[0], op.in_sizes[1], op.axis(0))
    data = _fill(names, "!d")
    return relate([data, _fill(names, "!i"), _fill(names, "!i")], [data])


def _gather_nd(op: OpView) -> Relation | Refusal:
    """Batch axes and the axes behind the indexed ones; the indexed ones are mixed."""
    batch, depth = int(op.attributes.get("batch_dims", 0)), op.in_shape(1)[-1]
    data = letters(op.in_shape(0))
    index = [*data[:batch], *letters(op.in_shape(1), "i")[batch:-1]]
    inner = [f"!{n}" for n in data[batch : batch + depth]]
    rest = data[batch + depth :]
    source = " ".join([*data[:batch], *inner, *rest])
    return relate([source, " ".join([*index, "1"])], [" ".join([*index, *rest])])


def _whole_axes(op: OpView) -> dict[int, int]:
    """Of indices that place a block: the axes that it covers from end to end, each with the indices' axis along it."""
    indices = op.value(1)
    if indices is None:
        return {}
    found = {}
    for axis in range(indices.shape[-1]):
        size = op.in_shape(0)[axis]
        for along in range(indices.ndim - 1):
            shape = [size if k == along else 1 for k in range(indices.ndim - 1)]
            fits = size > 1 and indices.shape[along] == size
            if fits and (indices[..., axis] == np.arange(size).reshape(shape)).all():
                found[axis] = along
    return found


def _scatter_nd(op: OpView) -> Relation | Refusal:
    """The axes behind the indexed ones, and those that a block covers from end to end; the others are mixed."""
    depth, whole = op.in_shape(1)[-1], _whole_axes(op)
    data = [n if k >= depth or k in whole else f"!{n}" for k, n in enumerate(letters(op.in_shape(0)))]
    rows = [f"!{n}" for n in letters(op.in_shape(1), "i")[:-1]]
    for axis, along in whole.items():
        rows[along] = data[axis]
    return relate([" ".join(data), "*", " ".join([*rows, *data[depth:]])], [" ".join(data)])


def _mend_scatter_nd(op: OpView, kept: Kept) -> Repair:
    """Indices."""
    indices = op.value(1)
    cut = {axis: along for axis, along in _whole_axes(op).items() if kept.inputs[0][axis] is not None}
    if indices is None or not cut:
        return Repair()
    for axis, along in cut.items():
        size = kept.in_size(op, 0, axis)
        indices = np.take(indices, np.arange(size), axis=along)  # counted from zero: what is left is a block again
    return Repair(inputs={1: indices})


def _taken(op: OpView) -> np.ndarray | None:
    """Which positions of its axis a Compress takes, where a stored condition says so."""
    condition = op.value(1) if "axis" in op.attributes else None
    return None if condition is None else np.flatnonzero(condition)


def _compress(op: OpView) -> Relation | Refusal:
    """Position by position where the condition is stored; else the axis, or all of them, are mixed."""
    names, position = letters(op.in_shape(0)), _taken(op)
    if "axis" not in op.attributes:
        return relate([_marked(op, set(range(len(names)))), "*"], ["1"])
    axis = op.axis(0)
    if position is None:
        return relate([_marked(op, {axis}), "*"], [" ".join("1" if k == axis else n for k, n in enumerate(names))])
    text = " ".join("@" if k == axis else n for k, n in enumerate(names))
    return relate([text, "*"], [text], (IndexMap(0, axis, axis, np.zeros(len(position), np.int64), position),))


def _mend_compress(op: OpView, kept: Kept) -> Repair:
    """Condition."""
    position, left = _taken(op), kept.inputs[0][op.axis(0)]
    return Repair() if position is None or left is None else Repair(inputs={1: np.isin(left, position)})


def _one_hot(op: OpView) -> Relation | Refusal:
    """The indices' axes; the new one stays."""
    names = letters(op.in_shape(0))
    axis = op.axis(-1, rank=len(names) + 1)
    return relate([" ".join(names), "*", "*"], [" ".join([*names[:axis], "1", *names[axis:]])])


def _reverse(op: OpView) -> Relation | Refusal:
    """The same axes; that of time is mixed."""
    batch, time = int(op.attributes.get("batch_axis", 1)), int(op.attributes.get("time_axis", 0))
    return relate([_marked(op, {time}), f"a{batch}"], [_marked(op, {time})])


def _trilu(op: OpView) -> Relation | Refusal:
    """The same axes; the last two are mixed."""
    rank = len(op.in_shape(0))
    text = _marked(op, {rank - 2, rank - 1})
    return relate([text], [text])


def _det(op: OpView) -> Relation | Refusal:
    """The axes before the matrices."""
    names = letters(op.in_shape(0))[:-2]
    return relate([" ".join([*names, "1", "1"])], [" ".join(names)])


def _col2im(op: OpView) -> Relation | Refusal:
    """`n (c !k) 1 -> n c 1 1`"""
    if op.value(2) is None:
        return Refusal("Col2Im with a block that is computed at run time")
    return relate(["n (c !k) 1", "*", "*"], [" ".join(["n", "c"] + ["1"] * (len(op.out_shape()) - 2))])


def _col2im_block(op: OpView) -> dict[str, int]:
    block = op.value(2)
    return {} if block is None else {"k": int(block.prod())}


def _deform_conv(op: OpView) -> Relation | Refusal:
    """`n (g c) *, (g o) c *, n *, (g o), n * -> n (g o) *`, with one group of offsets"""
    if int(op.attributes.get("offset_group", 1)) != 1:
        return Refusal("DeformConv with several groups of offsets")
    c = "c" if op.constant[1] else "~c"
    return parse(f"n (g {c}) *, (g o) {c} *, n *, (g o), n * -> n (g o) *")


def _group(op: OpView) -> dict[str, int]:
    return {"g": int(op.attributes.get("group", 1))}


def _constant_of_shape(op: OpView) -> Relation | Refusal:
    """Every axis may be cut."""
    return relate(["*"], [" ".join(letters(op.out_shape()))])


def _mend_constant_of_shape(op: OpView, kept: Kept) -> Repair:
    """Sizes."""
    target = op.seen[0]
    if target is None:
        return Repair()
    new = target.copy()
    for axis in range(len(new)):
        new[axis] = kept.out_size(op, 0, axis)
    return Repair(inputs={0: new})


def _zero_of_constant(op: OpView) -> tuple[tuple[int, ...], ...]:
    value = op.attributes.get("value")
    array = getattr(value, "values", value)  # a tensor, or nothing for zeros
    return ((),) if array is None or not np.any(array) else ()


def register(table: Table) -> None:
    """Add the rows of this file."""
    add(table, "CumProd CumSum", Row(_along_one, zero=FIRST))
    add(table, "ArgMax ArgMin", Row(_arg))
    add(table, "TopK", Row(_top_k))
    add(table, "GatherElements", Row(_gather_elements, zero=FIRST))
    add(table, "GatherND", Row(_gather_nd, zero=FIRST))
    add(table, "Scatter ScatterElements", Row(_scatter_elements, zero=((0, 2),)))
    add(table, "ScatterND", Row(_scatter_nd, repair=_mend_scatter_nd, zero=((0, 2),)))
    add(table, "Compress", Row(_compress, repair=_mend_compress, zero=FIRST))
    add(table, "OneHot", Row(_one_hot))
    add(table, "ReverseSequence", Row(_reverse, zero=FIRST))
    add(table, "Trilu", Row(_trilu, zero=FIRST))
    add(table, "Det", Row(_det))
    add(table, "GridSample", Row("n c *, n * -> n c *", zero=FIRST))
    add(table, "RoiAlign", Row("1 c 1 1, r 1, r -> r c 1 1", zero=FIRST))
    add(table, "MaxRoiPool", Row("1 c 1 1, r 1 -> r c 1 1", zero=FIRST))
    add(table, "Col2Im", Row(_col2im, sizes=_col2im_block, zero=FIRST))
    add(table, "DeformConv", Row(_deform_conv, repair=mend_group, sizes=_group, weights=(1, 3), zero=((1, 3),)))
    add(table, "ConstantOfShape", Row(_constant_of_shape, repair=_mend_constant_of_shape, zero=_zero_of_constant))
