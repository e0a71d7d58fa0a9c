"""Operators that work on every element by itself, with broadcasting."""

from __future__ import annotations

from onnxprune.axes import Refusal, Relation
from onnxprune.rules.base import OpView, Row, Table, add, broadcast, relate

UNARY = """
Abs Acos Acosh Asin Asinh Atan Atanh Cast CastLike Ceil Celu Clip Cos Cosh Dropout Elu Erf Exp Floor Gelu HardSigmoid HardSwish
Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign
Sqrt Swish Tan Tanh ThresholdedRelu BitwiseNot
"""
NARY = """
Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod Mul Or Pow
Sub Sum Where Xor
"""


def _unary(op: OpView) -> Relation | Refusal:
    """Every axis of the first input is an axis of every output; the other inputs are scalars (limits, ratios)."""
    outputs = [broadcast([op.out_shape(k) if s is not None else None], op.in_shape(0))[0] for k, s in enumerate(op.out_sizes)]
    return relate([*broadcast([op.in_shape(0)], op.in_shape(0))], outputs)


def _nary(op: OpView) -> Relation | Refusal:
    out = op.out_shape()
    shapes = [None if s is None else op.in_shape(k) for k, s in enumerate(op.in_sizes)]
    return relate(broadcast(shapes, out), broadcast([out], out))


def _prelu(op: OpView) -> Relation | Refusal:
    return relate(broadcast([op.in_shape(0), op.in_shape(1)], op.out_shape()), broadcast([op.out_shape()], op.out_shape()))


def register(table: Table) -> None:
    """Add the rows of this file."""
    add(table, UNARY, Row(_unary))
    # a bias beside a matrix product is silenced with it; the other operands scale or compare
    add(table, NARY, Row(_nary))
    table[("", "Add")] = [Row(_nary, weights=(0, 1))]
    table[("", "Sub")] = [Row(_nary, weights=(0, 1))]
    add(table, "PRelu", Row(_prelu))
