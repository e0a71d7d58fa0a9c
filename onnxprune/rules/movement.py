"""Operators that move values without computing: reshapes, transposes, slices, concatenations, resizing.

Where positions move one by one (Concat, Split, Slice, Gather, Pad) the row gives an index map; reshapes are factored by
greatest common divisors.
"""

from __future__ import annotations

import numpy as np

from onnxprune.axes import IndexMap, Refusal, Relation, factor
from onnxprune.rules.base import (
    ALL,
    FIRST,
    Clauses,
    Kept,
    OpView,
    Repair,
    Row,
    Table,
    add,
    along,
    letters,
    relate,
)

# ------------------------------------------------------------------------------------------------ reshapes


def _reshape(op: OpView) -> Relation | Refusal:
    """The axes of both shapes, factored by their common divisors."""
    before, after = op.in_sizes[0], op.out_sizes[0]
    found = factor(before or [], after or [])
    if found is None:
        return Refusal(f"{op.op} from {op.in_shape(0)} to {op.out_shape()} does not keep whole factors of the axes")
    return relate([found[0]], [found[1]])


def _new_sizes(op: OpView, kept: Kept) -> list[int]:
    return [kept.out_size(op, 0, axis) for axis in range(len(op.out_shape()))]


def _mend_reshape(op: OpView, kept: Kept) -> Repair:
    """Zero keeps its meaning where the input's axis has the wanted size; minus one always does."""
    target = op.seen[1]
    if target is None:
        return Repair()
    new = target.copy()
    copies = not op.attributes.get("allowzero", 0)
    for axis, size in enumerate(_new_sizes(op, kept)):
        if target[axis] == 0 and copies and axis < len(op.in_shape(0)) and kept.in_size(op, 0, axis) == size:
            continue
        if target[axis] != -1:
            new[axis] = size
    return Repair(inputs={1: new})


def _transpose(op: OpView) -> Relation | Refusal:
    """The axes in another order."""
    names = letters(op.in_shape(0))
    order = op.attributes.get("perm") or list(reversed(range(len(names))))
    return relate([" ".join(names)], [" ".join(names[k] for k in order)])


def _expand(op: OpView) -> Relation | Refusal:
    """Axes that are there already are carried; an axis that is made by repeating belongs to the output alone."""
    source, out = op.in_sizes[0] or [], op.out_sizes[0] or []
    pad = len(out) - len(source)
    names = [f"a{k}" for k in range(len(out))]
    for k, size in enumerate(out[pad:], pad):
        if size != source[k - pad] and any(s != 1 for s in source[k - pad]):
            names[k] = "1"  # repeated at one of the probes only
    operand = " ".join(names[k] if size == out[k] else "1" for k, size in enumerate(source, pad))
    return relate([operand, "*"], [" ".join(names)])


def _mend_expand(op: OpView, kept: Kept) -> Repair:
    """Target."""
    target = op.seen[1]
    if target is None:
        return Repair()
    new, sizes = target.copy(), _new_sizes(op, kept)
    offset = len(sizes) - len(new)
    for k in range(len(new)):
        if new[k] != 1:
            new[k] = sizes[offset + k]
    return Repair(inputs={1: new})


def _same_where_equal(op: OpView) -> Relation | Refusal:
    """Axes of equal size are the same axis; the others are unclaimed."""
    equal = [a == b for a, b in zip(op.in_sizes[0] or [], op.out_sizes[0] or [], strict=True)]
    text = " ".join(f"a{k}" if same else "1" for k, same in enumerate(equal))
    return relate([text], [text])


def _tile(op: OpView) -> Relation | Refusal:
    """Copies side by side: an axis is cut in all of them; one that is made of copies alone by their number."""
    before, after = [], []
    for k, (small, large) in enumerate(zip(op.in_sizes[0] or [], op.out_sizes[0] or [], strict=True)):
        times = {b // a if a and b % a == 0 else 0 for a, b in zip(small, large, strict=True)}
        if times == {1}:
            before.append(f"a{k}")
            after.append(f"a{k}")
        elif len(times) == 1 and 0 not in times:
            before.append(f"a{k}" if small[0] > 1 else "1")
            after.append(f"(!t{k} a{k})" if small[0] > 1 else f"t{k}")
        else:
            before.append("1")
            after.append("1")
    return relate([" ".join(before), "*"], [" ".join(after)])


def _mend_tile(op: OpView, kept: Kept) -> Repair:
    """Repeats."""
    times = op.seen[1]
    if times is None:
        return Repair()
    new = times.copy()
    for axis, size in enumerate(op.in_shape(0)):
        if size == 1:
            new[axis] = kept.out_size(op, 0, axis)
    return Repair(inputs={1: new})


# -------------------------------------------------------------------------------------------- resizing


def _resize(op: OpView) -> Relation | Refusal:
    """Axes that keep their size; the others stay."""
    if op.attributes.get("coordinate_transformation_mode", b"") in ("tf_crop_and_resize", b"tf_crop_and_resize"):
        return Refusal("Resize with tf_crop_and_resize reads a region of interest")
    return _same_where_equal(op)


def _mend_resize(op: OpView, kept: Kept) -> Repair:
    """Sizes."""
    target = op.seen[3] if len(op.seen) > 3 else None
    if target is None or not target.size:
        return Repair()
    axes = op.attributes.get("axes") or range(len(target))
    return Repair(inputs={3: np.array([kept.out_size(op, 0, a) for a in axes], dtype=target.dtype)})


def _depth_to_space(op: OpView) -> Relation | Refusal:
    """`b (!r !s c) h w -> b c (h !r) (w !s)`, or `b (c !r !s) h w` in CRD mode"""
    order = "(c !r !s)" if op.attributes.get("mode", "DCR") in ("CRD", b"CRD") else "(!r !s c)"
    return relate([f"b {order} h w"], ["b c (h !r) (w !s)"])


def _block(op: OpView) -> dict[str, int]:
    size = int(op.attributes["blocksize"])
    return {"r": size, "s": size}


# ------------------------------------------------------------------------------------------- index maps


def _mapped(op: OpView, axis: int, source: np.ndarray, position: np.ndarray, inputs: list[str], out: str) -> Relation:
    return relate(inputs, [out], (IndexMap(0, axis, axis, source, position),))


def _concat(op: OpView) -> Relation | Refusal:
    """Position by position along the axis; the other axes are the same."""
    axis = op.axis(1)
    sizes = [op.in_shape(k)[axis] for k in range(len(op.in_sizes))]
    operand = np.repeat(np.arange(len(sizes)), sizes)
    position = np.concatenate([np.arange(size) for size in sizes])
    text = along(op.out_shape(), axis, "@")
    return _mapped(op, axis, operand, position, [text] * len(sizes), text)


def _split(op: OpView) -> Relation | Refusal:
    """Position by position along the axis; the other axes are the same."""
    axis = op.axis(0)
    maps, start = [], 0
    for k, sizes in enumerate(op.out_sizes):
        size = op.out_shape(k)[axis] if sizes is not None else 0
        maps.append(IndexMap(k, axis, axis, np.zeros(size, np.int64), np.arange(start, start + size)))
        start += size
    if start != op.in_shape(0)[axis]:
        return Refusal("Split with an unused part whose size is unknown")
    text = along(op.in_shape(0), axis, "@")
    return relate([text], [text if s is not None else "" for s in op.out_sizes], tuple(maps))


def _mend_split(op: OpView, kept: Kept) -> Repair:
    """Sizes of the parts."""
    axis = op.axis(0)
    sizes = np.array([kept.out_size(op, k, axis) for k in range(len(op.out_sizes))], dtype=np.int64)
    if op.version < 13:
        return Repair(attributes={"split": sizes.tolist()})
    return Repair(attributes={"num_outputs": None}, inputs={1: sizes})


def _slice_parts(op: OpView) -> tuple[list[int], list[int], list[int], list[int]] | None:
    """starts, ends, axes, steps as lists; None where one of them is computed at run time."""
    starts, ends = op.value(1, "starts"), op.value(2, "ends")
    axes, steps = op.value(3, "axes"), op.value(4)
    if starts is None or ends is None or (axes is None and op.has(3)) or (steps is None and op.has(4)):
        return None
    first, last = starts.ravel().tolist(), ends.ravel().tolist()
    rank = len(op.in_shape(0))
    along_ = list(range(len(first))) if axes is None else [int(a) % rank for a in axes.ravel()]
    step = [1] * len(first) if steps is None else steps.ravel().tolist()
    return first, last, along_, step


def _slice(op: OpView) -> Relation | Refusal:
    """Position by position along the axes that are cut; one of every `s` throughout an axis is `(c !s) -> c`."""
    parts = _slice_parts(op)
    if parts is None:
        axes = op.value(3, "axes")
        if axes is None:
            return Refusal("Slice of axes that are computed at run time")
        cut = {int(a) % len(op.in_shape(0)) for a in axes.ravel()}
        text = " ".join("1" if k in cut else f"a{k}" for k in range(len(op.in_shape(0))))
        return relate([text], [text])
    shape = op.in_shape(0)
    names, left, maps = letters(shape), {}, []
    for start, end, axis, step in zip(*parts, strict=True):
        position = _positions(shape[axis], start, end, step)
        if step == 1 and (op.in_sizes[0] or [])[axis] == (op.out_sizes[0] or [])[axis]:
            continue
        if len(set((op.in_sizes[0] or [])[axis])) > 1:
            names[axis] = "1"  # a dynamic axis is never cut
        elif _is_strided(shape[axis], position, step):
            left[axis] = f"({names[axis]} !s{axis})"
        elif abs(step) != 1:
            names[axis] = "1"  # what is left of these would not be as far apart
        else:
            names[axis] = "@"
            maps.append(IndexMap(0, axis, axis, np.zeros(len(position), np.int64), position))
    return relate([" ".join(left.get(k, name) for k, name in enumerate(names))], [" ".join(names)], tuple(maps))


def _positions(size: int, start: int, end: int, step: int) -> np.ndarray:
    """Which positions of an axis a Slice gives."""
    return np.arange(size)[slice(start, end if step > 0 or end >= -size else None, step)]


def _is_strided(size: int, position: np.ndarray, step: int) -> bool:
    """Whether a Slice gives one of every ``step`` positions, throughout the axis."""
    return step > 1 and size % step == 0 and len(position) == size // step


def _mend_slice(op: OpView, kept: Kept) -> Repair:
    """Starts and ends."""
    parts = _slice_parts(op)
    if parts is None:
        return Repair()
    starts, ends, axes, steps = parts
    for k, (axis, step) in enumerate(zip(axes, steps, strict=True)):
        left, size = kept.inputs[0][axis], op.in_shape(0)[axis]
        if left is None:
            continue
        position = _positions(size, starts[k], ends[k], step)
        if _is_strided(size, position, step):  # whole strides went
            starts[k], ends[k] = int(position[0]), len(left)
        elif step < 0:
            starts[k] = int((left <= position.max(initial=-1)).sum()) - 1
            ends[k] = int((left < position.min(initial=size)).sum()) - 1
            ends[k] -= (ends[k] < 0) * len(left)  # before the first one: minus one is the last
        else:
            first, last, _ = slice(starts[k], ends[k]).indices(size)
            starts[k], ends[k] = int((left < first).sum()), int((left < last).sum())
    if op.version < 10:
        return Repair(attributes={"starts": starts, "ends": ends})
    dtype = op.values[1].dtype if op.values[1] is not None else np.dtype(np.int64)
    return Repair(inputs={1: np.array(starts, dtype), 2: np.array(ends, dtype)})


def _gather(op: OpView) -> Relation | Refusal:
    """Position by position where the indices are a stored vector; else the axis is mixed."""
    data, axis = op.in_shape(0), op.axis(0)
    names, index = letters(data), letters(op.in_shape(1), "i")
    indices = op.value(1)
    if indices is None or indices.ndim != 1:
        kept = [n for k, n in enumerate(names) if k != axis]
        names[axis] = f"!{names[axis]}"
        return relate([" ".join(names), " ".join(index)], [" ".join([*kept[:axis], *index, *kept[axis:]])])
    position = indices.astype(np.int64) % data[axis]
    text = along(data, axis, "@")
    return _mapped(op, axis, np.zeros(len(position), np.int64), position, [text], text)


def _mend_gather(op: OpView, kept: Kept) -> Repair:
    """Indices."""
    axis, indices = op.axis(0), op.seen[1]
    if indices is None or indices.ndim != 1 or op.value(1) is None:
        return Repair()
    size = op.in_shape(0)[axis]
    left_in, left_out = kept.inputs[0][axis], kept.outputs[0][axis]
    if left_in is None and left_out is None:
        return Repair()
    rank = np.full(size, -1)
    have = np.arange(size) if left_in is None else left_in
    rank[have] = np.arange(len(have))
    wanted = indices % size if left_out is None else (indices % size)[left_out]
    return Repair(inputs={1: rank[wanted].astype(indices.dtype)})


def _pads(op: OpView) -> list[int] | None:
    """Pads of every axis, all befores then all afters; None where they are computed at run time."""
    pads = op.value(1, "pads")
    if pads is None:
        return None
    rank = len(op.in_shape(0))
    axes = op.value(3)
    if axes is None:
        return None if op.has(3) else [int(p) for p in pads.ravel()]
    full, half = [0] * (2 * rank), len(axes)
    for k, axis in enumerate(axes.ravel()):
        full[int(axis) % rank] = int(pads[k])
        full[int(axis) % rank + rank] = int(pads[half + k])
    return full


def _pad(op: OpView) -> Relation | Refusal:
    """Position by position where padded with a constant; the other modes stay."""
    pads = _pads(op)
    if pads is None:
        return _same_where_equal(op)
    shape, rank = op.in_shape(0), len(op.in_shape(0))
    constant = op.attributes.get("mode", "constant") in ("constant", b"constant")
    names, maps = letters(shape), []
    for axis in range(rank):
        before, after = pads[axis], pads[axis + rank]
        if not before and not after:
            continue
        if not constant or len(set((op.in_sizes[0] or [])[axis])) > 1:
            names[axis] = "1"
            continue
        position = np.arange(-before, shape[axis] + after)
        inside = (position >= 0) & (position < shape[axis])
        names[axis] = "@"
        maps.append(IndexMap(0, axis, axis, np.where(inside, 0, -1), np.where(inside, position, -1)))
    text = " ".join(names)
    return relate([text], [text], tuple(maps))


def _mend_pad(op: OpView, kept: Kept) -> Repair:
    """Pads."""
    pads = _pads(op)
    if pads is None:
        return Repair()
    rank = len(op.in_shape(0))
    for axis in range(rank):
        before, after = pads[axis], pads[axis + rank]
        left_in, left_out = kept.inputs[0][axis], kept.outputs[0][axis]
        if (before or after) and (left_in is not None or left_out is not None):
            size = op.in_shape(0)[axis]
            out = np.arange(size + before + after) if left_out is None else left_out
            have = np.arange(size) if left_in is None else left_in
            # negative pads crop: what is left of the cropped part goes on being cropped
            pads[axis] = int((out < before).sum()) if before >= 0 else -int((have < -before).sum())
            pads[axis + rank] = int((out >= before + size).sum()) if after >= 0 else -int((have >= size + after).sum())
    if op.version < 11:
        return Repair(attributes={"pads": pads})
    axes = op.value(3)
    if axes is not None:
        chosen = [int(a) % rank for a in axes.ravel()]
        pads = [pads[a] for a in chosen] + [pads[a + rank] for a in chosen]
    return Repair(inputs={1: np.array(pads, dtype=np.int64)})


# -------------------------------------------------------------------------------------------- the rest


def _shape(op: OpView) -> Relation | Refusal:
    """Sizes are read, values are not: every axis may shrink, and what follows is repaired or keeps the old number."""
    return relate([" ".join(letters(op.in_shape(0)))], ["*"])


def _constant(op: OpView) -> Relation | Refusal:
    """Every axis may be cut."""
    return relate([""], [" ".join(letters(op.out_shape()))])


def _pad_of_zero(op: OpView) -> Clauses:
    if op.attributes.get("mode", "constant") not in ("constant", b"constant"):
        return FIRST
    value = op.value(2, "value")
    return FIRST if (value is None and not op.has(2)) or (value is not None and not np.any(value)) else ()


def register(table: Table) -> None:
    """Add the rows of this file."""
    add(table, "Reshape", Row(_reshape, repair=_mend_reshape, zero=FIRST))
    add(table, "Flatten Squeeze Unsqueeze", Row(_reshape, zero=FIRST))
    add(table, "Transpose", Row(_transpose, zero=FIRST))
    add(table, "Expand", Row(_expand, repair=_mend_expand, zero=FIRST))
    add(table, "Tile", Row(_tile, repair=_mend_tile, since=6, zero=FIRST))
    add(table, "Resize Upsample", Row(_resize, repair=_mend_resize, zero=FIRST))
    add(table, "DepthToSpace", Row(_depth_to_space, sizes=_block, zero=FIRST))
    add(table, "SpaceToDepth", Row("b c (h !r) (w !s) -> b (!r !s c) h w", sizes=_block, zero=FIRST))
    add(table, "Concat", Row(_concat, zero=ALL))
    add(table, "Split", Row(_split, repair=_mend_split, zero=FIRST))
    add(table, "Slice", Row(_slice, repair=_mend_slice, zero=FIRST))
    add(table, "Gather", Row(_gather, repair=_mend_gather, weights=(0,), zero=FIRST))
    add(table, "Pad", Row(_pad, repair=_mend_pad, zero=_pad_of_zero))
    add(table, "Shape Size", Row(_shape))
    add(table, "Constant", Row(_constant))
