"""Networks in which a group is narrower, its readers fitted to the original from its sums alone.

They are what damage is measured on: in the original, or in a network that was fitted to kept counts. There a narrower
or a wider group is compared with the network as it is, for of the errors that are in it already little would be seen
that a few units change: what the fits leave is orthogonal to what they found, so that the squares of the changes add
up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxprune import budget
from onnxprune.analysis import Analysis, GroupInfo
from onnxprune.calibrate import Arrays
from onnxprune.joint import stored_tensors
from onnxprune.readers import Reader
from onnxprune.reconstruct import solve
from onnxprune.select import Ranking
from onnxprune.selection import unfitted_weights
from onnxprune.sensitivity import Variants
from onnxprune.statistics import Statistics

RIDGE = 1e-4  # of one-shot reconstructions
_NEAR = 0.75  # of a kept count: as far as it may move at a time


@dataclass(frozen=True, eq=False)
class Narrowing:
    """What is needed to make a group of a network narrower.

    Attributes:
        analysis: of the original.
        readers: of its groups.
        statistics: by a reader's index, of what it reads in the original.
        rankings: of the groups' units.
        kept: units of the groups that are narrower in the network already.
        arrays: stored tensors that are others there than in the original.
    """

    analysis: Analysis
    readers: Sequence[Reader]
    statistics: Mapping[int, Sequence[Statistics]]
    rankings: Sequence[Ranking]
    kept: Mapping[int, np.ndarray] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)

    def variants(self, number: int, counts: Sequence[int], reference: int | None = None) -> Variants:
        """The networks in which the group with this number has so many units.

        Args:
            number: of the group.
            counts: of kept units.
            reference: the count of the network that they are compared with; the original unless given.
        """
        info, graph, ranking = self.analysis.groups[number], self.analysis.graph, self.rankings[number]
        group = info.group.index
        readers = [r for r in self.readers if group in r.columns and r.index in self.statistics]
        names = silent_weights([info], self.analysis, self.readers, {group: np.empty(0, np.int64)})
        tensors = set(names) | {name for r in readers for name in (r.layer.weight, r.layer.bias) if name}

        def made(count: int) -> Arrays:
            kept = {**self.kept, group: ranking.kept(count)}
            silent = silent_weights(self.analysis.groups, self.analysis, self.readers, kept)
            arrays = {name: self._restored(name) for name in names}
            for reader in readers:
                left = columns_left(reader, kept)
                parts = zip(self.statistics[reader.index], reader.weights, strict=True)
                arrays |= stored_tensors(graph, reader.layer, np.stack([solve(s, left, w, RIDGE) for s, w in parts]))
            return {name: graph.silenced(name, silent.get(name), array) for name, array in arrays.items()}

        other = None if reference is None else lambda: made(reference)
        return Variants(sorted(tensors), lambda k: made(counts[k]), len(counts), other)

    def _restored(self, name: str) -> np.ndarray:
        """A tensor of the network, with the original's values where units are silent."""
        original = self.analysis.graph.array(name)
        if name not in self.arrays:
            return original
        silent = silent_weights(self.analysis.groups, self.analysis, self.readers, self.kept)
        return np.where(silent.get(name, False), original, self.arrays[name])


def near(choices: np.ndarray, count: int) -> np.ndarray:
    """The kept counts around one of the choices: as far as from one measurement follows what they cost."""
    low = np.searchsorted(choices, _NEAR * count, side="right") - 1
    high = np.searchsorted(choices, count / _NEAR, side="left")
    return choices[max(low, 0) : high + 1]


def curve(units: int, counts: Sequence[int], reference: int, moved: Sequence[float], own: np.ndarray) -> np.ndarray:
    """Damage for every kept count up to the largest one measured, where that is taken for none, and zero beyond.

    Args:
        units: of the group.
        counts: kept counts, ascending.
        reference: the one that they were compared with.
        moved: how far each of them is from that.
        own: (units + 1,) the group's own error curve; NaN where unknown.
    """
    most = max([*counts, reference])
    wider = max((m for c, m in zip(counts, moved, strict=True) if c > reference), default=0.0)
    levels = [*(c for c in counts if c < reference), *([reference] if reference < most else [])]
    damage = [*(wider + m for c, m in zip(counts, moved, strict=True) if c < reference), wider][: len(levels)]
    found = budget.interpolate(most, levels, damage, own[: most + 1]) if levels else np.zeros(most + 1)
    return np.concatenate([found, np.zeros(units - most)])


def columns_left(reader: Reader, kept: Mapping[int, np.ndarray]) -> np.ndarray:
    """Columns of a reader that a fit may use, where these units of groups stay."""
    left = np.setdiff1d(np.arange(reader.width), columns_gone(reader, kept))
    return left[:-1] if not reader.layer.bias else left


def columns_gone(reader: Reader, kept: Mapping[int, np.ndarray]) -> np.ndarray:
    """Columns of a reader that belong to units that do not stay."""
    parts = [np.delete(columns, kept[g], axis=0).ravel() for g, columns in reader.columns.items() if g in kept]
    return np.concatenate([*parts, np.empty(0, np.int64)]).astype(np.int64)


def silent_weights(
    groups: Sequence[GroupInfo], analysis: Analysis, readers: Sequence[Reader], kept: Mapping[int, np.ndarray]
) -> dict[str, np.ndarray]:
    """What has to be zero for units to be gone, where fits do not see to that: masks of stored tensors.

    Args:
        groups: to look at.
        analysis: of the original.
        readers: that are fitted.
        kept: units that stay, of those groups that lose any.
    """
    masks: dict[str, np.ndarray] = {}
    for info in groups:
        index = info.group.index
        if index in kept and len(kept[index]) < info.units and unfitted_weights(info, analysis, readers):
            for name, gone in removed_weights(info, analysis, kept[index]).items():
                masks[name] = gone | masks.get(name, False)
    return masks


def removed_weights(info: GroupInfo, analysis: Analysis, kept: np.ndarray) -> dict[str, np.ndarray]:
    """Of every stored weight around a group, which elements belong to a removed unit."""
    graph = analysis.graph
    masks: dict[str, np.ndarray] = {}
    for axis in info.group.axes:
        if axis.tensor in analysis.weights and graph.is_stored(axis.tensor):
            mask = masks.setdefault(axis.tensor, np.zeros(graph.stored(axis.tensor).dims, bool))
            gone = np.delete(axis.positions, kept, axis=0).ravel()
            mask[(slice(None),) * axis.axis + (gone,)] = True
    return masks
