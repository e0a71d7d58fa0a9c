"""Operators that work on every element by itself, with broadcasting."""

from __future__ import annotations

from onnxprune.axes import Refusal, Relation
from onnxprune.rules.base import ALL, EITHER, FIRST, Clauses, OpView, Row, Table, add, broadcast, letters, relate

# f(0) = 0
UNARY_OF_ZERO = """
Abs Asin Asinh Atan Atanh Cast Ceil Celu Dropout Elu Erf Floor Gelu HardSwish Identity LeakyRelu Mish Neg Relu
Round Selu Shrink Sign Sin Sinh Softsign Sqrt Swish Tan Tanh
"""
UNARY = """
Acos BitwiseNot Cos Cosh Exp HardSigmoid IsInf IsNaN Not Sigmoid Softplus ThresholdedRelu
"""
UNARY_WITH_A_POLE = "Acosh Log Reciprocal"  # at zero, or no number there
NARY = """
And BitShift BitwiseAnd BitwiseOr BitwiseXor Equal Greater GreaterOrEqual Less LessOrEqual Or Xor
"""


def _unary(op: OpView) -> Relation | Refusal:
    """Every axis of the first input is an axis of every output; the other inputs are scalars (limits, ratios)."""
    shapes = [op.out_shape(k) if s is not None else None for k, s in enumerate(op.out_sizes)]
    return relate(broadcast([op.in_shape(0)], op.in_shape(0)), broadcast(shapes, op.in_shape(0)))


def _cast_like(op: OpView) -> Relation | Refusal:
    """The same axes; of the second input only the type is read."""
    names = " ".join(letters(op.in_shape(0)))
    return relate([names, " ".join(letters(op.in_shape(1), "t"))], [names])


def _nary(op: OpView) -> Relation | Refusal:
    """The same axes, with broadcasting."""
    out = op.out_shape()
    shapes = [None if s is None else op.in_shape(k) for k, s in enumerate(op.in_sizes)]
    return relate(broadcast(shapes, out), broadcast([out], out))


def _prelu(op: OpView) -> Relation | Refusal:
    """The same axes, with broadcasting."""
    out = op.out_shape()
    return relate(broadcast([op.in_shape(0), op.in_shape(1)], out), broadcast([out], out))


def _choice(op: OpView) -> Relation | Refusal:
    """Of the condition nothing; the axes of both branches' results are those of the output, where they are as long."""
    out = op.out_sizes[0] or []
    results = [sizes for sizes in op.in_sizes[1:] if sizes is not None]
    if not results:
        return Refusal("If has branches that cannot be laid open; export without control flow")
    if any(len(sizes) != len(out) for sizes in results):
        return Refusal("If gives results of unlike ranks; export with fixed sizes, or without control flow")
    names = letters(op.out_shape())
    text = " ".join(n if all(r[k] == out[k] for r in results) else "1" for k, n in enumerate(names))
    return relate(["*", *[text] * len(results)], [text])


def _clip_of_zero(op: OpView) -> Clauses:
    low, high = (None if v is None else float(v) for v in (op.value(1, "min"), op.value(2, "max")))
    known = (low is not None or not op.has(1)) and (high is not None or not op.has(2))
    return FIRST if known and (low or 0.0) <= 0.0 <= (high if high is not None else 0.0) else ()


def _power_of_zero(op: OpView) -> Clauses:
    exponent = op.value(1)
    return FIRST if exponent is not None and (exponent > 0).all() else ()


def _power_with_a_pole(op: OpView) -> tuple[int, ...]:
    exponent = op.value(1)
    return (0,) if exponent is not None and (exponent < 0).any() else ()


def register(table: Table) -> None:
    """Add the rows of this file."""
    add(table, UNARY_OF_ZERO, Row(_unary, zero=FIRST))
    add(table, UNARY, Row(_unary))
    add(table, UNARY_WITH_A_POLE, Row(_unary, poles=(0,)))
    add(table, "CastLike", Row(_cast_like, zero=FIRST))
    add(table, "Clip", Row(_unary, zero=_clip_of_zero))
    # a bias beside a matrix product is silenced with it; the other operands scale or compare
    add(table, "Add Sub", Row(_nary, weights=(0, 1), zero=ALL))
    add(table, "Max Mean Min Sum", Row(_nary, zero=ALL))
    add(table, "Mul", Row(_nary, zero=EITHER))
    add(table, "Div", Row(_nary, zero=FIRST, poles=(1,)))
    add(table, "Mod", Row(_nary, poles=(1,)))
    add(table, "Where", Row(_nary, zero=((1, 2),)))
    add(table, NARY, Row(_nary))
    add(table, "If", Row(_choice, zero=((1, 2),)))
    add(table, "Pow", Row(_nary, zero=_power_of_zero, poles=_power_with_a_pole))
    add(table, "PRelu", Row(_prelu, zero=FIRST))
    # what onnxruntime's optimizer writes
    add(table, "Gelu QuickGelu", Row(_unary, zero=FIRST), domain="com.microsoft")
    add(table, "BiasGelu FastGelu", Row(_nary, weights=(1,), zero=ALL), domain="com.microsoft")
