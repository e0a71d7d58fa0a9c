"""What a row of the table is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from onnxprune.axes import BoundRelation, IndexMap, NotationError, Refusal, Relation, Shape, bind, parse

Sizes = list[list[int]]  # per axis the size at every probe


@dataclass(frozen=True, eq=False)
class OpView:
    """All that a row may know of one operator call."""

    op: str
    domain: str
    version: int
    attributes: Mapping[str, Any]
    in_sizes: tuple[Sizes | None, ...]  # None: absent
    out_sizes: tuple[Sizes | None, ...]
    values: tuple[np.ndarray | None, ...]  # of inputs that are constants, where they are at hand
    constant: tuple[bool, ...]  # computed from constants alone, and zero where those are
    seen: tuple[np.ndarray | None, ...] = ()  # of all short inputs, as they were when the model was probed

    def in_shape(self, k: int) -> Shape:
        """Shape of a present input, at the first probe."""
        sizes = self.in_sizes[k] or []
        return tuple(axis[0] for axis in sizes)

    def out_shape(self, k: int = 0) -> Shape:
        """Shape of a present output, at the first probe."""
        sizes = self.out_sizes[k] or []
        return tuple(axis[0] for axis in sizes)

    def has(self, k: int) -> bool:
        """Whether input ``k`` is present."""
        return k < len(self.in_sizes) and self.in_sizes[k] is not None

    def value(self, k: int, attribute: str = "") -> np.ndarray | None:
        """A parameter that is an attribute in old opsets and an input in newer ones; None where it is unknown."""
        if attribute and attribute in self.attributes:
            return np.asarray(self.attributes[attribute])
        return self.values[k] if k < len(self.values) else None

    def axis(self, default: int, name: str = "axis", rank: int | None = None) -> int:
        """An axis attribute, made non-negative."""
        axis = int(self.attributes.get(name, default))
        return axis % (rank if rank is not None else len(self.in_shape(0)))


@dataclass(frozen=True, eq=False)
class Kept:
    """What is left of an operator's operands: per axis the kept positions (None: all of them)."""

    inputs: tuple[tuple[np.ndarray | None, ...], ...]
    outputs: tuple[tuple[np.ndarray | None, ...], ...]

    def in_size(self, op: OpView, k: int, axis: int) -> int:
        """The new size of an input's axis."""
        kept = self.inputs[k][axis]
        return op.in_shape(k)[axis] if kept is None else len(kept)

    def out_size(self, op: OpView, k: int, axis: int) -> int:
        """The new size of an output's axis."""
        kept = self.outputs[k][axis]
        return op.out_shape(k)[axis] if kept is None else len(kept)


@dataclass(frozen=True)
class Repair:
    """What has to change in a node that states a size, or counts one.

    Attributes:
        attributes: new values; None takes an attribute away.
        inputs: whole new values for some inputs.
        factor: what the output has to be multiplied by.
    """

    attributes: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[int, np.ndarray] = field(default_factory=dict)
    factor: float = 1.0


BODY = "has a body, and channels that cross into a body stay; export without control flow"
TURN = "onnxprune.turn"  # attribute of an open loop: how many inputs it has, and how many its body has
Describe = Callable[[OpView], Relation | Refusal]
Mend = Callable[[OpView, Kept], Repair]
Clauses = tuple[tuple[int, ...], ...]
ALL: Clauses = ((-1,),)  # a slice of the output is zero where it is zero in every input
FIRST: Clauses = ((0,),)  # ... in the first input; the others are limits, sizes, indices
EITHER: Clauses = ((0,), (1,))  # ... in one of two inputs


@dataclass(frozen=True)
class Row:
    """One row of the table: a text, a function that returns a relation, or a refusal for operators that are left alone.

    ``weights`` are the inputs whose removed slices are silenced by zeros: an exact zero there makes the operator
    compute as if the channel were not there. ``sizes`` gives letters that shapes do not determine. ``zero`` says when a
    slice of the outputs is zero (see `onnxprune.axes.BoundRelation`); never, unless it says so. ``approximable``: what
    it mixes or sums is a statistic (a mean, a variance), which fewer channels still give approximately; a repair then
    makes up for the channels that went as if they were zero. ``poles`` are the inputs of which zeros give what is not
    finite, so that no channel can be silenced there.
    """

    describe: Describe | str | Refusal
    since: int = 1
    repair: Mend | None = None
    sizes: Callable[[OpView], dict[str, int]] | None = None
    weights: tuple[int, ...] = ()
    zero: Clauses | Callable[[OpView], Clauses] = ()
    approximable: bool = False
    poles: tuple[int, ...] | Callable[[OpView], tuple[int, ...]] = ()


Table = dict[tuple[str, str], list[Row]]
TABLE: Table = {}


def add(table: Table, names: str, *rows: Row, domain: str = "") -> None:
    """Put rows under one or several operator names (separated by spaces)."""
    for name in names.split():
        table.setdefault((domain, name), []).extend(rows)


def row_for(domain: str, op: str, version: int) -> Row | None:
    """The row in force for an operator at an opset version."""
    rows = [row for row in TABLE.get((domain, op), ()) if row.since <= version]
    return max(rows, key=lambda row: row.since) if rows else None


def refusal(domain: str, op: str, version: int) -> Refusal | None:
    """What the table says of an operator that is left alone whatever it is called with."""
    row = row_for(domain, op, version)
    return row.describe if row is not None and isinstance(row.describe, Refusal) else None


def describe(op: OpView, row: Row | None = None) -> BoundRelation | Refusal:
    """What the table (or a given row) says about one operator call, bound to its shapes."""
    row = row or row_for(op.domain, op.op, op.version)
    if row is None:
        name = f"{op.domain}.{op.op}" if op.domain else op.op
        return Refusal(f"no rule for operator {name}", known=False)
    if isinstance(row.describe, Refusal):
        return row.describe
    relation = parse(row.describe) if isinstance(row.describe, str) else row.describe(op)
    if isinstance(relation, Refusal):
        return relation
    sizes = row.sizes(op) if row.sizes else None
    try:
        bound = bind(relation, _shapes_at(op.in_sizes, 0), _shapes_at(op.out_sizes, 0), sizes)
        varying = _varying(op, relation, bound, sizes)
    except NotationError as error:
        return Refusal(f"the rule of {op.op} does not fit this call ({error})")
    zero = row.zero(op) if callable(row.zero) else row.zero
    if zero == ALL:
        zero = (tuple(range(len(op.in_sizes))),)
    silenced = frozenset(k for k in row.weights if k < len(op.constant) and op.constant[k])
    poles = frozenset(row.poles(op) if callable(row.poles) else row.poles)
    return replace(bound, zero=zero, silenced=silenced, varying=varying, approximable=row.approximable, poles=poles)


def _shapes_at(sizes: Sequence[Sizes | None], which: int) -> list[Shape | None]:
    return [None if s is None else tuple(axis[which] for axis in s) for s in sizes]


def _varying(op: OpView, relation: Relation, bound: BoundRelation, sizes: Mapping[str, int] | None) -> frozenset[str]:
    """Letters whose size is another one at another probe, of relations that have products."""
    if not any(len(axis.letters) > 1 for operand in (*bound.inputs, *bound.outputs) for axis in operand):
        return frozenset()
    probes = max((len(axis) for s in (*op.in_sizes, *op.out_sizes) if s for axis in s), default=1)
    others = [
        bind(relation, _shapes_at(op.in_sizes, k), _shapes_at(op.out_sizes, k), sizes).sizes for k in range(1, probes)
    ]
    return frozenset(x for x, size in bound.sizes.items() if any(other[x] != size for other in others))


def letters(shape: Sequence[int], prefix: str = "a") -> list[str]:
    """One letter per axis."""
    return [f"{prefix}{k}" for k in range(len(shape))]


def broadcast(shapes: Sequence[Shape | None], out: Shape) -> list[str]:
    """Operands of an element-wise operator in the notation, aligned at the right; absent ones are empty."""
    names = letters(out)
    operands = []
    for shape in shapes:
        if shape is None:
            operands.append("")
            continue
        tail = names[len(names) - len(shape) :] if shape else []
        operands.append(" ".join("1" if dim == 1 else name for dim, name in zip(shape, tail, strict=True)))
    return operands


def along(shape: Shape, axis: int, token: str) -> str:
    """All axes by letter but one, which gets ``token``."""
    names = letters(shape)
    names[axis] = token
    return " ".join(names)


def relate(inputs: Sequence[str], outputs: Sequence[str], maps: tuple[IndexMap, ...] = ()) -> Relation:
    """A relation from the texts of its operands."""
    relation = parse(f"{', '.join(inputs)} -> {', '.join(outputs)}")
    return Relation(relation.inputs, relation.outputs, maps)
