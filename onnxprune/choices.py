"""Which factor of a product is cut: alternatives narrowed by what is frozen, to a fixpoint, then chosen.

The choice is made cluster by cluster of splits that touch, on the graph of components, by the multiply-accumulates that
it makes removable.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from onnxprune.positions import AxisId, Edges, Kind, Positions, Seed, Split, components, earliest, spread


@dataclass(frozen=True, eq=False)
class _Site:
    """A split on the graph of components: per axis the components of its positions, as a grid of its atoms."""

    split: Split
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
        label = components(len(seeds), left, right)
        node, axis, weight = self.rows
        return _Part(
            tuple(_Site(s.split, tuple(label[g] for g in s.grids), s.alternatives) for s in sites),
            earliest(label, seeds),
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
        label = components(count + len(self.seeds), owner, count + nodes)
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


class Solver:
    """Decides the splits: forced choices to a fixpoint, then the best alternative by weight.

    It works on the graph of components, part by part: a choice changes nothing but what touches it.
    """

    def __init__(
        self,
        positions: Positions,
        edges: Edges,
        splits: list[Split],
        seed_of: np.ndarray,
        seeds: list[Seed],
        weight: np.ndarray,
    ) -> None:
        """All that was stated; choices are written down among the edges and the seeds."""
        self.edges = edges
        self.splits = splits
        self.seed_of = seed_of
        self.seeds = seeds
        self.weight = weight
        self.starts = np.fromiter(positions.offset.values(), np.int64, len(positions.offset))
        self.axes = list(positions.offset)

    def run(self) -> tuple[np.ndarray, np.ndarray]:
        """Component of every position, and the seed that froze it (-1: free)."""
        edges, seed_of = self.edges, self.seed_of
        label = edges.components()
        pending = self._whole(label).parts() if self.splits else []
        while pending:
            part = self._settle(pending.pop(), commit=True)
            pieces = part.parts() if len(part.sites) > 1 else [part]
            if len(pieces) > 1:
                pending += reversed(pieces)
            elif part.sites:
                pending.append(self._choose(part))
        if self.splits:
            label = edges.components()
        return label, spread(label, seed_of)

    def _whole(self, label: np.ndarray) -> _Part:
        weighted = np.flatnonzero(self.weight > 0)
        axis = np.unique(np.searchsorted(self.starts, weighted, side="right"), return_inverse=True)[1]
        sites = []
        for split in self.splits:
            spans = [(offset, [split.sizes[a] for a in atoms]) for offset, atoms in split.axes]
            grids = tuple(label[offset : offset + int(np.prod(shape))].reshape(shape) for offset, shape in spans)
            sites.append(_Site(split, grids, tuple(split.alternatives)))
        return _Part(
            tuple(sites),
            earliest(label, self.seed_of),
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
        split, seed_of = site.split, self.seed_of
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
                self.edges.join(anchor, table.ravel())
            elif (seed_of[span] < 0).any():
                if blocked is None:  # else say what stands behind it, rather than that a product cannot be cut
                    blocked = len(self.seeds)
                    text = f"{split.statement.op} cuts the product axis along another factor"
                    said = split.statement
                    self.seeds.append(Seed(Kind.PRODUCT, text, said.node, said.op, *self._axis(offset)))
                seed_of[span[seed_of[span] < 0]] = blocked
        return _ANY if blocked is None else blocked

    @staticmethod
    def _span(split: Split, k: int) -> np.ndarray:
        offset, atoms = split.axes[k]
        return offset + np.arange(int(np.prod([split.sizes[a] for a in atoms])))

    def _axis(self, offset: int) -> AxisId:
        return self.axes[int(np.searchsorted(self.starts, offset, side="right")) - 1]
