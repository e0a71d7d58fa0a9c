"""Relations -> units -> groups: what has to be removed together.

Every position of every axis of every tensor gets a number; relations say which positions are the same one; the
connected components are the units. An axis that is a product of factors can be cut along one factor only: such a place
is a `_Split`, whose alternatives are first narrowed by what is frozen, to a fixpoint, and then chosen, cluster by
cluster, by the multiply-accumulates that a choice makes removable.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from onnxprune.axes import BoundAxis, BoundRelation, Refusal

AxisId = tuple[str, int]


@dataclass(frozen=True, eq=False)
class Statement:
    """What one operator says: its relation, bound, with the names of its operands."""

    node: str
    op: str
    relation: BoundRelation | Refusal
    inputs: tuple[str, ...]  # tensor names, empty where absent
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Seed:
    """Why an axis is frozen."""

    reason: str
    node: str
    op: str
    tensor: str
    axis: int


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


@dataclass(eq=False)
class _Split:
    """A relation with product axes: letters of which only some may shrink."""

    statement: Statement
    sizes: dict[str, int]
    axes: list[tuple[int, tuple[str, ...]]]  # (offset of the axis, its atoms, outermost first)
    alternatives: list[frozenset[str]]
    letters: frozenset[str] = frozenset()

    def positions(self, offset: int, atoms: tuple[str, ...], letter: str) -> np.ndarray:
        """Positions of the axis by index of the letter: (size of the letter, rest)."""
        shape = [self.sizes[a] for a in atoms]
        grid = offset + np.arange(int(np.prod(shape))).reshape(shape)
        return np.moveaxis(grid, atoms.index(letter), 0).reshape(self.sizes[letter], -1)


@dataclass(eq=False)
class _Positions:
    """Numbers for every position of every axis."""

    offset: dict[AxisId, int] = field(default_factory=dict)
    size: dict[AxisId, int] = field(default_factory=dict)
    total: int = 0

    def add(self, tensor: str, shape: Sequence[int]) -> None:
        for axis, size in enumerate(shape):
            if (tensor, axis) not in self.offset:
                self.offset[tensor, axis] = self.total
                self.size[tensor, axis] = size
                self.total += size


class _Edges:
    """Pairs of positions that are the same one; hubs are extra numbers behind the positions."""

    def __init__(self, positions: int) -> None:
        self.hubs = positions
        self.left: list[np.ndarray] = []
        self.right: list[np.ndarray] = []

    def join(self, left: np.ndarray, right: np.ndarray) -> None:
        self.left.append(left)
        self.right.append(right)

    def hub(self, count: int) -> np.ndarray:
        self.hubs += count
        return np.arange(self.hubs - count, self.hubs)

    def components(self) -> np.ndarray:
        left = np.concatenate([*self.left, np.empty(0, np.int64)])
        right = np.concatenate([*self.right, np.empty(0, np.int64)])
        graph = coo_array((np.ones(len(left), np.int8), (left, right)), shape=(self.hubs, self.hubs))
        label: np.ndarray = connected_components(graph, directed=False)[1]
        return label

    def copy(self) -> _Edges:
        twin = _Edges(0)
        twin.hubs, twin.left, twin.right = self.hubs, list(self.left), list(self.right)
        return twin


class _Builder:
    """Collects edges, frozen positions and splits from the statements."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.positions = _Positions()
        for tensor, shape in shapes.items():
            self.positions.add(tensor, shape)
        self.edges = _Edges(self.positions.total)
        self.seed_of = np.full(self.positions.total, -1, np.int64)
        self.seeds: list[Seed] = []
        self.splits: list[_Split] = []
        self.zero: set[AxisId] = set()  # axes whose slices are zero in the silenced model

    def freeze(self, tensor: str, axis: int, seed: Seed) -> None:
        """Freeze a whole axis; the first reason stands."""
        if (tensor, axis) in self.positions.offset:
            start = self.positions.offset[tensor, axis]
            part = self.seed_of[start : start + self.positions.size[tensor, axis]]
            if (part < 0).any():
                part[part < 0] = len(self.seeds)
                self.seeds.append(seed)

    def freeze_statement(self, statement: Statement, reason: str, axes: Iterable[AxisId]) -> None:
        for tensor, axis in axes:
            self.freeze(tensor, axis, Seed(reason, statement.node, statement.op, tensor, axis))

    def state(self, statement: Statement) -> None:
        """Take in what one operator says."""
        operands = [(name, k, True) for k, name in enumerate(statement.inputs) if name]
        operands += [(name, k, False) for k, name in enumerate(statement.outputs) if name]
        relation = statement.relation
        if isinstance(relation, Refusal):
            everything = [(n, a) for n, _, _ in operands for a in self._axes(n)]
            self.freeze_statement(statement, relation.reason, everything)
            return
        occurrences: list[tuple[AxisId, BoundAxis]] = []
        for name, k, is_input in operands:
            side = relation.inputs if is_input else relation.outputs
            for axis, bound in enumerate(side[k] if k < len(side) else ()):
                occurrences.append(((name, axis), bound))
                if not bound.claimed:
                    reason = f"{statement.op} gives no rule for this axis"
                    self.freeze_statement(statement, reason, [(name, axis)])
        whole: dict[str, str] = {}  # letters that cannot be cut, and why
        for _, bound in occurrences:
            whole |= dict.fromkeys(sorted(bound.mixed), f"{statement.op} mixes the values of this axis")
            reason = f"{statement.op} sums over this axis, and a silenced channel is not zero there"
            whole |= {x: reason for x in sorted(bound.summed) if not self._is_zero(statement, relation, x)}
        for axis_id, bound in occurrences:
            if bound.letters and set(bound.letters) <= set(whole):
                self.freeze_statement(statement, whole[bound.letters[0]], [axis_id])
        lettered = [(a, b.letters) for a, b in occurrences if b.claimed and b.letters]
        self._relate_letters(statement, relation, lettered, frozenset(whole))
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
    ) -> None:
        atoms, sizes = _atoms([letters for _, letters in axes], relation.sizes, whole)
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
            self.splits.append(_Split(statement, sizes, held, alternatives, frozenset(able)))


def _atoms(
    words: list[tuple[str, ...]], sizes: dict[str, int], whole: frozenset[str]
) -> tuple[dict[tuple[str, ...], tuple[str, ...]], dict[str, int]]:
    """Letters that only ever occur side by side, in the same order, become one; those that cannot be cut stay apart."""
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
            if beside and (letter in whole) == (after in whole):
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


class _Solver:
    """Decides the splits: forced choices to a fixpoint, then the best alternative by weight."""

    def __init__(self, builder: _Builder, weight: np.ndarray) -> None:
        self.builder = builder
        self.weight = weight
        positions = builder.positions
        self.weighted = np.flatnonzero(weight > 0)
        starts = np.fromiter(positions.offset.values(), np.int64, len(positions.offset))
        self.axis_of = np.unique(np.searchsorted(starts, self.weighted, side="right"), return_inverse=True)[1]

    def run(self) -> tuple[np.ndarray, np.ndarray]:
        """Component of every position, and the seed that froze it (-1: free)."""
        edges = self.builder.edges
        seed_of = self.builder.seed_of
        pending = list(self.builder.splits)
        label, frozen = self._settle(edges, seed_of, pending)
        while pending:
            split = pending[0]
            cluster = self._cluster(split, pending, label)
            scores = []
            for choice in split.alternatives:
                trial_edges, trial_seeds = edges.copy(), seed_of.copy()
                rest = [_copy(s) for s in cluster if s is not split]
                self._apply(split, choice, trial_edges, trial_seeds)
                trial_label, trial_frozen = self._settle(trial_edges, trial_seeds, rest)
                while rest:
                    self._apply(rest[0], rest[0].alternatives[0], trial_edges, trial_seeds)
                    rest.pop(0)
                    trial_label, trial_frozen = self._settle(trial_edges, trial_seeds, rest)
                scores.append(self._score(trial_label, trial_frozen))
            best = split.alternatives[max(range(len(scores)), key=scores.__getitem__)]
            pending.remove(split)
            self._apply(split, best, edges, seed_of)
            label, frozen = self._settle(edges, seed_of, pending)
        return label[: self.builder.positions.total], frozen

    def _score(self, label: np.ndarray, frozen: np.ndarray) -> tuple[float, int]:
        """Weight of what may go, then the number of separate units. No axis may lose its last unit."""
        if not len(self.weighted):
            return 0.0, 0
        free = frozen[self.weighted] < 0
        weight, axis, unit = self.weight[self.weighted], self.axis_of, label[self.weighted]
        count = len(label)
        pairs, of_pair = np.unique(axis * count + unit, return_inverse=True)
        stays = np.full(int(axis.max()) + 1, np.inf)
        np.minimum.at(stays, pairs // count, np.bincount(of_pair, weight))  # the smallest unit of every axis
        stays[axis[~free]] = 0.0
        able = float(weight[free].sum() - stays.sum())
        # sums of the same weights in another order are a tie
        return float(f"{able:.9e}"), len(np.unique(unit[free]))

    def _cluster(self, split: _Split, pending: list[_Split], label: np.ndarray) -> list[_Split]:
        """The pending splits that touch this one, through components or through each other."""
        spans = {id(s): np.concatenate([self._span(s, k) for k in range(len(s.axes))]) for s in pending}
        touched = {key: set(np.unique(label[span])) for key, span in spans.items()}
        cluster, reach, grew = [split], set(touched[id(split)]), True
        while grew:
            grew = False
            for other in pending:
                if other not in cluster and touched[id(other)] & reach:
                    cluster.append(other)
                    reach |= touched[id(other)]
                    grew = True
        return cluster

    @staticmethod
    def _span(split: _Split, k: int) -> np.ndarray:
        offset, atoms = split.axes[k]
        return offset + np.arange(int(np.prod([split.sizes[a] for a in atoms])))

    def _settle(self, edges: _Edges, seed_of: np.ndarray, pending: list[_Split]) -> tuple[np.ndarray, np.ndarray]:
        """Apply forced choices until nothing moves; returns labels and the seed per position."""
        while True:
            label = edges.components()
            frozen = _spread(label, seed_of)
            moved = False
            for split in list(pending):
                alive = {x for x in split.letters if self._alive(split, x, frozen)}
                options = {option & alive for option in split.alternatives}
                split.alternatives = sorted(
                    (o for o in options if not any(o < other for other in options)), key=lambda o: sorted(o)
                )
                if len(split.alternatives) == 1:
                    self._apply(split, split.alternatives[0], edges, seed_of, frozen)
                    pending.remove(split)
                    moved = True
            if not moved:
                return label, frozen

    @staticmethod
    def _alive(split: _Split, letter: str, frozen: np.ndarray) -> bool:
        """Whether at least one index of the letter holds no frozen position."""
        free = np.ones(split.sizes[letter], bool)
        for offset, atoms in split.axes:
            if letter in atoms:
                free &= (frozen[split.positions(offset, atoms, letter)] < 0).all(axis=1)
        return bool(free.any())

    def _apply(
        self,
        split: _Split,
        choice: frozenset[str],
        edges: _Edges,
        seed_of: np.ndarray,
        frozen: np.ndarray | None = None,
    ) -> None:
        """Cut along the chosen letters; axes without one stay whole."""
        hubs = {letter: edges.hub(split.sizes[letter]) for letter in choice}
        known = seed_of if frozen is None else frozen
        blocked = [s for k in range(len(split.axes)) for s in np.unique(known[self._span(split, k)]) if s >= 0]
        for k, (offset, atoms) in enumerate(split.axes):
            chosen = [letter for letter in atoms if letter in choice]
            if chosen:
                table = split.positions(offset, atoms, chosen[0])
                edges.join(np.repeat(hubs[chosen[0]], table.shape[1]), table.ravel())
                continue
            span = self._span(split, k)
            if (seed_of[span] < 0).any():
                if blocked:  # say what stands behind it, rather than that a product cannot be cut
                    seed = blocked[0]
                else:
                    statement = split.statement
                    seed = len(self.builder.seeds)
                    text = f"{statement.op} cuts the product axis along another factor"
                    self.builder.seeds.append(Seed(text, statement.node, statement.op, *self._axis_at(offset)))
                seed_of[span[seed_of[span] < 0]] = seed

    def _axis_at(self, offset: int) -> AxisId:
        return next(axis for axis, start in self.builder.positions.offset.items() if start == offset)


def _copy(split: _Split) -> _Split:
    return _Split(split.statement, split.sizes, split.axes, list(split.alternatives), split.letters)


def _spread(label: np.ndarray, seed_of: np.ndarray) -> np.ndarray:
    """The seed of every position's component: the earliest one that touches it, -1 where none does."""
    none = np.iinfo(np.int64).max
    per_component = np.full(int(label.max(initial=-1)) + 1, none)
    marked = np.flatnonzero(seed_of >= 0)
    np.minimum.at(per_component, label[marked], seed_of[marked])
    spread = per_component[label[: len(seed_of)]]
    return np.where(spread == none, -1, spread)


def couple(
    shapes: dict[str, tuple[int, ...]],
    statements: Sequence[Statement],
    seeds: Sequence[Seed],
    weights: dict[AxisId, float],
) -> Coupling:
    """Find the groups.

    Args:
        shapes: of every tensor of the graph.
        statements: what each operator says.
        seeds: axes frozen from outside: graph inputs and outputs, dynamic sizes, the user's exclusions.
        weights: multiply-accumulates per axis of a layer's weights, by which alternatives are judged; a unit that
            holds none of them is not worth removing.
    """
    builder = _Builder(shapes)
    for seed in seeds:
        builder.freeze(seed.tensor, seed.axis, seed)
    for statement in statements:
        builder.state(statement)
    positions = builder.positions
    weight = np.zeros(positions.total)
    for axis, macs in weights.items():
        start, size = positions.offset[axis], positions.size[axis]
        weight[start : start + size] += macs / size
    label, frozen = _Solver(builder, weight).run()
    return Coupling(
        tuple(_group(positions, label, frozen, weight)),
        _frozen_axes(positions, frozen, builder.seeds),
    )


def _frozen_axes(positions: _Positions, frozen: np.ndarray, seeds: list[Seed]) -> dict[AxisId, tuple[Seed, int]]:
    found = {}
    for axis, start in positions.offset.items():
        part = frozen[start : start + positions.size[axis]]
        if (part >= 0).any():
            found[axis] = (seeds[int(part[part >= 0][0])], int((part >= 0).sum()))
    return found


def _first(unit: np.ndarray) -> int:
    return int(unit[0])


def _group(positions: _Positions, label: np.ndarray, frozen: np.ndarray, weight: np.ndarray) -> list[Group]:
    """Components that touch the same axes in the same numbers, in the order of their first position."""
    worth = np.zeros(int(label.max(initial=-1)) + 1, bool)
    worth[label[weight > 0]] = True
    free = np.flatnonzero((frozen < 0) & worth[label])
    if not len(free):
        return []
    axes = list(positions.offset)
    starts = np.fromiter(positions.offset.values(), np.int64)
    axis_of = np.searchsorted(starts, free, side="right") - 1
    order = np.lexsort((free, axis_of, label[free]))
    free, axis_of, unit_of = free[order], axis_of[order], label[free][order]
    bounds = np.flatnonzero(np.diff(unit_of, prepend=-1))
    by_signature: dict[bytes, list[np.ndarray]] = {}
    for start, end in zip(bounds, [*bounds[1:], len(free)], strict=True):
        by_signature.setdefault(axis_of[start:end].tobytes(), []).append(free[start:end])
    groups: list[Group] = []
    for units in by_signature.values():
        units.sort(key=_first)
    for members in sorted(by_signature.values(), key=lambda units: _first(units[0])):
        table = np.stack(members)  # (units, positions per unit)
        columns = np.searchsorted(starts, table[0], side="right") - 1
        parts = []
        for axis in np.unique(columns):
            inside = table[:, columns == axis] - starts[axis]
            parts.append(GroupAxis(axes[axis][0], axes[axis][1], inside))
        groups.append(Group(len(groups), tuple(parts)))
    return groups
