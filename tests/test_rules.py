"""One law for every row of the table.

For random legal sizes and attributes, a letter and a random set to keep, ``run(take(inputs)) == take(run(inputs))``,
with the node repaired; for a letter that is read away, ``run(take(inputs)) == run(zeroed(inputs))``; for a letter
marked ``!`` it has to fail for some draw, and for one marked ``~`` where nothing was zeroed. Positions that an index
map relates are taken out together, and the same law holds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
from builder import IR, RUNTIME
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from onnxprune.axes import BoundAxis, BoundRelation, Refusal
from onnxprune.rules import TABLE
from onnxprune.rules.base import Kept, OpView, Repair, Row, describe, row_for

EXAMPLES = 12


# ------------------------------------------------------------------------------------------- one call of an operator


@dataclass
class Call:
    """An operator with inputs. ``constant`` are the inputs that stand in the file."""

    op: str
    inputs: list[np.ndarray | None]
    attributes: dict[str, Any] = field(default_factory=dict)
    constant: tuple[int, ...] = ()
    outputs: int = 1
    opset: int = 17
    domain: str = ""

    def model(self) -> onnx.ModelProto:
        """The model of this one node."""
        names = [f"x{k}" if a is not None else "" for k, a in enumerate(self.inputs)]
        while names and not names[-1]:
            names.pop()
        outputs = [f"y{k}" for k in range(self.outputs)]
        node = helper.make_node(self.op, names, outputs, domain=self.domain, **self.attributes)
        inputs, stored = [], []
        for k, array in enumerate(self.inputs):
            if array is None:
                continue
            if k in self.constant:
                stored.append(numpy_helper.from_array(array, f"x{k}"))
            else:
                inputs.append(
                    helper.make_tensor_value_info(f"x{k}", helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
                )
        graph = helper.make_graph(
            [node], "one", inputs, [helper.make_empty_tensor_value_info(o) for o in outputs], stored
        )
        opsets = [helper.make_opsetid("", self.opset)] + ([helper.make_opsetid(self.domain, 1)] if self.domain else [])
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR)

    def run(self) -> list[np.ndarray]:
        """The operator's outputs."""
        feeds = {f"x{k}": a for k, a in enumerate(self.inputs) if a is not None and k not in self.constant}
        return RUNTIME.session(self.model(), optimise=False).run(None, feeds)

    def view(self, outputs: list[np.ndarray]) -> OpView:
        """What a row may know of it."""
        return OpView(
            self.op,
            self.domain,
            self.opset if not self.domain else 1,
            {k: numpy_helper.to_array(v) if isinstance(v, onnx.TensorProto) else v for k, v in self.attributes.items()},
            tuple(None if a is None else [[s] for s in a.shape] for a in self.inputs),
            tuple([[s] for s in a.shape] for a in outputs),
            tuple(a if k in self.constant else None for k, a in enumerate(self.inputs)),
            tuple(k in self.constant for k in range(len(self.inputs))),
            tuple(a if a is not None and a.size <= 4096 else None for a in self.inputs),
        )

    def mended(self, repair: Repair, inputs: list[np.ndarray | None]) -> Call:
        """The same call on other inputs, repaired."""
        attributes = {k: v for k, v in (self.attributes | dict(repair.attributes)).items() if v is not None}
        inputs = list(inputs)
        constant = set(self.constant)
        for k, value in repair.inputs.items():
            while len(inputs) <= k:
                inputs.append(None)
            inputs[k] = value
            constant.add(k)
        return Call(self.op, inputs, attributes, tuple(constant), self.outputs, self.opset, self.domain)


class Draw:
    """Random choices of a case, by Hypothesis, and random arrays."""

    def __init__(self, data: Any) -> None:
        self.data = data
        self.rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))

    def int(self, low: int, high: int) -> int:
        """An integer between the two, both included."""
        return self.data.draw(st.integers(low, high))

    def of(self, *choices: Any) -> Any:
        """One of the choices."""
        return self.data.draw(st.sampled_from(choices))

    def shape(self, *fixed: int, low: int = 2, high: int = 4) -> tuple[int, ...]:
        """Sizes where zero stands for a drawn one."""
        return tuple(f or self.int(low, high) for f in fixed)

    def floats(self, *shape: int, positive: bool = False) -> np.ndarray:
        """Standard normal values, or values between 0.5 and 1.5."""
        array = self.rng.uniform(0.5, 1.5, shape) if positive else self.rng.standard_normal(shape)
        return array.astype(np.float32)


# ------------------------------------------------------------------------------------------------------- the law


def letter_positions(axis: BoundAxis, sizes: dict[str, int], letter: str) -> np.ndarray:
    """Positions of an axis by index of the letter."""
    grid = np.arange(math.prod(sizes[x] for x in axis.letters)).reshape([sizes[x] for x in axis.letters])
    return np.moveaxis(grid, axis.letters.index(letter), 0).reshape(sizes[letter], -1)


@dataclass
class Removal:
    """Positions to take out, per (is output, operand, axis), and the letter they belong to (empty: an index map)."""

    gone: dict[tuple[bool, int, int], np.ndarray]
    letter: str
    mixed: bool
    summed: bool
    read_away: bool


def removals(relation: BoundRelation, rng: np.random.Generator) -> Iterator[Removal]:
    """A random removal for every letter, and one for the index maps."""
    operands = [(False, k, o) for k, o in enumerate(relation.inputs)] + [
        (True, k, o) for k, o in enumerate(relation.outputs)
    ]
    axes = [(side, k, i, axis) for side, k, operand in operands for i, axis in enumerate(operand)]
    for letter in dict.fromkeys(x for *_, axis in axes for x in axis.letters):
        size = relation.sizes[letter]
        index = rng.choice(size, rng.integers(1, size), replace=False)
        held = [(key, axis) for *key, axis in axes if letter in axis.letters]
        gone = {
            tuple(key): np.sort(letter_positions(axis, relation.sizes, letter)[index].ravel()) for key, axis in held
        }
        yield Removal(
            gone,
            letter,
            any(letter in axis.mixed for _, axis in held),
            any(letter in axis.summed for _, axis in held),
            not any(key[0] for key, _ in held),
        )
    if relation.maps:
        yield from _map_removals(relation, axes, rng)


def _map_removals(relation: BoundRelation, axes: list[Any], rng: np.random.Generator) -> Iterator[Removal]:
    parent: dict[tuple[bool, int, int, int], tuple[bool, int, int, int]] = {}

    def find(x: Any) -> Any:
        while parent.setdefault(x, x) != x:
            x = parent[x]
        return x

    sizes: dict[tuple[bool, int, int], set[int]] = {}
    for m in relation.maps:
        for to, (operand, origin) in enumerate(zip(m.operand, m.position, strict=True)):
            here = (True, m.output, m.axis, to)
            parent[find(here)] = find((False, int(operand), m.in_axis, int(origin))) if operand >= 0 else find(here)
    mapped = {(side, k, i) for side, k, i, axis in axes if axis.mapped}
    for x in parent:
        if x[:3] in mapped:
            sizes.setdefault(x[:3], set()).add(x[3])
    roots = sorted({find(x) for x in parent})
    gone: dict[tuple[bool, int, int], list[int]] = {}
    for root in rng.permutation(len(roots))[: max(1, len(roots) // 2)]:
        members = [x for x in parent if find(x) == roots[root]]
        trial = {key: [*gone.get(key, []), *(x[3] for x in members if x[:3] == key)] for key in sizes}
        if all(len(trial[key]) < len(sizes[key]) for key in sizes):  # an axis must not become empty
            gone = {key: positions for key, positions in trial.items() if positions}
    if gone:
        yield Removal({k: np.sort(v) for k, v in gone.items()}, "", False, False, False)


Gone = dict[tuple[bool, int, int], np.ndarray]


def left(arrays: Sequence[np.ndarray | None], side: bool, gone: Gone) -> tuple[tuple[np.ndarray | None, ...], ...]:
    """Per operand and axis the positions that stay; None where all do."""
    return tuple(
        tuple(
            np.delete(np.arange(size), gone[side, k, axis]) if (side, k, axis) in gone else None
            for axis, size in enumerate(() if array is None else array.shape)
        )
        for k, array in enumerate(arrays)
    )


def take(array: np.ndarray, side: bool, k: int, gone: Gone) -> np.ndarray:
    """The array without the removed positions."""
    for axis in range(array.ndim):
        if (side, k, axis) in gone:
            array = np.delete(array, gone[side, k, axis], axis)
    return array


def zeroed(array: np.ndarray, k: int, gone: Gone) -> np.ndarray:
    """The input with zeros in the removed positions."""
    array = array.copy()
    for axis in range(array.ndim):
        if (False, k, axis) in gone:
            array[(slice(None),) * axis + (gone[False, k, axis],)] = 0
    return array


def close(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    """Whether the outputs agree: to 1e-5 of the largest value, exactly for what is no float."""
    for x, y in zip(a, b, strict=True):
        if x.shape != y.shape or x.dtype != y.dtype:
            return False
        if x.dtype.kind != "f":
            if not np.array_equal(x, y):
                return False
        elif x.size:
            if not np.array_equal(np.isfinite(x), np.isfinite(y)):
                return False
            fine = np.isfinite(x)
            x, y = x[fine].astype(np.float64), y[fine].astype(np.float64)
            if x.size and np.abs(x - y).max() > 1e-5 * max(1.0, np.abs(x).max()):
                return False
    return True


@dataclass
class Verdict:
    """Whether the law held for one removal."""

    removal: Removal
    holds: bool
    detail: str


def judge(call: Call, row: Row, rng: np.random.Generator) -> Iterator[Verdict]:
    """Try the law on every letter of the row."""
    outputs = call.run()
    view = call.view(outputs)
    relation = describe(view, row)
    assert not isinstance(relation, Refusal), relation.reason
    for removal in removals(relation, rng):
        gone = removal.gone
        kept = Kept(left(call.inputs, False, gone), left(outputs, True, gone))
        repair = row.repair(view, kept) if row.repair else Repair()
        taken = [None if a is None else take(a, False, k, gone) for k, a in enumerate(call.inputs)]
        expected: list[list[np.ndarray]] = []
        silent = sorted(relation.silenced & {k for side, k, _ in gone if not side})
        if removal.read_away:
            # a stored weight is silenced; of activations that are summed over, any one may be the zero one
            for which in [silent] if silent else [[k] for k in sorted({k for side, k, _ in gone if not side})]:
                inputs = [a if k not in which or a is None else zeroed(a, k, gone) for k, a in enumerate(call.inputs)]
                changed = Call(call.op, inputs, call.attributes, call.constant, call.outputs, call.opset, call.domain)
                expected.append(changed.run())
        elif call.op in ("LSTM", "GRU", "RNN"):  # a unit feeds the others of the next step, through silenced weights
            inputs = [a if k not in silent or a is None else zeroed(a, k, gone) for k, a in enumerate(call.inputs)]
            quiet = Call(call.op, inputs, call.attributes, call.constant, call.outputs, call.opset).run()
            expected.append([take(a, True, k, gone) for k, a in enumerate(quiet)])
        else:
            expected.append([take(a, True, k, gone) for k, a in enumerate(outputs)])
        mended = call.mended(repair, taken)
        try:
            got = mended.run()
            if repair.factor != 1:
                got[0] = got[0] * got[0].dtype.type(repair.factor)
            shapes = [a.shape for a in call.inputs if a is not None]
            detail = f"{call.op} {shapes} {call.attributes} letter {removal.letter!r}: {gone}"
        except Exception as error:
            got, detail = None, f"{call.op} {mended.attributes}: {error}"
        yield Verdict(removal, got is not None and all(close(e, got) for e in expected), detail)
        if removal.summed and removal.read_away and got is not None:  # without a zero the same must fail
            plain = Removal(gone, removal.letter, True, False, True)
            yield Verdict(plain, close(outputs, got), detail)


def check(name: str, case: Callable[[Draw], Call], examples: int = EXAMPLES, row: Row | None = None) -> None:
    """Hold the law against a case for several draws; a given row takes the place of the table's."""
    seen: set[str] = set()
    failed: set[str] = set()
    tried = itertools.count()

    @settings(
        derandomize=True,
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate] if row else [Phase.generate, Phase.shrink],
    )
    @given(st.data())
    def law(data: Any) -> None:
        draw = Draw(data)
        call = case(draw)
        found = row or row_for(call.domain, call.op, call.opset if not call.domain else 1)
        assert found is not None, f"no row for {call.op}"
        for verdict in judge(call, found, draw.rng):
            next(tried)
            if verdict.removal.mixed:
                seen.add(verdict.removal.letter)
                if not verdict.holds:
                    failed.add(verdict.removal.letter)
            else:
                assert verdict.holds, verdict.detail

    law()
    assert seen <= failed, f"{name}: {sorted(seen - failed)} are marked as mixed, and yet the law held for every draw"
    assert next(tried), f"{name}: nothing was tried"


# ------------------------------------------------------------------------------------------------------- the cases

CASES: dict[str, Callable[[Draw], Call]] = {}
CASE_OPS: dict[str, tuple[str, str]] = {}


def case(op: str, note: str = "", domain: str = "") -> Callable[[Callable[[Draw], Call]], Callable[[Draw], Call]]:
    """Register a case for an operator."""

    def register(function: Callable[[Draw], Call]) -> Callable[[Draw], Call]:
        name = f"{domain + '.' if domain else ''}{op}{'-' + note if note else ''}"
        assert name not in CASES, name
        CASES[name] = function
        CASE_OPS[name] = (domain, op)
        return function

    return register


# ------------------------------------------------------------------------------------------------------ contractions


def _conv(d: Draw, group: int, c: int, o: int, constant: tuple[int, ...] = (1, 2)) -> Call:
    rank = d.of(1, 2)
    k = [d.int(1, 3) for _ in range(rank)]
    x = d.floats(2, group * c, *(d.int(4, 6) for _ in k))
    attributes = {"group": group, "strides": [d.int(1, 2) for _ in k], "pads": [1] * (2 * rank)}
    inputs = [x, d.floats(group * o, c, *k)] + ([d.floats(group * o)] if d.of(True, False) else [])
    return Call("Conv", inputs, attributes, tuple(i for i in constant if i < len(inputs)))


case("Conv", "dense")(lambda d: _conv(d, 1, d.int(2, 4), d.int(2, 4)))
case("Conv", "grouped")(lambda d: _conv(d, d.int(2, 3), d.int(2, 3), d.int(2, 3)))
case("Conv", "depthwise")(lambda d: _conv(d, d.int(2, 5), 1, d.int(1, 3)))
case("Conv", "computed-weights")(lambda d: _conv(d, 1, d.int(2, 4), d.int(2, 4), ()))


def _conv_transpose(d: Draw, group: int, c: int, o: int) -> Call:
    k = [d.int(1, 3), d.int(1, 3)]
    inputs = [d.floats(2, group * c, 3, 4), d.floats(group * c, o, *k)] + (
        [d.floats(group * o)] if d.of(True, False) else []
    )
    return Call("ConvTranspose", inputs, {"group": group, "strides": [d.int(1, 2), 2]}, tuple(range(1, len(inputs))))


case("ConvTranspose", "dense")(lambda d: _conv_transpose(d, 1, d.int(2, 4), d.int(2, 4)))
case("ConvTranspose", "grouped")(lambda d: _conv_transpose(d, d.int(2, 3), d.int(2, 3), d.int(2, 3)))
case("ConvTranspose", "depthwise")(lambda d: _conv_transpose(d, d.int(2, 4), 1, 1))


def _gemm(d: Draw, constant: tuple[int, ...]) -> Call:
    m, k, n = d.shape(0, 0, 0)
    ta, tb = d.int(0, 1), d.int(0, 1)
    bias = d.of(None, (n,), (1, n), (m, n), (m, 1), (1,))
    inputs = [d.floats(k, m) if ta else d.floats(m, k), d.floats(n, k) if tb else d.floats(k, n)]
    if bias:
        inputs.append(d.floats(*bias))
    return Call("Gemm", inputs, {"transA": ta, "transB": tb, "alpha": 0.5, "beta": 2.0}, constant)


case("Gemm", "weights")(lambda d: _gemm(d, (1, 2)))
case("Gemm", "activations")(lambda d: _gemm(d, ()))


def _matmul(d: Draw, kind: str) -> Call:
    b, h, m, k, n = d.shape(0, 0, 0, 0, 0)
    left, right = {
        "weights": d.of([(b, m, k), (k, n)], [(m, k), (k, n)], [(m, k), (b, k, n)]),
        "activations": d.of([(b, h, m, k), (b, h, k, n)], [(b, 1, m, k), (h, k, n)], [(1, k), (b, k, n)]),
        "vector": d.of([(k,), (b, k, n)], [(b, m, k), (k,)], [(k,), (k,)]),
    }[kind]
    return Call("MatMul", [d.floats(*left), d.floats(*right)], {}, () if kind == "activations" else (d.int(0, 1),))


for _kind in ("weights", "activations", "vector"):
    case("MatMul", _kind)(lambda d, kind=_kind: _matmul(d, kind))


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


@case("CastLike")
def _(d: Draw) -> Call:
    return Call("CastLike", [d.floats(*d.shape(0, 0)), np.zeros(d.of((), (1,), (5,), (3, 4)), np.float64)])


@case("PRelu")
def _(d: Draw) -> Call:
    n, c, h = d.shape(0, 0, 0)
    return Call("PRelu", [d.floats(n, c, h), d.floats(*d.of((c, 1), (1, c, 1), (1,), (c, h), (h,)))], {}, (1,))


# ---------------------------------------------------------------------------------------------------------- movement


def _reshape_shapes(d: Draw) -> tuple[list[int], list[int]]:
    factors = [d.int(2, 3) for _ in range(d.int(2, 4))]

    def grouped() -> list[int]:
        out = [factors[0]]
        for f in factors[1:]:
            if d.of(True, False):
                out.append(f)
            else:
                out[-1] *= f
        if d.of(True, False, False):
            out.insert(d.int(0, len(out)), 1)
        return out

    return grouped(), grouped()


@case("Reshape")
def _(d: Draw) -> Call:
    before, after = _reshape_shapes(d)
    target = list(after)
    if d.of(True, False):
        target[d.int(0, len(target) - 1)] = -1
    target = [
        0 if t != -1 and k < len(before) and before[k] == t and d.of(True, False) else t for k, t in enumerate(target)
    ]
    return Call("Reshape", [d.floats(*before), np.array(target, np.int64)], {}, (1,))


@case("Flatten")
def _(d: Draw) -> Call:
    return Call("Flatten", [d.floats(*d.shape(0, 0, 0, 0))], {"axis": d.int(0, 4)})


@case("Squeeze")
def _(d: Draw) -> Call:
    return Call(
        "Squeeze",
        [d.floats(d.int(2, 3), 1, d.int(2, 4), 1), np.array(d.of([1], [3], [1, 3], [-1]), np.int64)],
        {},
        (1,),
    )


@case("Squeeze", "attributes")
def _(d: Draw) -> Call:
    return Call("Squeeze", [d.floats(d.int(2, 3), 1, d.int(2, 4), 1)], {"axes": d.of([1], [1, 3])}, (), 1, 11)


@case("Unsqueeze")
def _(d: Draw) -> Call:
    return Call("Unsqueeze", [d.floats(*d.shape(0, 0)), np.array(d.of([1], [0, 3], [-1]), np.int64)], {}, (1,))


@case("Transpose")
def _(d: Draw) -> Call:
    x = d.floats(*d.shape(0, 0, 0, 0))
    return Call("Transpose", [x], d.of({}, {"perm": d.rng.permutation(4).tolist()}))


@case("Expand")
def _(d: Draw) -> Call:
    a, b, c = d.shape(0, 0, 0)
    shape, target = d.of(
        ((a, 1, c), (a, b, c)), ((a, 1, c), (1, b, 1)), ((b, c), (a, 1, c)), ((1, c), (a, b, 1)), ((a, b), (b,))
    )
    return Call("Expand", [d.floats(*shape), np.array(target, np.int64)], {}, (1,))


@case("Tile")
def _(d: Draw) -> Call:
    return Call("Tile", [d.floats(*d.shape(0, 0, 0)), np.array([d.int(1, 2) for _ in range(3)], np.int64)], {}, (1,))


@case("Resize")
def _(d: Draw) -> Call:
    n, c, h, w = d.shape(0, 0, 0, 0)
    attributes = {"mode": d.of("nearest", "linear"), "coordinate_transformation_mode": d.of("asymmetric", "half_pixel")}
    if d.of(True, False):
        inputs = [d.floats(n, c, h, w), None, np.array([1, 1, 2, 2], np.float32)]
    else:
        inputs = [d.floats(n, c, h, w), None, None, np.array([n, c, 2 * h, w + 1], np.int64)]
    return Call("Resize", inputs, attributes, (2, 3))


@case("Resize", "axes")
def _(d: Draw) -> Call:
    n, c, h, w = d.shape(0, 0, 0, 0)
    inputs = [d.floats(n, c, h, w), None, None, np.array([2 * h, 2 * w], np.int64)]
    return Call("Resize", inputs, {"axes": [2, 3], "mode": "nearest"}, (3,), 1, 18)


@case("Upsample")
def _(d: Draw) -> Call:
    x = d.floats(*d.shape(0, 0, 0, 0))
    return Call("Upsample", [x, np.array([1, 1, 2, 3], np.float32)], {"mode": d.of("nearest", "linear")}, (1,), 1, 9)


@case("Upsample", "attributes")
def _(d: Draw) -> Call:
    return Call("Upsample", [d.floats(*d.shape(0, 0, 0, 0))], {"scales": [1.0, 1.0, 2.0, 2.0]}, (), 1, 7)


@case("DepthToSpace")
def _(d: Draw) -> Call:
    block, n, c, h, w = d.int(2, 3), *d.shape(0, 0, 0, 0)
    return Call(
        "DepthToSpace", [d.floats(n, c * block * block, h, w)], {"blocksize": block, "mode": d.of("DCR", "CRD")}
    )


@case("SpaceToDepth")
def _(d: Draw) -> Call:
    block, n, c, h, w = d.int(2, 3), *d.shape(0, 0, 0, 0)
    return Call("SpaceToDepth", [d.floats(n, c, h * block, w * block)], {"blocksize": block})


@case("Concat")
def _(d: Draw) -> Call:
    shape, axis = list(d.shape(0, 0, 0)), d.int(-3, 2)
    parts = []
    for _ in range(d.int(1, 3)):
        shape[axis] = d.int(1, 4)
        parts.append(d.floats(*shape))
    return Call("Concat", parts, {"axis": axis})


@case("Split")
def _(d: Draw) -> Call:
    sizes, axis, shape = [d.int(1, 4) for _ in range(d.int(2, 3))], d.int(-3, 2), list(d.shape(0, 0, 0))
    shape[axis] = sum(sizes)
    return Call("Split", [d.floats(*shape), np.array(sizes, np.int64)], {"axis": axis}, (1,), len(sizes))


@case("Split", "even")
def _(d: Draw) -> Call:
    parts, each = d.int(2, 3), d.int(2, 3)
    opset = d.of(11, 13, 18)
    attributes = {"axis": 1} | ({"num_outputs": parts} if opset == 18 else {})
    return Call("Split", [d.floats(2, parts * each, 3)], attributes, (), parts, opset)


@case("Split", "attributes")
def _(d: Draw) -> Call:
    sizes = [d.int(1, 4), d.int(1, 4)]
    return Call("Split", [d.floats(2, sum(sizes), 3)], {"axis": 1, "split": sizes}, (), 2, 11)


@case("Slice")
def _(d: Draw) -> Call:
    shape = d.shape(0, 0, 0, low=3, high=7)
    axes = d.of([1], [0, 2], [-1], [1, 2])
    starts = [d.int(-shape[a], 1) for a in axes]
    ends = [d.of(shape[a], shape[a] - 1, -1, 2**31) for a in axes]
    steps = [d.of(1, 1, 2) for _ in axes]
    parts = [np.array(v, np.int64) for v in (starts, ends, axes, steps)]
    return Call("Slice", [d.floats(*shape), *parts], {}, (1, 2, 3, 4))


@case("Slice", "reversed")
def _(d: Draw) -> Call:
    parts = [np.array(v, np.int64) for v in ([-1], [-(2**31)], [d.int(0, 1)], [-1])]
    return Call("Slice", [d.floats(*d.shape(0, 0)), *parts], {}, (1, 2, 3, 4))


@case("Slice", "attributes")
def _(d: Draw) -> Call:
    return Call("Slice", [d.floats(2, d.int(3, 6), 4)], {"starts": [1, 0], "ends": [3, -1], "axes": [1, 2]}, (), 1, 9)


@case("Slice", "computed")
def _(d: Draw) -> Call:
    return Call("Slice", [d.floats(*d.shape(0, 0, 0)), np.array([0]), np.array([1]), np.array([1])], {}, (3,))


@case("Gather", "permutation")
def _(d: Draw) -> Call:
    shape = d.shape(0, 0, 0)
    axis = d.int(-3, 2)
    return Call("Gather", [d.floats(*shape), d.rng.permutation(shape[axis])], {"axis": axis}, (1,))


@case("Gather", "some")
def _(d: Draw) -> Call:
    shape, axis = d.shape(0, 0, 0, low=3), d.int(0, 2)
    return Call(
        "Gather", [d.floats(*shape), d.rng.integers(-shape[axis], shape[axis], d.int(2, 5))], {"axis": axis}, (1,)
    )


@case("Gather", "scalar")
def _(d: Draw) -> Call:
    return Call("Gather", [d.floats(*d.shape(0, 0, 0)), np.array(1)], {"axis": d.int(0, 2)}, (1,))


@case("Gather", "embedding")
def _(d: Draw) -> Call:
    return Call("Gather", [d.floats(*d.shape(0, 0)), d.rng.integers(0, 2, (2, 3))], {}, (0,))


@case("Gather", "table")
def _(d: Draw) -> Call:
    return Call("Gather", [d.floats(*d.shape(0, 0)), d.rng.integers(0, 2, (2, 3))], {"axis": 1}, (1,))


@case("Pad")
def _(d: Draw) -> Call:
    pads = [d.of(0, 1, 2) for _ in range(6)]
    value = [np.array(1.5, np.float32)] if d.of(True, False) else []
    return Call("Pad", [d.floats(*d.shape(0, 0, 0)), np.array(pads, np.int64), *value], {"mode": "constant"}, (1, 2))


@case("Pad", "crop")
def _(d: Draw) -> Call:
    pads = [0, d.of(-1, 1), 0, 0, d.of(0, -1), 0]
    return Call("Pad", [d.floats(2, d.int(4, 6), 3), np.array(pads, np.int64)], {}, (1,))


@case("Pad", "mode")
def _(d: Draw) -> Call:
    return Call(
        "Pad", [d.floats(2, 3, 4), np.array([0, 1, 2, 0, 1, 0], np.int64)], {"mode": d.of("reflect", "edge")}, (1,)
    )


@case("Pad", "axes")
def _(d: Draw) -> Call:
    inputs = [
        d.floats(*d.shape(0, 0, 0)),
        np.array([1, 0, 2, 1], np.int64),
        np.array(0.5, np.float32),
        np.array([-1, 1]),
    ]
    return Call("Pad", inputs, {}, (1, 2, 3), 1, 18)


@case("Pad", "attributes")
def _(d: Draw) -> Call:
    return Call("Pad", [d.floats(*d.shape(0, 0, 0))], {"pads": [0, d.int(0, 2), 1, 0, 1, 0]}, (), 1, d.of(7, 10))


# --------------------------------------------------------------------------------------------------- normalisations


@case("BatchNormalization")
def _(d: Draw) -> Call:
    n, c, h = d.shape(0, 0, 0)
    vectors = [d.floats(c), d.floats(c), d.floats(c), d.floats(c, positive=True)]
    return Call("BatchNormalization", [d.floats(*d.of((n, c, h), (n, c), (n, c, h, 2))), *vectors], {}, (1, 2, 3, 4))


@case("InstanceNormalization")
def _(d: Draw) -> Call:
    n, c = d.shape(0, 0)
    return Call("InstanceNormalization", [d.floats(n, c, 4, 3), d.floats(c), d.floats(c)], {}, (1, 2))


@case("LayerNormalization")
def _(d: Draw) -> Call:
    a, b, c = d.shape(0, 0, 0)
    axis = d.of(-1, 2, 1)
    shape = (b, c) if axis == 1 else (c,)
    return Call("LayerNormalization", [d.floats(a, b, c), d.floats(*shape), d.floats(*shape)], {"axis": axis}, (1, 2))


for _op in ("Softmax", "LogSoftmax", "Hardmax"):
    case(_op)(lambda d, op=_op: Call(op, [d.floats(*d.shape(0, 0, 0))], {"axis": d.int(-2, 2)}))
    case(_op, "old")(lambda d, op=_op: Call(op, [d.floats(*d.shape(0, 0, 0))], {"axis": 1}, (), 1, 11))

for _op in [
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSum",
    "ReduceSumSquare",
]:

    @case(_op)
    def _(d: Draw, op: str = _op) -> Call:
        x = d.floats(*d.shape(0, 0, 0, low=3), positive=op == "ReduceLogSum")
        axes = d.of([1], [0, 2], [-1], [])
        keep = {"keepdims": d.int(0, 1)}
        opset = d.of(11, 18)
        if opset == 18 or op == "ReduceSum":
            return Call(op, [x, np.array(axes, np.int64)], keep, (1,), 1, 18)
        return Call(op, [x], keep | ({"axes": axes} if axes else {}), (), 1, opset)


for _op in ("AveragePool", "LpPool", "MaxPool"):

    @case(_op)
    def _(d: Draw, op: str = _op) -> Call:
        return Call(op, [d.floats(*d.shape(0, 0), 5, 6)], {"kernel_shape": [2, 3], "strides": [d.int(1, 2), 1]})


for _op in ("GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool"):
    case(_op)(lambda d, op=_op: Call(op, [d.floats(*d.shape(0, 0), 3, 2)]))


# ---------------------------------------------------------------------------------------------------------- recurrent


def _recurrent(d: Draw, op: str) -> Call:
    gates = {"RNN": 1, "GRU": 3, "LSTM": 4}[op]
    direction = d.of("forward", "reverse", "bidirectional")
    n = 2 if direction == "bidirectional" else 1
    s, b, i, h = d.int(3, 4), d.int(2, 3), d.int(2, 3), d.int(2, 4)
    inputs: list[np.ndarray | None] = [d.floats(s, b, i), d.floats(n, gates * h, i), d.floats(n, gates * h, h)]
    inputs.append(d.of(None, d.floats(n, 2 * gates * h)))
    inputs.append(d.of(None, d.rng.integers(1, s + 1, b).astype(np.int32)))
    inputs.append(d.of(None, d.floats(n, b, h)))
    if op == "LSTM":
        inputs += [d.of(None, d.floats(n, b, h)), d.of(None, d.floats(n, 3 * h))]
    attributes: dict[str, Any] = {"hidden_size": h, "direction": direction}
    if op == "GRU":
        attributes["linear_before_reset"] = d.int(0, 1)
    return Call(op, inputs, attributes, (1, 2, 3, 7), 3 if op == "LSTM" else 2)


for _op in ("RNN", "GRU", "LSTM"):
    case(_op)(lambda d, op=_op: _recurrent(d, op))


# ------------------------------------------------------------------------------------------------------ more products

EQUATIONS = {
    "weights": ("btd,dhe->bthe", (1,)), "left": ("oc,bct->bot", (0,)), "attention": ("bhqd,bhkd->bhqk", ()),
    "implicit": ("ij,jk", (1,)), "ellipsis": ("...d,de->...e", (1,)), "capital": ("Bhd,dK->BhK", (1,)),
    "outer": ("i,j->ij", ()), "three": ("bi,ij,jk->bk", (1, 2)),
}  # fmt: skip


def _einsum(d: Draw, equation: str, constant: tuple[int, ...]) -> Call:
    sizes = {x: d.int(2, 4) for x in sorted(set(equation) - set(",.->"))}
    shapes = [[sizes[x] for x in word.replace("...", "")] for word in equation.split("->")[0].split(",")]
    if "..." in equation:
        shapes[0] = [2, 3, *shapes[0]]
    return Call("Einsum", [d.floats(*shape) for shape in shapes], {"equation": equation}, constant)


for _name, (_equation, _constant) in EQUATIONS.items():
    case("Einsum", _name)(lambda d, e=_equation, c=_constant: _einsum(d, e, c))

MS = "com.microsoft"


@case("FusedConv", domain=MS)
def _(d: Draw) -> Call:
    call = _conv(d, d.int(1, 3), d.int(2, 3), d.int(2, 3))
    inputs = [call.inputs[0], call.inputs[1], d.floats(call.inputs[1].shape[0])]
    call = Call("FusedConv", inputs, call.attributes | {"activation": "Relu"}, (1, 2), domain=MS)
    if d.of(True, False):
        call.inputs.append(d.floats(*call.run()[0].shape))
    return call


@case("FusedGemm", domain=MS)
def _(d: Draw) -> Call:
    call = _gemm(d, (1, 2))
    return Call("FusedGemm", call.inputs, call.attributes | {"activation": "Relu"}, (1, 2), domain=MS)


for _op in ("FusedMatMul", "TransposeMatMul"):

    @case(_op, domain=MS)
    def _(d: Draw, op: str = _op) -> Call:
        b, m, k, n = d.shape(0, 0, 0, 0)
        ta, tb = d.int(0, 1), d.int(0, 1)
        inputs = [d.floats(b, k, m) if ta else d.floats(b, m, k), d.floats(n, k) if tb else d.floats(k, n)]
        return Call(op, inputs, {"transA": ta, "transB": tb, "alpha": 0.5}, d.of((), (1,)), domain=MS)


for _op in ("Gelu", "QuickGelu"):
    case(_op, domain=MS)(lambda d, op=_op: Call(op, [d.floats(*d.shape(0, 0, 0))], domain=MS))
for _op in ("BiasGelu", "FastGelu"):

    @case(_op, domain=MS)
    def _(d: Draw, op: str = _op) -> Call:
        a, b, c = d.shape(0, 0, 0)
        return Call(op, [d.floats(a, b, c), d.floats(c)], {}, (1,), domain=MS)


# --------------------------------------------------------------------------------------------------------- attention


@case("Attention")
def _(d: Draw) -> Call:
    b, k, r, s, t, e, v = d.shape(0, 0, 0, 0, 0, 0, 0)
    causal = {"is_causal": d.int(0, 1)} if s == t else {}
    mask = d.of(None, d.floats(s, t), d.floats(b, k * r, s, t))
    if d.of(True, False):
        inputs = [d.floats(b, k * r, s, e), d.floats(b, k, t, e), d.floats(b, k, t, v)]
        return Call("Attention", [*inputs, mask], causal, (), 1, 23)
    inputs = [d.floats(b, s, k * r * e), d.floats(b, t, k * e), d.floats(b, t, k * v)]
    heads = {"q_num_heads": k * r, "kv_num_heads": k}
    return Call("Attention", [*inputs, mask], causal | heads, (), 1, 23)


@case("RotaryEmbedding")
def _(d: Draw) -> Call:
    b, h, s, e = d.shape(0, 0, 0, 4)
    caches = [d.floats(8, 2), d.floats(8, 2)]
    if d.of(True, False):
        caches = [d.floats(b, s, 2), d.floats(b, s, 2)]
        return Call("RotaryEmbedding", [d.floats(b, h, s, e), *caches], {}, (), 1, 23)
    positions = d.rng.integers(0, 8, (b, s)).astype(np.int64)
    return Call("RotaryEmbedding", [d.floats(b, s, h * e), *caches, positions], {"num_heads": h}, (), 1, 23)


@case("Attention", domain=MS)
def _(d: Draw) -> Call:
    b, s, i, h, e = d.shape(0, 0, 0, 0, 0)
    inputs = [d.floats(b, s, i), d.floats(i, 3 * h * e), d.floats(3 * h * e)]
    return Call("Attention", inputs, {"num_heads": h}, (1, 2), domain=MS)


@case("MultiHeadAttention", domain=MS)
def _(d: Draw) -> Call:
    b, s, t, h, e = d.shape(0, 0, 0, 0, 0)
    inputs: list[np.ndarray | None] = [d.floats(b, s, h * e), d.floats(b, t, h * e), d.floats(b, t, h * e)]
    if d.of(True, False):
        inputs += [None, None, d.of(d.floats(b, h, s, t), d.floats(1, 1, s, t))]
    return Call("MultiHeadAttention", inputs, {"num_heads": h}, (), domain=MS)


# ------------------------------------------------------------------------------------------------ more normalisations


@case("GroupNormalization")
def _(d: Draw) -> Call:
    g, c = d.shape(0, 0)
    opset = d.of(18, 21)
    size = g if opset == 18 else g * c
    inputs = [d.floats(2, g * c, 3, 2), d.floats(size), d.floats(size)]
    return Call("GroupNormalization", inputs, {"num_groups": g}, (1, 2), 1, opset)


@case("RMSNormalization")
def _(d: Draw) -> Call:
    a, b, c = d.shape(0, 0, 0)
    return Call("RMSNormalization", [d.floats(a, b, c), d.floats(c)], {"axis": -1}, (1,), 1, 23)


@case("SimplifiedLayerNormalization")
def _(d: Draw) -> Call:
    a, b, c = d.shape(0, 0, 0)
    return Call("SimplifiedLayerNormalization", [d.floats(a, b, c), d.floats(c)], {"axis": -1}, (1,))


@case("SkipLayerNormalization", domain=MS)
def _(d: Draw) -> Call:
    a, b, c = d.shape(0, 0, 0)
    inputs = [d.floats(a, b, c), d.floats(a, b, c), *(d.floats(c) for _ in range(d.int(2, 3)))]
    return Call("SkipLayerNormalization", inputs, {}, (2, 3, 4), domain=MS)


@case("SkipSimplifiedLayerNormalization", domain=MS)
def _(d: Draw) -> Call:
    a, b, c = d.shape(0, 0, 0)
    inputs = [d.floats(a, b, c), d.floats(a, b, c), d.floats(c)]
    return Call("SkipSimplifiedLayerNormalization", inputs, {}, (2,), domain=MS)


@case("MeanVarianceNormalization")
def _(d: Draw) -> Call:
    axes = d.of({}, {"axes": [1]}, {"axes": [2, 3]})
    return Call("MeanVarianceNormalization", [d.floats(*d.shape(0, 0, 0, 0, low=3))], axes, (), 1, 13)


@case("LpNormalization")
def _(d: Draw) -> Call:
    return Call("LpNormalization", [d.floats(*d.shape(0, 0, 0))], {"axis": d.int(-1, 2), "p": d.int(1, 2)})


@case("LRN")
def _(d: Draw) -> Call:
    return Call("LRN", [d.floats(2, d.int(4, 6), 3, 2)], {"size": 3, "alpha": 2.0})


# ---------------------------------------------------------------------------------------------- picking and placing


for _op in ("CumSum", "CumProd"):

    @case(_op)
    def _(d: Draw, op: str = _op) -> Call:
        options = {"exclusive": d.int(0, 1), "reverse": d.int(0, 1)}
        x = d.floats(*d.shape(0, 0, 0))
        return Call(op, [x, np.array(d.int(-1, 2))], options, (1,), 1, 26 if op == "CumProd" else 17)


for _op in ("ArgMax", "ArgMin"):

    @case(_op)
    def _(d: Draw, op: str = _op) -> Call:
        options = {"axis": d.int(-1, 2), "keepdims": d.int(0, 1)}
        return Call(op, [d.floats(*d.shape(0, 0, 0, low=3))], options)


@case("TopK")
def _(d: Draw) -> Call:
    x = d.floats(*d.shape(0, 0, 0, low=3))
    return Call("TopK", [x, np.array([2], np.int64)], {"axis": d.int(-1, 2)}, (1,), 2)


@case("GatherElements")
def _(d: Draw) -> Call:
    a, b, c = d.shape(0, 0, 0)
    axis = d.int(0, 2)
    shape = [a, b, c]
    size = shape[axis]
    shape[axis] = d.int(2, 5)
    index = d.rng.integers(0, size, shape)
    return Call("GatherElements", [d.floats(a, b, c), index], {"axis": axis})


for _op in ("ScatterElements", "Scatter"):

    @case(_op)
    def _(d: Draw, op: str = _op) -> Call:
        a, b, c = d.shape(0, 0, 0)
        axis = d.int(0, 2)
        index = np.argsort(d.rng.random((a, b, c)), axis=axis)  # no place is written to twice
        data, updates = d.floats(a, b, c), d.floats(a, b, c)
        return Call(op, [data, index, updates], {"axis": axis}, (), 1, 9 if op == "Scatter" else 17)


@case("GatherND")
def _(d: Draw) -> Call:
    a, b, c, e = d.shape(0, 0, 0, 0)
    batch, depth = d.of((0, 1), (0, 2), (1, 1))
    inner = [a, b, c][batch : batch + depth]
    shape = [a, e] if batch else [e, 2]
    index = np.stack([d.rng.integers(0, size, shape) for size in inner], axis=-1)
    return Call("GatherND", [d.floats(a, b, c), index], {"batch_dims": batch})


@case("ScatterND")
def _(d: Draw) -> Call:
    a, b, c = d.shape(0, 0, 0)
    depth = d.int(1, 2)
    index = np.stack([d.rng.permutation(a)[:2]] * depth, axis=-1) % min(a, b)
    index = np.unique(index, axis=0)
    updates = d.floats(len(index), *([a, b, c][depth:]))
    return Call("ScatterND", [d.floats(a, b, c), index, updates])


@case("ScatterND", "block")
def _(d: Draw) -> Call:
    a, b, c = d.shape(0, 0, 0)
    rows = [np.arange(a), np.arange(d.int(1, b - 1), b), np.arange(c)][: d.int(2, 3)]
    index = np.stack(np.meshgrid(*rows, indexing="ij"), axis=-1)
    updates = d.floats(*index.shape[:-1], *([c] if len(rows) == 2 else []))
    return Call("ScatterND", [d.floats(a, b, c), index, updates], {}, (1,))


@case("OneHot")
def _(d: Draw) -> Call:
    index = d.rng.integers(0, 3, d.shape(0, 0))
    return Call("OneHot", [index, np.array(3), np.array([0.0, 1.0], np.float32)], {"axis": d.int(-1, 2)}, (1, 2))


@case("ReverseSequence")
def _(d: Draw) -> Call:
    a, b, c = d.shape(0, 0, 0, low=3)
    time, batch = d.of((0, 1), (1, 0))
    lengths = d.rng.integers(2, (a, b)[time] + 1, (a, b)[batch])
    return Call("ReverseSequence", [d.floats(a, b, c), lengths], {"time_axis": time, "batch_axis": batch})


@case("Trilu")
def _(d: Draw) -> Call:
    return Call("Trilu", [d.floats(*d.shape(0, 0, 0, low=3))], {"upper": d.int(0, 1)})


@case("Det")
def _(d: Draw) -> Call:
    return Call("Det", [d.floats(*d.shape(0, 0), 3, 3)])


@case("GridSample")
def _(d: Draw) -> Call:
    n, c = d.shape(0, 0)
    return Call("GridSample", [d.floats(n, c, 4, 5), d.floats(n, 3, 2, 2)])


@case("RoiAlign")
def _(d: Draw) -> Call:
    c, r = d.shape(0, 0)
    start = d.rng.uniform(0, 3, (r, 2))
    rois = np.concatenate([start, start + d.rng.uniform(1, 4, (r, 2))], 1).astype(np.float32)
    options = {"output_height": 2, "output_width": 3, "mode": d.of("avg", "max"), "sampling_ratio": 2}
    return Call("RoiAlign", [d.floats(2, c, 8, 8), rois, d.rng.integers(0, 2, r)], options)


@case("MaxRoiPool")
def _(d: Draw) -> Call:
    c, r = d.shape(0, 0)
    start = d.rng.integers(0, 3, (r, 2))
    corners = [d.rng.integers(0, 2, (r, 1)), start, start + d.rng.integers(1, 4, (r, 2))]
    rois = np.concatenate(corners, 1).astype(np.float32)
    return Call("MaxRoiPool", [d.floats(2, c, 8, 8), rois], {"pooled_shape": [2, 2]})


@case("Col2Im")
def _(d: Draw) -> Call:
    n, c = d.shape(0, 0)
    inputs = [d.floats(n, c * 4, 4), np.array([4, 4]), np.array([2, 2])]
    return Call("Col2Im", inputs, {"strides": [2, 2]}, (1, 2), 1, 18)


@case("DeformConv")
def _(d: Draw) -> Call:
    g, c, o = d.int(1, 3), d.int(2, 3), d.int(2, 3)
    inputs = [d.floats(2, g * c, 4, 4), d.floats(g * o, c, 3, 3), d.floats(2, 18, 4, 4), d.floats(g * o)]
    return Call("DeformConv", inputs, {"group": g, "pads": [1] * 4}, (1, 3), 1, 19)


@case("ConstantOfShape")
def _(d: Draw) -> Call:
    value = helper.make_tensor("v", onnx.TensorProto.FLOAT, [1], [2.0])
    return Call("ConstantOfShape", [np.array(d.shape(0, 0, 0))], {"value": value}, (0,))


# ----------------------------------------------------------------------------------------------------- quantisation


def _quantised(d: Draw, op: str, domain: str) -> Call:
    shape = d.shape(0, 0, 0)
    axis = d.int(-3, 2)
    scale, point = d.of(((), ()), ((shape[axis],), (shape[axis],)), ((), None), ((shape[axis],), None))
    x = d.floats(*shape) if op == "QuantizeLinear" else d.rng.integers(0, 255, shape).astype(np.uint8)
    inputs: list[np.ndarray | None] = [x, d.floats(*scale, positive=True) / np.float32(20)]
    inputs[1] = np.asarray(inputs[1], np.float32)
    if point is not None or domain:
        inputs.append(np.asarray(d.rng.integers(100, 120, scale), np.uint8))
    attributes = {"axis": axis} if scale else {}
    return Call(op, inputs, attributes, (1, 2), domain=domain)


for _op in ("QuantizeLinear", "DequantizeLinear"):
    for _domain in ("", MS):
        case(_op, domain=_domain)(lambda d, op=_op, domain=_domain: _quantised(d, op, domain))


# --------------------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("name", CASES)
def test_the_law_holds(name: str) -> None:
    # the largest of three values is seldom the one taken out: these need more draws until the law fails
    check(name, CASES[name], 24 if name in ("ReduceMax", "ReduceMin") else EXAMPLES)


WRONG = {
    "a convolution whose groups are read across": ("Conv-grouped", "n (g c) *, (c o) g *, (c o) -> n (c o) *"),
    "a normalised axis that is not marked": ("LayerNormalization", "* c, c, c -> * c"),
    "a softmax over an axis that is not marked": ("Softmax-fixed", "a b c -> a b c"),
    "a product over an axis that is not marked": ("ReduceProd-fixed", "a b c -> a 1 c"),
    "an axis that is marked for nothing": ("Relu-fixed", "a !b c -> a b c"),
    "a transpose that turns nothing": ("Transpose-fixed", "a b c -> a c b"),
    "a matrix whose rows are its columns": ("Gemm-fixed", "m k, k n, n -> m n"),
    "activations that are summed over": ("MatMul-activations", "* h m k, * k n -> * h m n"),
    "channels of the wrong order": ("DepthToSpace-fixed", "b (c r s) h w -> b c (h r) (w s)"),
}
FIXED: dict[str, Callable[[Draw], Call]] = {
    "Softmax-fixed": lambda d: Call("Softmax", [d.floats(2, 3, 4)], {"axis": 1}),
    "ReduceProd-fixed": lambda d: Call("ReduceProd", [d.floats(2, 3, 4)], {"axes": [1]}),
    "Relu-fixed": lambda d: Call("Relu", [d.floats(2, 3, 4)]),
    "Transpose-fixed": lambda d: Call("Transpose", [d.floats(2, 3, 3)], {"perm": [0, 1, 2]}),
    "Gemm-fixed": lambda d: Call("Gemm", [d.floats(2, 3), d.floats(3, 3), d.floats(3)], {"transB": 1}, (1, 2)),
    "MatMul-activations": lambda d: Call("MatMul", [d.floats(2, 2, 3), d.floats(2, 3, 2)]),
    "DepthToSpace-fixed": lambda d: Call("DepthToSpace", [d.floats(1, 12, 2, 3)], {"blocksize": 2, "mode": "DCR"}),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_row_is_caught(name: str) -> None:
    which, spec = WRONG[name]
    right = FIXED.get(which) or CASES[which]
    found = row_for("", which.split("-")[0], 17)
    assert found is not None
    wrong = Row(spec, repair=found.repair, sizes=found.sizes, weights=found.weights)
    with pytest.raises((AssertionError, BaseExceptionGroup)):
        check(name, right, EXAMPLES, wrong)


# rows for which the law says nothing: what they give is not a part of what they are given
NO_LAW = {
    "Constant": "has no input",
    "Shape": "gives sizes, which change with a cut; the rewrite keeps them right (test_rewrite)",
    "Size": "gives sizes, which change with a cut; the rewrite keeps them right (test_rewrite)",
}


def test_every_row_has_a_case() -> None:
    rows = {key for key, rows in TABLE.items() if not all(isinstance(row.describe, Refusal) for row in rows)}
    assert not {key for key in rows if key[1] not in NO_LAW} - set(CASE_OPS.values())


def test_every_operator_has_a_row_or_a_reason() -> None:
    for schema in onnx.defs.get_all_schemas():
        if schema.domain == "":
            row = row_for("", schema.name, schema.since_version)
            assert row is not None, schema.name
            if isinstance(row.describe, Refusal):
                assert schema.name in row.describe.reason


def test_an_unknown_operator_is_named_with_its_domain() -> None:
    assert describe(OpView("Foo", "acme", 1, {}, (), (), (), ())) == Refusal(
        "no rule for operator acme.Foo", known=False
    )
