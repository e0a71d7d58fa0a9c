"""Relations -> units -> groups: what has to be removed together.

Relations say which positions are the same one (`onnxprune.positions`); the connected components are the units. Where
an axis is a product of factors, one of them is chosen to be cut (`onnxprune.choices`). Units that are alike make a
group.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune.axes import BoundAxis, BoundRelation, Refusal
from onnxprune.choices import Solver
from onnxprune.positions import VARYING, AxisId, Edges, Kind, Positions, Seed, Split, Statement

_TOGETHER = "its channels could only go all together"


@dataclass(frozen=True, eq=False)
class GroupAxis:
    """The positions of one tensor's axis that a group's units hold: ``positions[unit]`` are the unit's, sorted."""

    tensor: str
    axis: int
    positions: np.ndarray  # (units, positions per unit)


@dataclass(frozen=True, eq=False)
class Group:
    """Units that are alike: the same producers and the same readers."""

    index: int
    axes: tuple[GroupAxis, ...]

    @property
    def units(self) -> int:
        """Number of units."""
        return len(self.axes[0].positions)


@dataclass(frozen=True, eq=False)
class Coupling:
    """The outcome: groups, and for every axis that stays, the seed that froze it."""

    groups: tuple[Group, ...]
    frozen: dict[AxisId, tuple[Seed, int]]  # the seed and how many positions of the axis stay because of freezing
    approximate: dict[int, frozenset[str]]  # per such statement the letters of which a statistic is taken


class _Builder:
    """Collects edges, frozen positions and splits from the statements."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], approximate: bool = False) -> None:
        self.leave_statistics = approximate
        self.approximate: dict[int, frozenset[str]] = {}
        self.positions = Positions()
        for tensor, shape in shapes.items():
            self.positions.add(tensor, shape)
        self.edges = Edges(self.positions.total)
        self.seed_of = np.full(self.positions.total, -1, np.int64)
        self.seeds: list[Seed] = []
        self.splits: list[Split] = []
        self.zero: set[AxisId] = set()  # axes whose slices are zero in the silenced model

    def freeze(self, tensor: str, axis: int, seed: Seed) -> None:
        """Freeze a whole axis; the first reason stands."""
        if (tensor, axis) in self.positions.offset:
            start = self.positions.offset[tensor, axis]
            part = self.seed_of[start : start + self.positions.size[tensor, axis]]
            if (part < 0).any():
                part[part < 0] = len(self.seeds)
                self.seeds.append(seed)

    def freeze_statement(self, statement: Statement, kind: Kind, reason: str, axes: Iterable[AxisId]) -> None:
        for tensor, axis in axes:
            self.freeze(tensor, axis, Seed(kind, reason, statement.node, statement.op, tensor, axis))

    def state(self, statement: Statement, index: int) -> None:
        """Take in what one operator says; ``index`` is its place among the statements."""
        operands = [(name, k, True) for k, name in enumerate(statement.inputs) if name]
        operands += [(name, k, False) for k, name in enumerate(statement.outputs) if name]
        relation = statement.relation
        if isinstance(relation, Refusal):
            everything = [(n, a) for n, _, _ in operands for a in self._axes(n)]
            kind = Kind.REFUSED if relation.known else Kind.UNKNOWN
            self.freeze_statement(statement, kind if statement.seen else Kind.UNSEEN, relation.reason, everything)
            return
        occurrences: list[tuple[AxisId, BoundAxis]] = []
        for name, k, is_input in operands:
            side = relation.inputs if is_input else relation.outputs
            for axis, bound in enumerate(side[k] if k < len(side) else ()):
                occurrences.append(((name, axis), bound))
                if not bound.claimed:
                    reason = f"{statement.op} gives no rule for this axis"
                    self.freeze_statement(statement, Kind.UNCLAIMED, reason, [(name, axis)])
        # letters that cannot be cut, and why
        whole = dict.fromkeys(sorted(relation.varying), (Kind.DYNAMIC, VARYING))
        mixes = f"{statement.op} mixes the values of this axis"
        sums = f"{statement.op} sums over this axis, and a silenced channel is not zero there"
        mixed = sorted({x for _, bound in occurrences for x in bound.mixed})
        open_sums = {x for _, bound in occurrences for x in bound.summed if not self._is_zero(statement, relation, x)}
        statistics = frozenset[str]()
        if relation.approximable and self.leave_statistics:
            if statistics := frozenset({*mixed, *open_sums}):
                self.approximate[index] = statistics
        else:
            statistic = relation.approximable
            whole |= dict.fromkeys(mixed, (Kind.NORMALISED if statistic else Kind.MIXED, mixes))
            whole |= dict.fromkeys(sorted(open_sums), (Kind.NORMALISED if statistic else Kind.SUMMED, sums))
        pole = f"{statement.op} of zeros, as a silenced channel has them there, is not finite"
        whole |= dict.fromkeys(sorted(self._poles(statement, relation)), (Kind.POLE, pole))
        for axis_id, bound in occurrences:
            if bound.letters and set(bound.letters) <= set(whole):
                self.freeze_statement(statement, *whole[bound.letters[0]], [axis_id])
        lettered = [(a, b.letters) for a, b in occurrences if b.claimed and b.letters]
        self._relate_letters(statement, relation, lettered, frozenset(whole), statistics)
        self._relate_maps(statement, relation)
        self._note_zeros(statement, relation)

    def _is_zero(self, statement: Statement, relation: BoundRelation, letter: str) -> bool:
        """Whether, in some input, the slices along the letter are zero when silenced."""
        return any(
            k in relation.silenced or (name, axis) in self.zero
            for k, name in enumerate(statement.inputs)
            if name and k < len(relation.inputs)
            for axis, bound in enumerate(relation.inputs[k])
            if letter in bound.letters
        )

    def _poles(self, statement: Statement, relation: BoundRelation) -> set[str]:
        """Letters along which silenced slices are zero in an input that must not be."""
        return {
            letter
            for k in relation.poles
            if k < len(relation.inputs)
            for axis, bound in enumerate(relation.inputs[k])
            if (statement.inputs[k], axis) in self.zero
            for letter in bound.letters
        }

    def _note_zeros(self, statement: Statement, relation: BoundRelation) -> None:
        """Note the output axes whose silenced slices are zero: a clause of the relation holds for every letter."""

        def holds(operand: int, letter: str) -> bool:
            name = statement.inputs[operand] if operand < len(relation.inputs) else ""
            return not name or any(
                operand in relation.silenced or (name, axis) in self.zero
                for axis, bound in enumerate(relation.inputs[operand])
                if letter in bound.letters
            )

        def mapped(operand: int) -> bool:
            name = statement.inputs[operand] if operand < len(relation.inputs) else ""
            return not name or any(
                bound.mapped and (operand in relation.silenced or (name, axis) in self.zero)
                for axis, bound in enumerate(relation.inputs[operand])
            )

        for name, operand in zip(statement.outputs, relation.outputs, strict=True):
            for axis, bound in enumerate(operand):
                if name and any(
                    all(mapped(k) for k in clause)
                    if bound.mapped
                    else bound.letters and all(holds(k, letter) for letter in bound.letters for k in clause)
                    for clause in relation.zero
                ):
                    self.zero.add((name, axis))

    def _axes(self, tensor: str) -> list[int]:
        axes: list[int] = []
        while (tensor, len(axes)) in self.positions.offset:
            axes.append(len(axes))
        return axes

    def _relate_maps(self, statement: Statement, relation: BoundRelation) -> None:
        for index_map in relation.maps:
            output = statement.outputs[index_map.output]
            if not output:
                continue
            start = self.positions.offset[output, index_map.axis]
            for operand in np.unique(index_map.operand[index_map.operand >= 0]):
                here = np.flatnonzero(index_map.operand == operand)
                origin = self.positions.offset[statement.inputs[operand], index_map.in_axis]
                self.edges.join(start + here, origin + index_map.position[here])

    def _relate_letters(
        self,
        statement: Statement,
        relation: BoundRelation,
        axes: list[tuple[AxisId, tuple[str, ...]]],
        whole: frozenset[str],
        statistics: frozenset[str],
    ) -> None:
        atoms, sizes = _atoms([letters for _, letters in axes], relation.sizes, (whole, statistics))
        stiff = {name for name in sizes if set(name.split("+")) <= whole}
        placed = [(self.positions.offset[axis], atoms[letters]) for axis, letters in axes]
        conflicts = {frozenset((a, b)) for _, word in placed for a in word for b in word if a != b}
        contested = {letter for pair in conflicts for letter in pair}
        for letter in sorted({x for _, word in placed for x in word} - contested - stiff):
            first: np.ndarray | None = None
            for offset, word in placed:
                if letter in word:
                    here = offset + np.arange(sizes[letter])
                    if first is not None:
                        self.edges.join(first, here)
                    first = here if first is None else first
        if contested - stiff:
            able = contested - stiff
            held = [p for p in placed if set(p[1]) & contested]
            alternatives = _independent_sets(sorted(able), conflicts)
            self.splits.append(Split(statement, sizes, held, alternatives, frozenset(able)))


def _atoms(
    words: list[tuple[str, ...]], sizes: dict[str, int], apart: Sequence[frozenset[str]]
) -> tuple[dict[tuple[str, ...], tuple[str, ...]], dict[str, int]]:
    """Letters that only ever occur side by side, in the same order, become one.

    Some stay apart from all others: those that cannot be cut, and those that a statistic is taken over, which is one
    for each of the others' positions and of the same channels for all of them.
    """
    follows: dict[str, set[str | None]] = {}
    precedes: dict[str, set[str | None]] = {}
    for word in words:
        for k, letter in enumerate(word):
            follows.setdefault(letter, set()).add(word[k + 1] if k + 1 < len(word) else None)
            precedes.setdefault(letter, set()).add(word[k - 1] if k else None)
    merged: dict[tuple[str, ...], tuple[str, ...]] = {}
    new_sizes: dict[str, int] = {}
    for word in set(words):
        out: list[str] = []
        run: list[str] = []
        for k, letter in enumerate(word):
            run.append(letter)
            after = word[k + 1] if k + 1 < len(word) else None
            beside = after is not None and follows[letter] == {after} and precedes[after] == {letter}
            if beside and all((letter in each) == (after in each) for each in apart):
                continue
            name = "+".join(run)
            out.append(name)
            new_sizes[name] = int(np.prod([sizes[x] for x in run]))
            run = []
        merged[word] = tuple(out)
    return merged, new_sizes


def _independent_sets(letters: list[str], conflicts: set[frozenset[str]]) -> list[frozenset[str]]:
    """Maximal sets of letters that share no axis."""
    found: list[frozenset[str]] = []

    def extend(chosen: frozenset[str], rest: list[str]) -> None:
        if not rest:
            free = [x for x in letters if x not in chosen and all(frozenset((x, y)) not in conflicts for y in chosen)]
            if not free and chosen not in found:
                found.append(chosen)
            return
        head, tail = rest[0], rest[1:]
        if all(frozenset((head, y)) not in conflicts for y in chosen):
            extend(chosen | {head}, tail)
        extend(chosen, tail)

    if len(letters) > 12:  # never met; one letter at a time is always right
        return [frozenset({x}) for x in letters]
    extend(frozenset(), letters)
    return found


def couple(
    shapes: dict[str, tuple[int, ...]],
    statements: Sequence[Statement],
    seeds: Sequence[Seed],
    weights: dict[AxisId, float],
    approximate: bool = False,
    silenced: Iterable[str] = (),
) -> Coupling:
    """Find the groups.

    Args:
        shapes: of every tensor of the graph.
        statements: what each operator says.
        seeds: axes frozen from outside: graph inputs and outputs, dynamic sizes, the user's exclusions.
        weights: multiply-accumulates per axis of a layer's weights, by which alternatives are judged; a unit that
            holds none of them is not worth removing.
        approximate: let axes shrink of which an operator takes a statistic (a mean, a variance).
        silenced: stored tensors whose removed slices are zero in the silenced model, whatever reads them.
    """
    builder = _Builder(shapes, approximate)
    builder.zero.update((name, axis) for name in silenced for axis in range(len(shapes.get(name, ()))))
    for seed in seeds:
        builder.freeze(seed.tensor, seed.axis, seed)
    for index, statement in enumerate(statements):
        builder.state(statement, index)
    positions = builder.positions
    weight = np.zeros(positions.total)
    for axis, macs in weights.items():
        start, size = positions.offset[axis], positions.size[axis]
        if size:  # else nothing was found there when the model was probed
            weight[start : start + size] += macs / size
    stated = (builder.edges, builder.splits, builder.seed_of, builder.seeds)
    label, frozen = Solver(positions, *stated, weight).run()
    units = _units(positions, label, frozen, weight)
    around = {name: s for s in reversed(statements) for name in (*s.outputs, *s.inputs)}
    axes, starts = list(positions.offset), np.fromiter(positions.offset.values(), np.int64)
    for (unit,) in (members for members in units if len(members) == 1):  # of every group one unit stays
        place = axes[int(np.searchsorted(starts, unit[np.argmax(weight[unit])], side="right")) - 1]
        statement = around[place[0]]
        frozen[unit] = len(builder.seeds)
        builder.seeds.append(Seed(Kind.TOGETHER, _TOGETHER, statement.node, statement.op, *place))
    return Coupling(
        tuple(_groups(positions, [members for members in units if len(members) > 1])),
        _frozen_axes(positions, frozen, builder.seeds),
        builder.approximate,
    )


def _frozen_axes(positions: Positions, frozen: np.ndarray, seeds: list[Seed]) -> dict[AxisId, tuple[Seed, int]]:
    found = {}
    for axis, start in positions.offset.items():
        part = frozen[start : start + positions.size[axis]]
        if (part >= 0).any():
            found[axis] = (seeds[int(part[part >= 0][0])], int((part >= 0).sum()))
    return found


def _first(unit: np.ndarray) -> int:
    return int(unit[0])


def _units(positions: Positions, label: np.ndarray, frozen: np.ndarray, weight: np.ndarray) -> list[list[np.ndarray]]:
    """Components that touch the same axes in the same numbers, in the order of their first position."""
    worth = np.zeros(int(label.max(initial=-1)) + 1, bool)
    worth[label[weight > 0]] = True
    free = np.flatnonzero((frozen < 0) & worth[label])
    if not len(free):
        return []
    starts = np.fromiter(positions.offset.values(), np.int64)
    axis_of = np.searchsorted(starts, free, side="right") - 1
    order = np.lexsort((free, axis_of, label[free]))
    free, axis_of, unit_of = free[order], axis_of[order], label[free][order]
    bounds = np.flatnonzero(np.diff(unit_of, prepend=-1))
    by_signature: dict[bytes, list[np.ndarray]] = {}
    for start, end in zip(bounds, [*bounds[1:], len(free)], strict=True):
        by_signature.setdefault(axis_of[start:end].tobytes(), []).append(free[start:end])
    for units in by_signature.values():
        units.sort(key=_first)
    return sorted(by_signature.values(), key=lambda units: _first(units[0]))


def _groups(positions: Positions, units: list[list[np.ndarray]]) -> list[Group]:
    axes = list(positions.offset)
    starts = np.fromiter(positions.offset.values(), np.int64)
    groups: list[Group] = []
    for members in units:
        table = np.stack(members)  # (units, positions per unit)
        columns = np.searchsorted(starts, table[0], side="right") - 1
        parts = []
        for axis in np.unique(columns):
            inside = table[:, columns == axis] - starts[axis]
            parts.append(GroupAxis(axes[axis][0], axes[axis][1], inside))
        groups.append(Group(len(groups), tuple(parts)))
    return groups
