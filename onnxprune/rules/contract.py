"""Operators that contract an axis: convolutions and matrix products. They hold the multiply-accumulates."""

from __future__ import annotations

from onnxprune.axes import Refusal, Relation
from onnxprune.rules.base import Kept, OpView, Repair, Row, Table, add, broadcast, parse


def _group(op: OpView) -> dict[str, int]:
    return {"g": int(op.attributes.get("group", 1))}


def _mend_group(op: OpView, kept: Kept) -> Repair:
    """Whole groups may go: what each group reads stays."""
    group = int(op.attributes.get("group", 1))
    if group == 1:
        return Repair()
    per_group = op.in_shape(0)[1] // group
    if kept.inputs[1][1] is not None:  # slots within every group went, the groups stay
        return Repair()
    return Repair(attributes={"group": kept.in_size(op, 0, 1) // per_group})


def _gemm(op: OpView) -> Relation | Refusal:
    a = "k m" if op.attributes.get("transA", 0) else "m k"
    b = "n k" if op.attributes.get("transB", 0) else "k n"
    c = broadcast([op.in_shape(2)], op.out_shape())[0].replace("a0", "m").replace("a1", "n") if op.has(2) else ""
    return parse(f"{a}, {b}, {c} -> m n")


def _matmul(op: OpView) -> Relation | Refusal:
    left, right, out = op.in_shape(0), op.in_shape(1), op.out_shape()
    if not (op.constant[0] or op.constant[1]):
        contracted = "!k"  # exact only where one of the two is zero when silenced, which is not proved here
    else:
        contracted = "k"
    if len(right) == 1 or len(left) == 1:
        return Refusal("a matrix product with a vector")
    batch = out[:-2]
    one, two = broadcast([left[:-2], right[:-2]], batch)
    names = " ".join(f"a{k}" for k in range(len(batch)))
    return parse(f"{one} m {contracted}, {two} {contracted} n -> {names} m n")


def register(table: Table) -> None:
    """Add the rows of this file."""
    add(
        table,
        "Conv",
        Row("n (g c) *, (g o) c *, (g o) -> n (g o) *", repair=_mend_group, sizes=_group, weights=(1, 2)),
    )
    add(
        table,
        "ConvTranspose",
        Row("n (g c) *, (g c) o *, (g o) -> n (g o) *", repair=_mend_group, sizes=_group, weights=(1, 2)),
    )
    add(table, "Gemm", Row(_gemm, weights=(0, 1, 2)))
    add(table, "MatMul", Row(_matmul, weights=(0, 1)))
