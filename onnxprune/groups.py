"""Relations -> units -> groups: what has to be removed together.

Every position of every axis of every tensor gets a number; relations say which positions are the same one; the
connected components are the units. An axis that is a product of factors can be cut along one factor only: such a place
is a `_Split`, whose alternatives are first narrowed by what is frozen, to a fixpoint, and then chosen, cluster by
cluster, by the multiply-accumulates that a choice makes removable.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from onnxprune.axes import BoundAxis, BoundRelation, Refusal

AxisId = tuple[str, int]
VARYING = "a size that depends on the data"


@dataclass(frozen=True, eq=False)
class Statement:
    """What one operator says: its relation, bound, with the names of its operands."""

    node: str
    op: str
    relation: BoundRelation | Refusal
    inputs: tuple[str, ...]  # tensor names, empty where absent
    outputs: tuple[str, ...]
    seen: bool = True  # whether the shapes of all operands are known


class Kind(enum.StrEnum):
    """Kinds of reasons for which an axis is frozen."""

    INPUT = "input"  # of the graph
    OUTPUT = "output"  # of the graph
    ONE = "one"  # a size of one: nothing is lost
    DYNAMIC = "dynamic"  # a size that depends on the data
    CHOSEN = "chosen"  # not by --only or --exclude
    UNKNOWN = "unknown"  # no row for the operator
    REFUSED = "refused"  # the row says so
    UNSEEN = "unseen"  # a tensor whose shape never came to be known
    UNCLAIMED = "unclaimed"  # the row does not speak for this axis
    MIXED = "mixed"  # all values of the axis are needed
    NORMALISED = "normalised"  # a statistic of all values is needed, which fewer would give approximately
    SUMMED = "summed"  # summed up, and a silenced channel is not zero
    PRODUCT = "product"  # a product of factors of which another one is cut
    SAMPLED = "sampled"  # readers choose among the channels instead
    STATED = "stated"  # a size is stated in a way that cannot be mended


@dataclass(frozen=True)
class Seed:
    """Why an axis is frozen."""

    kind: Kind
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
    approximate: dict[int, frozenset[str]]  # per such statement the letters of which a statistic is taken


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
    """Pairs of positions that are the same one."""

    def __init__(self, positions: int) -> None:
        self.positions = positions
        self.left: list[np.ndarray] = []
        self.right: list[np.ndarray] = []

    def join(self, left: np.ndarray, right: np.ndarray) -> None:
        self.left.append(left)
        self.right.append(right)

    def components(self) -> np.ndarray:
        left = np.concatenate([*self.left, np.empty(0, np.int64)])
        right = np.concatenate([*self.right, np.empty(0, np.int64)])
        return _components(self.positions, left, right)


class _Builder:
    """Collects edges, frozen positions and splits from the statements."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], approximate: bool = False) -> None:
        self.leave_statistics = approximate
        self.approximate: dict[int, frozenset[str]] = {}
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
        if relation.approximable and self.leave_statistics:
            if letters := frozenset({*mixed, *open_sums}):
                self.approximate[index] = letters
        else:
            statistic = relation.approximable
            whole |= dict.fromkeys(mixed, (Kind.NORMALISED if statistic else Kind.MIXED, mixes))
            whole |= dict.fromkeys(sorted(open_sums), (Kind.NORMALISED if statistic else Kind.SUMMED, sums))
        for axis_id, bound in occurrences:
            if bound.letters and set(bound.letters) <= set(whole):
                self.freeze_statement(statement, *whole[bound.letters[0]], [axis_id])
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


@dataclass(frozen=True, eq=False)
class _Site:
    """A split on the graph of components: per axis the components of its positions, as a grid of its atoms."""

    split: _Split
    grids: tuple[np.ndarray, ...]
    alternatives: tuple[frozenset[str], ...]

    def table(self, k: int, letter: str) -> np.ndarray:
        """Components of the k-th axis by index of the letter: (size of the letter, rest)."""
        at = self.split.axes[k][1].index(letter)
        return np.moveaxis(self.grids[k], at, 0).reshape(self.grids[k].shape[at], -1)

    def narrowed(self, seeds: np.ndarray) -> _Site:
        """The site with the alternatives that frozen components leave."""
        alive = {x for x in self.split.letters if self._alive(x, seeds)}
        options = {option & alive for option in self.alternatives}
        left = sorted((o for o in options if not any(o < other for other in options)), key=sorted)
        return _Site(self.split, self.grids, tuple(left))

    def _alive(self, letter: str, seeds: np.ndarray) -> bool:
        """Whether at least one index of the letter holds no frozen component."""
        tables = [self.table(k, letter) for k, (_, atoms) in enumerate(self.split.axes) if letter in atoms]
        free = [(seeds[table] < 0).all(axis=1) for table in tables]
        return bool(np.logical_and.reduce(free).any())


@dataclass(frozen=True, eq=False)
class _Part:
    """Sites that touch, on the graph of components: everything that a choice among them can change.

    ``seeds`` is per component the seed that freezes it (-1: free). ``rows`` are the weighted positions: component,
    axis, weight. ``least`` is per axis the weight of the lightest unit outside of the part (0 where one is frozen).
    """

    sites: tuple[_Site, ...]
    seeds: np.ndarray
    rows: tuple[np.ndarray, np.ndarray, np.ndarray]
    least: np.ndarray

    def joined(self, left: np.ndarray, right: np.ndarray, sites: Iterable[_Site], seeds: np.ndarray) -> _Part:
        """The part after these components have become the same ones."""
        label = _components(len(seeds), left, right)
        node, axis, weight = self.rows
        return _Part(
            tuple(_Site(s.split, tuple(label[g] for g in s.grids), s.alternatives) for s in sites),
            _earliest(label, seeds),
            (label[node], axis, weight),
            self.least,
        )

    def score(self) -> tuple[float, int]:
        """Weight of what may go, then the number of separate units. No axis may lose its last unit."""
        unit, axis, weight = self.rows
        if not len(unit):
            return 0.0, 0
        free = self.seeds[unit] < 0
        pairs, of_pair = np.unique(axis * len(self.seeds) + unit, return_inverse=True)
        stays = self.least.copy()
        np.minimum.at(stays, pairs // len(self.seeds), np.bincount(of_pair, weight))  # the lightest unit of every axis
        stays[axis[~free]] = 0.0
        able = float(weight[free].sum() - stays.sum())
        # sums of the same weights in another order are a tie
        return float(f"{able:.9e}"), len(np.unique(unit[free]))

    def parts(self) -> list[_Part]:
        """The parts that do not touch: sites that share no free component."""
        count = len(self.sites)
        touched = [np.unique(np.concatenate([g.ravel() for g in s.grids])) for s in self.sites]
        touched = [nodes[self.seeds[nodes] < 0] for nodes in touched]
        owner = np.repeat(np.arange(count), [len(nodes) for nodes in touched])
        nodes = np.concatenate(touched) if touched else np.empty(0, np.int64)
        label = _components(count + len(self.seeds), owner, count + nodes)
        order = list(dict.fromkeys(label[:count].tolist()))
        if len(order) == 1:
            return [self]
        members: dict[int, list[_Site]] = {}
        for k, site in enumerate(self.sites):
            members.setdefault(int(label[k]), []).append(site)
        outside = _Outside(self, label[count:])
        return [outside.part(which, members[which]) for which in order]


class _Outside:
    """Cuts a part into pieces; to each piece the others are the outside."""

    def __init__(self, whole: _Part, piece: np.ndarray) -> None:
        self.whole = whole
        node, axis, weight = whole.rows
        count = len(whole.seeds)
        pairs, of_pair = np.unique(axis * count + node, return_inverse=True)
        self.axis, self.node = pairs // max(count, 1), pairs % max(count, 1)
        self.unit_weight = np.where(whole.seeds[self.node] < 0, np.bincount(of_pair, weight, len(pairs)), 0.0)
        self.weight = np.bincount(of_pair, weight, len(pairs))
        self.piece = piece[self.node]
        self.by_piece = np.argsort(self.piece, kind="stable")
        self.sorted_pieces = self.piece[self.by_piece]
        self.first_of_axis = np.searchsorted(self.axis, np.arange(len(whole.least) + 1))

    def part(self, which: int, sites: list[_Site]) -> _Part:
        """The piece with these sites, its components and axes numbered anew."""
        start, end = np.searchsorted(self.sorted_pieces, [which, which + 1])
        inside = np.sort(self.by_piece[start:end])
        axes, axis = np.unique(self.axis[inside], return_inverse=True)
        least = self.whole.least[axes]
        for k, a in enumerate(axes):
            rows = slice(self.first_of_axis[a], self.first_of_axis[a + 1])
            others = self.unit_weight[rows][self.piece[rows] != which]
            least[k] = min(least[k], others.min(initial=np.inf))
        spans = [g for s in sites for g in s.grids]
        nodes, back = np.unique(np.concatenate([self.node[inside], *(g.ravel() for g in spans)]), return_inverse=True)
        node, back = back[: len(inside)], back[len(inside) :]
        ends = np.cumsum([g.size for g in spans])
        grids = iter([b.reshape(g.shape) for b, g in zip(np.split(back, ends[:-1]), spans, strict=True)])
        return _Part(
            tuple(_Site(s.split, tuple(next(grids) for _ in s.grids), s.alternatives) for s in sites),
            self.whole.seeds[nodes],
            (node, axis, self.weight[inside]),
            least,
        )


_ANY = np.iinfo(np.int64).max - 1  # a seed that is not written down


class _Solver:
    """Decides the splits: forced choices to a fixpoint, then the best alternative by weight.

    It works on the graph of components, part by part: a choice changes nothing but what touches it.
    """

    def __init__(self, builder: _Builder, weight: np.ndarray) -> None:
        self.builder = builder
        self.weight = weight
        self.starts = np.fromiter(builder.positions.offset.values(), np.int64, len(builder.positions.offset))
        self.axes = list(builder.positions.offset)

    def run(self) -> tuple[np.ndarray, np.ndarray]:
        """Component of every position, and the seed that froze it (-1: free)."""
        edges, seed_of = self.builder.edges, self.builder.seed_of
        label = edges.components()
        pending = self._whole(label).parts() if self.builder.splits else []
        while pending:
            part = self._settle(pending.pop(), commit=True)
            pieces = part.parts() if len(part.sites) > 1 else [part]
            if len(pieces) > 1:
                pending += reversed(pieces)
            elif part.sites:
                pending.append(self._choose(part))
        if self.builder.splits:
            label = edges.components()
        return label, _spread(label, seed_of)

    def _whole(self, label: np.ndarray) -> _Part:
        weighted = np.flatnonzero(self.weight > 0)
        axis = np.unique(np.searchsorted(self.starts, weighted, side="right"), return_inverse=True)[1]
        sites = []
        for split in self.builder.splits:
            spans = [(offset, [split.sizes[a] for a in atoms]) for offset, atoms in split.axes]
            grids = tuple(label[offset : offset + int(np.prod(shape))].reshape(shape) for offset, shape in spans)
            sites.append(_Site(split, grids, tuple(split.alternatives)))
        return _Part(
            tuple(sites),
            _earliest(label, self.builder.seed_of),
            (label[weighted], axis, self.weight[weighted]),
            np.full(int(axis.max(initial=-1)) + 1, np.inf),
        )

    def _choose(self, part: _Part) -> _Part:
        """Try the alternatives of the first site, each rolled out, and take the best."""
        site = part.sites[0]
        best, best_score = site.alternatives[0], (-np.inf, 0)
        for choice in site.alternatives:
            trial = self._settle(self._applied(part, [(site, choice, _ANY)]), commit=False)
            while trial.sites:
                first = trial.sites[0]
                trial = self._settle(self._applied(trial, [(first, first.alternatives[0], _ANY)]), commit=False)
            if (score := trial.score()) > best_score:
                best, best_score = choice, score
        return self._applied(part, [(site, best, self._commit(site, best, None))])

    def _settle(self, part: _Part, *, commit: bool) -> _Part:
        """Apply forced choices until nothing moves."""
        while part.sites:
            sites = [site.narrowed(part.seeds) for site in part.sites]
            part = _Part(tuple(sites), part.seeds, part.rows, part.least)
            forced = [site for site in sites if len(site.alternatives) == 1]
            if not forced:
                break
            part = self._applied(
                part,
                [
                    (s, s.alternatives[0], self._commit(s, s.alternatives[0], part.seeds) if commit else _ANY)
                    for s in forced
                ],
            )
        return part

    def _applied(self, part: _Part, choices: list[tuple[_Site, frozenset[str], int]]) -> _Part:
        """Cut along the chosen letters; axes without one stay whole, and get the seed."""
        seeds = part.seeds.copy()
        left, right = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for site, choice, seed in choices:
            first: dict[str, np.ndarray] = {}
            for k, (_, atoms) in enumerate(site.split.axes):
                letter = next((x for x in atoms if x in choice), None)
                if letter is None:
                    whole = site.grids[k].ravel()
                    seeds[whole[seeds[whole] < 0]] = seed
                    continue
                table = site.table(k, letter)
                left.append(np.repeat(first.setdefault(letter, table[:, 0]), table.shape[1]))
                right.append(table.ravel())
        done = {id(site) for site, *_ in choices}
        rest = [site for site in part.sites if id(site) not in done]
        return part.joined(np.concatenate(left), np.concatenate(right), rest, seeds)

    def _commit(self, site: _Site, choice: frozenset[str], seeds: np.ndarray | None) -> int:
        """Write a choice down among the edges and seeds of the positions; returns the seed of what it freezes."""
        split, seed_of = site.split, self.builder.seed_of
        spans = [self._span(split, k) for k in range(len(split.axes))]
        known = [
            seed_of[span] if seeds is None else seeds[g.ravel()] for span, g in zip(spans, site.grids, strict=True)
        ]
        blocked = next((int(found[found >= 0].min()) for found in known if (found >= 0).any()), None)
        first: dict[str, np.ndarray] = {}
        for span, (offset, atoms) in zip(spans, split.axes, strict=True):
            letter = next((x for x in atoms if x in choice), None)
            if letter is not None:
                table = split.positions(offset, atoms, letter)
                anchor = np.repeat(first.setdefault(letter, table[:, 0]), table.shape[1])
                self.builder.edges.join(anchor, table.ravel())
            elif (seed_of[span] < 0).any():
                if blocked is None:  # else say what stands behind it, rather than that a product cannot be cut
                    blocked = len(self.builder.seeds)
                    text = f"{split.statement.op} cuts the product axis along another factor"
                    said = split.statement
                    self.builder.seeds.append(Seed(Kind.PRODUCT, text, said.node, said.op, *self._axis(offset)))
                seed_of[span[seed_of[span] < 0]] = blocked
        return _ANY if blocked is None else blocked

    @staticmethod
    def _span(split: _Split, k: int) -> np.ndarray:
        offset, atoms = split.axes[k]
        return offset + np.arange(int(np.prod([split.sizes[a] for a in atoms])))

    def _axis(self, offset: int) -> AxisId:
        return self.axes[int(np.searchsorted(self.starts, offset, side="right")) - 1]


def _components(count: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    graph = coo_array((np.ones(len(left), np.int8), (left, right)), shape=(count, count))
    label: np.ndarray = connected_components(graph, directed=False)[1]
    return label


def _earliest(label: np.ndarray, seed_of: np.ndarray) -> np.ndarray:
    """The earliest seed of every component, -1 where there is none."""
    none = np.iinfo(np.int64).max
    found = np.full(int(label.max(initial=-1)) + 1, none)
    marked = np.flatnonzero(seed_of >= 0)
    np.minimum.at(found, label[marked], seed_of[marked])
    earliest: np.ndarray = np.where(found == none, -1, found)
    return earliest


def _spread(label: np.ndarray, seed_of: np.ndarray) -> np.ndarray:
    """The seed of every position's component: the earliest one that touches it, -1 where none does."""
    spread: np.ndarray = _earliest(label, seed_of)[label]
    return spread


def couple(
    shapes: dict[str, tuple[int, ...]],
    statements: Sequence[Statement],
    seeds: Sequence[Seed],
    weights: dict[AxisId, float],
    approximate: bool = False,
) -> Coupling:
    """Find the groups.

    Args:
        shapes: of every tensor of the graph.
        statements: what each operator says.
        seeds: axes frozen from outside: graph inputs and outputs, dynamic sizes, the user's exclusions.
        weights: multiply-accumulates per axis of a layer's weights, by which alternatives are judged; a unit that
            holds none of them is not worth removing.
        approximate: let axes shrink of which an operator takes a statistic (a mean, a variance).
    """
    builder = _Builder(shapes, approximate)
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
    label, frozen = _Solver(builder, weight).run()
    return Coupling(
        tuple(_group(positions, label, frozen, weight)),
        _frozen_axes(positions, frozen, builder.seeds),
        builder.approximate,
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
