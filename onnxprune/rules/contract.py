"""Operators that contract an axis: convolutions and matrix products. They hold the multiply-accumulates."""

from __future__ import annotations

from onnxprune.axes import Refusal, Relation, parse
from onnxprune.rules.base import EITHER, Kept, OpView, Repair, Row, Table, add, broadcast


def _contracted(op: OpView, letter: str, *operands: int) -> str:
    """The letter that is summed over: taken out exactly with a stored weight, else only where an operand is zero."""
    return letter if any(op.constant[k] for k in operands) else f"~{letter}"


def _conv(op: OpView) -> Relation | Refusal:
    c = _contracted(op, "c", 1)
    return parse(f"n (g {c}) *, (g o) {c} *, (g o) -> n (g o) *")


def _conv_transpose(op: OpView) -> Relation | Refusal:
    c = _contracted(op, "c", 1)
    return parse(f"n (g {c}) *, (g {c}) o *, (g o) -> n (g o) *")


def _group(op: OpView) -> dict[str, int]:
    return {"g": int(op.attributes.get("group", 1))}


def _mend_group(op: OpView, kept: Kept) -> Repair:
    """Whole groups went where input and output are narrower, and the weight is not within a group."""
    group = int(op.attributes.get("group", 1))
    whole = kept.inputs[0][1] is not None and kept.outputs[0][1] is not None and kept.inputs[1][1] is None
    if group == 1 or not whole:
        return Repair()
    per_group = op.in_shape(0)[1] // group
    return Repair(attributes={"group": kept.in_size(op, 0, 1) // per_group})


def _gemm(op: OpView) -> Relation | Refusal:
    k = _contracted(op, "k", 0, 1)
    a = f"{k} m" if op.attributes.get("transA", 0) else f"m {k}"
    b = f"n {k}" if op.attributes.get("transB", 0) else f"{k} n"
    c = broadcast([op.in_shape(2)], op.out_shape())[0].replace("a0", "m").replace("a1", "n") if op.has(2) else ""
    return parse(f"{a}, {b}, {c} -> m n")


def _matmul(op: OpView) -> Relation | Refusal:
    left, right, out = op.in_shape(0), op.in_shape(1), op.out_shape()
    k = _contracted(op, "k", 0, 1)
    m, n = ("" if len(shape) == 1 else letter for shape, letter in ((left, "m"), (right, "n")))
    batch = out[: len(out) - bool(m) - bool(n)]
    one, two = broadcast([left[:-2], right[:-2]], batch)
    names = " ".join(f"a{i}" for i in range(len(batch)))
    return parse(f"{one} {m} {k}, {two} {k} {n} -> {names} {m} {n}")


def register(table: Table) -> None:
    """Add the rows of this file."""
    # an output channel is zero where its weights and its bias are
    add(table, "Conv", Row(_conv, repair=_mend_group, sizes=_group, weights=(1, 2), zero=((1, 2),)))
    add(table, "ConvTranspose", Row(_conv_transpose, repair=_mend_group, sizes=_group, weights=(1, 2), zero=((1, 2),)))
    add(table, "Gemm", Row(_gemm, weights=(0, 1, 2), zero=((0, 2), (1, 2))))
    add(table, "MatMul", Row(_matmul, weights=(0, 1), zero=EITHER))
