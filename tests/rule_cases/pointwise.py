"""Cases of operators that look at every element by itself."""

from __future__ import annotations

import numpy as np
import onnx
from law import Call, Draw, case
from onnx import helper

# --------------------------------------------------------------------------------------------------------- pointwise

OPSETS = {"Gelu": 20, "Mish": 18, "HardSwish": 17, "Swish": 24, "IsInf": 20, "IsNaN": 20, "BitwiseNot": 18}
BOOLEAN = {"And", "Or", "Xor", "Not"}
INTEGER = {"BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot", "BitShift", "Mod"}
POSITIVE = {"Log", "Sqrt", "Reciprocal", "Pow", "Acosh"}
UNIT = {"Acos", "Asin", "Atanh"}


def _values(d: Draw, op: str, shape: tuple[int, ...]) -> np.ndarray:
    if op in BOOLEAN:
        return d.rng.integers(0, 2, shape).astype(bool)
    if op in INTEGER:
        return d.rng.integers(1, 9, shape).astype(np.uint64 if op == "BitShift" else np.int32)
    if op in UNIT:
        return (d.rng.uniform(-0.9, 0.9, shape)).astype(np.float32)
    x = d.floats(*shape, positive=op in POSITIVE)
    return x + np.float32(1.0) if op == "Acosh" else x


def _unary(d: Draw, op: str) -> Call:
    shape = (*tuple(d.of(1, 2, 3) for _ in range(d.int(1, 4)))[:-1], d.int(2, 3))
    attributes = {"Cast": {"to": onnx.TensorProto.DOUBLE}}.get(op, {})
    return Call(op, [_values(d, op, shape)], attributes, (), 1, OPSETS.get(op, 17))


def _nary(d: Draw, op: str) -> Call:
    out = tuple(d.int(2, 3) for _ in range(d.int(1, 4)))

    def shape() -> tuple[int, ...]:
        return tuple(d.of(1, n, n) for n in out[d.int(0, len(out) - 1) :])

    shapes = [out, shape()] + ([shape()] if op in ("Max", "Mean", "Min", "Sum", "Where") else [])
    if d.of(True, False) and op != "Where":
        shapes.reverse()
    inputs = [_values(d, op, s) for s in shapes]
    if op == "Where":
        inputs[0] = inputs[0] > 0
    attributes = {"BitShift": {"direction": "LEFT"}}.get(op, {})
    return Call(op, inputs, attributes, (), 1, 18 if op.startswith("Bitwise") else OPSETS.get(op, 17))


for _op in [
    "Abs",
    "Acos",
    "Acosh",
    "Asin",
    "Asinh",
    "Atan",
    "Atanh",
    "BitwiseNot",
    "Cast",
    "Ceil",
    "Celu",
    "Cos",
    "Cosh",
    "Dropout",
    "Elu",
    "Erf",
    "Exp",
    "Floor",
    "Gelu",
    "HardSigmoid",
    "HardSwish",
    "Identity",
    "IsInf",
    "IsNaN",
    "LeakyRelu",
    "Log",
    "Mish",
    "Neg",
    "Not",
    "Reciprocal",
    "Relu",
    "Round",
    "Selu",
    "Shrink",
    "Sigmoid",
    "Sign",
    "Sin",
    "Sinh",
    "Softplus",
    "Softsign",
    "Sqrt",
    "Swish",
    "Tan",
    "Tanh",
    "ThresholdedRelu",
]:
    case(_op)(lambda d, op=_op: _unary(d, op))
for _op in [
    "Add",
    "And",
    "BitShift",
    "BitwiseAnd",
    "BitwiseOr",
    "BitwiseXor",
    "Div",
    "Equal",
    "Greater",
    "GreaterOrEqual",
    "Less",
    "LessOrEqual",
    "Max",
    "Mean",
    "Min",
    "Mod",
    "Mul",
    "Or",
    "Pow",
    "Sub",
    "Sum",
    "Where",
    "Xor",
]:
    case(_op)(lambda d, op=_op: _nary(d, op))


@case("Clip")
def _(d: Draw) -> Call:
    limits = [np.array(-0.5, np.float32) if d.of(True, False) else None, np.array(0.5, np.float32)]
    return Call("Clip", [d.floats(*d.shape(0, 0, 0)), *limits], {}, (1, 2))


@case("Clip", "attributes")
def _(d: Draw) -> Call:
    return Call("Clip", [d.floats(*d.shape(0, 0))], {"min": -0.3, "max": 0.4}, (), 1, 7)


class Choice(Call):
    """An If whose branches hand on what they take from outside: the second input, or the third."""

    def node(self, names: list[str], outputs: list[str]) -> onnx.NodeProto:
        bodies = {}
        for branch, name in zip(("then_branch", "else_branch"), names[1:], strict=True):
            given = helper.make_tensor_value_info(f"{branch}_y", onnx.TensorProto.FLOAT, None)
            bodies[branch] = helper.make_graph(
                [helper.make_node("Identity", [name], [given.name])], branch, [], [given]
            )
        return helper.make_node("If", names[:1], outputs, **bodies)


@case("If")
def _(d: Draw) -> Call:
    shape = d.shape(0, 0, 0)
    other = (*shape[:-1], d.of(shape[-1], shape[-1] + 1))
    return Choice("If", [np.array(d.of(True, False)), d.floats(*shape), d.floats(*other)])


@case("CastLike")
def _(d: Draw) -> Call:
    return Call("CastLike", [d.floats(*d.shape(0, 0)), np.zeros(d.of((), (1,), (5,), (3, 4)), np.float64)])


@case("PRelu")
def _(d: Draw) -> Call:
    n, c, h = d.shape(0, 0, 0)
    return Call("PRelu", [d.floats(n, c, h), d.floats(*d.of((c, 1), (1, c, 1), (1,), (c, h), (h,)))], {}, (1,))
