"""The law that every row of the table is held against, and the register of its cases.

For random legal sizes and attributes, a letter and a random set to keep, ``run(take(inputs)) == take(run(inputs))``,
with the node repaired; for a letter that is read away, ``run(take(inputs)) == run(zeroed(inputs))``; for a letter
marked ``!`` it has to fail for some draw, and for one marked ``~`` where nothing was zeroed. Positions that an index
map relates are taken out together, and the same law holds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from builder import IR, RUNTIME
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from onnxprune.axes import BoundAxis, BoundRelation, Refusal
from onnxprune.rules.base import Kept, OpView, Repair, Row, describe, row_for

EXAMPLES = 12
MS = "com.microsoft"


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
            [self.node(names, outputs)],
            "one",
            inputs,
            [helper.make_empty_tensor_value_info(o) for o in outputs],
            stored,
        )
        opsets = [helper.make_opsetid("", self.opset)] + ([helper.make_opsetid(self.domain, 1)] if self.domain else [])
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR)

    def node(self, names: list[str], outputs: list[str]) -> onnx.NodeProto:
        """The node itself."""
        return helper.make_node(self.op, names, outputs, domain=self.domain, **self.attributes)

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
        return replace(self, inputs=inputs, attributes=attributes, constant=tuple(constant))


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
                changed = replace(call, inputs=inputs)
                expected.append(changed.run())
        elif call.op in ("LSTM", "GRU", "RNN"):  # a unit feeds the others of the next step, through silenced weights
            inputs = [a if k not in silent or a is None else zeroed(a, k, gone) for k, a in enumerate(call.inputs)]
            quiet = replace(call, inputs=inputs).run()
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
