"""The notation in which an operator says how the axes of its inputs and outputs relate.

One line describes an operator::

    Conv      n (g c) *, (g o) c *, (g o) -> n (g o) *
    Softmax   n !c * -> n !c *

A letter is an axis or a factor of one; parentheses hold the product of factors, outermost first; ``*`` is the
remaining axes, untouched and unclaimed; ``1`` is an axis of size one that is broadcast; ``!`` marks a factor whose
values are mixed together, so that a part of it cannot be taken out exactly; ``~`` one that is summed over, so that a
part can be taken out where it is zero; ``@`` is an axis whose positions are related one by one through an `IndexMap`
(Concat, Split, Slice, Gather, Pad). A letter stands for the same index wherever it appears.

This module knows arrays and letters, and nothing of ONNX.

>>> str(parse("n (g c) *, (g o) c * -> n (g o) *"))
'n (g c) *, (g o) c * -> n (g o) *'
>>> bound = bind(parse("n (g c) *, (g o) c *, (g o) -> n (g o) *"), [(2, 8, 5), (6, 4, 3), (6,)], [(2, 6, 3)])
>>> sorted(bound.sizes.items())
[('c', 4), ('g', 2), ('n', 2), ('o', 3)]
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

Shape = tuple[int, ...]
Letters = tuple[str, ...]


class NotationError(ValueError):
    """A specification that does not parse, or does not fit the shapes that it is bound to."""


@dataclass(frozen=True)
class Axis:
    """One axis of an operand: a product of letters, or a token (``*``, ``1``, ``@``)."""

    letters: Letters = ()
    mixed: frozenset[str] = frozenset()
    summed: frozenset[str] = frozenset()
    token: str = ""

    def __str__(self) -> str:
        if self.token:
            return self.token
        words = [("!" if x in self.mixed else "~" if x in self.summed else "") + x for x in self.letters]
        return words[0] if len(words) == 1 else f"({' '.join(words)})"


Operand = tuple[Axis, ...]


@dataclass(frozen=True, eq=False)
class IndexMap:
    """Where every position of one output axis comes from.

    ``operand[i]`` and ``position[i]`` name the input and the index on its axis ``in_axis`` that position ``i`` of
    axis ``axis`` of output ``output`` copies; ``operand[i] == -1`` where it copies nothing (padding).
    """

    output: int
    axis: int
    in_axis: int
    operand: np.ndarray
    position: np.ndarray


@dataclass(frozen=True)
class Relation:
    """What one operator says about the axes of its operands. Printable; see the module's docstring."""

    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    maps: tuple[IndexMap, ...] = ()

    def __str__(self) -> str:
        sides = (", ".join(" ".join(map(str, operand)) for operand in side) for side in (self.inputs, self.outputs))
        return " -> ".join(sides)


@dataclass(frozen=True)
class Refusal:
    """No relation, and why: every axis of the operator's operands is frozen.

    What could be done about it stands behind a semicolon. ``known`` is false where no row speaks for the operator.
    """

    reason: str
    known: bool = True


@dataclass(frozen=True)
class BoundAxis:
    """An axis of an operand with letters and sizes known. ``claimed`` is false where no letter or map speaks for it."""

    letters: Letters
    claimed: bool
    mixed: frozenset[str] = frozenset()
    summed: frozenset[str] = frozenset()
    mapped: bool = False

    def __str__(self) -> str:
        if self.mapped or not self.letters:
            return "@" if self.mapped else "1" if self.claimed else "*"
        return str(Axis(self.letters, self.mixed, self.summed))


@dataclass(frozen=True)
class BoundRelation:
    """A relation bound to concrete shapes: per operand one `BoundAxis` per axis; letters of size one are gone.

    ``zero`` says when a slice of the outputs is zero: one of its clauses holds, that is, the slice is zero in all
    inputs that the clause names. ``silenced`` are the inputs whose removed slices are made zero: stored weights.
    ``varying`` are letters of product axes whose size depends on the data: a batch beside heads. ``approximable`` says
    that what is mixed or summed is a statistic, which fewer channels still give approximately. ``poles`` are the inputs
    of which a slice of zeros gives what is not finite.
    """

    inputs: tuple[tuple[BoundAxis, ...], ...]
    outputs: tuple[tuple[BoundAxis, ...], ...]
    sizes: dict[str, int]
    maps: tuple[IndexMap, ...] = field(default=())
    zero: tuple[tuple[int, ...], ...] = ()
    silenced: frozenset[int] = frozenset()
    varying: frozenset[str] = frozenset()
    approximable: bool = False
    poles: frozenset[int] = frozenset()

    def __str__(self) -> str:
        sides = (", ".join(" ".join(map(str, operand)) for operand in side) for side in (self.inputs, self.outputs))
        return " -> ".join(sides)


_TOKEN = re.compile(r"\s*(\(|\)|[*1@]|[!~]?[a-z][a-z0-9_]*)")


def _axis(words: Sequence[str]) -> Axis:
    marked = {mark: frozenset(w[1:] for w in words if w[0] == mark) for mark in "!~"}
    return Axis(tuple(w.lstrip("!~") for w in words), marked["!"], marked["~"])


def _parse_operand(text: str) -> Operand:
    axes: list[Axis] = []
    group: list[str] | None = None
    at, end = 0, len(text.rstrip())
    while at < end:
        match = _TOKEN.match(text, at)
        if match is None:
            raise NotationError(f"cannot read {text!r} at column {at}")
        token, at = match.group(1), match.end()
        if token == "(":
            if group is not None:
                raise NotationError(f"nested parentheses in {text!r}")
            group = []
        elif token == ")":
            if group is None:
                raise NotationError(f"unbalanced ')' in {text!r}")
            if not group:
                raise NotationError(f"empty parentheses in {text!r}")
            axes.append(_axis(group))
            group = None
        elif token in "*1@":
            if group is not None:
                raise NotationError(f"{token!r} within parentheses in {text!r}")
            axes.append(Axis(token=token))
        elif group is None:
            axes.append(_axis([token]))
        else:
            group.append(token)
    if group is not None:
        raise NotationError(f"unbalanced '(' in {text!r}")
    if sum(axis.token == "*" for axis in axes) > 1:
        raise NotationError(f"more than one '*' in {text!r}")
    return tuple(axes)


@functools.lru_cache(maxsize=4096)
def parse(text: str) -> Relation:
    """Read a relation from its text.

    Raises:
        NotationError: the text is not in the notation.
    """
    sides = text.split("->")
    if len(sides) != 2:
        raise NotationError(f"expected 'inputs -> outputs', found {text!r}")
    inputs, outputs = (tuple(_parse_operand(part) for part in side.split(",")) for side in sides)
    return Relation(inputs, outputs)


def _expand(operand: Operand, rank: int) -> list[Axis]:
    """The operand's axes, ``*`` written out to the rank."""
    rest = rank - sum(axis.token != "*" for axis in operand)
    has_rest = any(axis.token == "*" for axis in operand)
    if rest < 0 or (rest and not has_rest):
        raise NotationError(f"'{' '.join(map(str, operand))}' does not fit a tensor of rank {rank}")
    axes: list[Axis] = []
    for axis in operand:
        axes.extend([axis] * rest if axis.token == "*" else [axis])
    return axes


def bind(
    relation: Relation,
    in_shapes: Sequence[Shape | None],
    out_shapes: Sequence[Shape | None],
    sizes: Mapping[str, int] | None = None,
) -> BoundRelation:
    """Give every letter its size.

    Args:
        relation: the relation; operands beyond those it names are unclaimed.
        in_shapes: a shape per input, None for an absent one.
        out_shapes: a shape per output, None for an absent one.
        sizes: sizes that the shapes alone do not determine (the ``g`` of a grouped convolution).

    Raises:
        NotationError: ranks or sizes contradict the relation.
    """
    known = dict(sizes or {})
    operands: list[tuple[list[Axis], Shape]] = []
    sides: list[list[int | None]] = []
    for specs, shapes in ((relation.inputs, in_shapes), (relation.outputs, out_shapes)):
        side: list[int | None] = []
        for k, shape in enumerate(shapes):
            if shape is None:
                side.append(None)
                continue
            spec = specs[k] if k < len(specs) else (Axis(token="*"),)
            side.append(len(operands))
            operands.append((_expand(spec, len(shape)), tuple(shape)))
        sides.append(side)
    while True:
        grew = False
        for axes, shape in operands:
            for axis, size in zip(axes, shape, strict=True):
                unknown = [letter for letter in axis.letters if letter not in known]
                if len(unknown) == 1:
                    rest = int(np.prod([known[x] for x in axis.letters if x in known], dtype=np.int64))
                    if rest == 0 or size % rest:
                        raise NotationError(f"size {size} of axis {axis} is not a multiple of {rest}")
                    known[unknown[0]] = size // rest
                    grew = True
        if not grew:
            break
    for axes, shape in operands:
        for axis, size in zip(axes, shape, strict=True):
            if axis.letters and any(letter not in known for letter in axis.letters):
                raise NotationError(f"the sizes of {axis} cannot be told apart")
            if axis.letters and int(np.prod([known[x] for x in axis.letters], dtype=np.int64)) != size:
                raise NotationError(f"axis {axis} has size {size}, expected {[known[x] for x in axis.letters]}")
    bound = [
        tuple(
            BoundAxis(
                tuple(x for x in axis.letters if known[x] > 1),
                claimed=bool(axis.letters) or axis.token == "@",
                mixed=frozenset(x for x in axis.mixed if known[x] > 1),
                summed=frozenset(x for x in axis.summed if known[x] > 1),
                mapped=axis.token == "@",
            )
            for axis in axes
        )
        for axes, _ in operands
    ]
    empty: tuple[BoundAxis, ...] = ()
    ins, outs = (tuple(empty if k is None else bound[k] for k in side) for side in sides)
    return BoundRelation(ins, outs, known, relation.maps)


def factor(before: Sequence[Sequence[int]], after: Sequence[Sequence[int]]) -> tuple[str, str] | None:
    """Relate the axes of a reshape by greatest common divisors.

    Args:
        before: per axis of the input its sizes, one for every probe of the model.
        after: the same for the output.

    Returns:
        The two operands in the notation, or None where the sizes are not made of common factors.

    >>> factor([[2], [12], [5]], [[2], [3], [20]])
    ('a0 (a1 a2) a3', 'a0 a1 (a2 a3)')
    """
    left: list[list[str]] = [[] for _ in before]
    right: list[list[str]] = [[] for _ in after]
    rest_left = [np.array(sizes, dtype=np.int64) for sizes in before]
    rest_right = [np.array(sizes, dtype=np.int64) for sizes in after]
    if any((size <= 0).any() for size in (*rest_left, *rest_right)):
        return None
    i = j = count = 0
    while i < len(before) or j < len(after):
        if i < len(before) and (rest_left[i] == 1).all():
            i += 1
            continue
        if j < len(after) and (rest_right[j] == 1).all():
            j += 1
            continue
        if i == len(before) or j == len(after):
            return None
        common = np.gcd(rest_left[i], rest_right[j])
        if (common == 1).all():
            return None
        # the factor must be the inner or outer part at every probe alike: one side has to be used up
        if not ((common == rest_left[i]).all() or (common == rest_right[j]).all()):
            # a factor in common, then remainders that interleave: only a full common divisor keeps row-major order
            return None
        letter = f"a{count}"
        count += 1
        left[i].append(letter)
        right[j].append(letter)
        rest_left[i] //= common
        rest_right[j] //= common

    def write(axes: list[list[str]]) -> str:
        return " ".join("1" if not x else x[0] if len(x) == 1 else f"({' '.join(x)})" for x in axes)

    return write(left), write(right)
