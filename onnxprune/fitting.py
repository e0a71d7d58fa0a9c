"""What one network is made of: the units that every group keeps, and the weights fitted to them.

In a sweep, a group with a single reader may have its units chosen when that reader comes, by what the network as pruned
so far gives it; all others go by the ranks on the original.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnxprune.analysis import Analysis
from onnxprune.calibrate import Arrays, Folds
from onnxprune.compact import compact
from onnxprune.descent import fit_block
from onnxprune.joint import Network, Part, current, stored_tensors
from onnxprune.layers import Layer
from onnxprune.narrowing import RIDGE, columns_gone, columns_left, removed_weights, silent_weights
from onnxprune.parallel import Map
from onnxprune.precision import cast
from onnxprune.readers import Reader, matrices_of
from onnxprune.reconstruct import DOUBTFUL, Fit, fit, refine
from onnxprune.scores import Scored, sharpen
from onnxprune.select import Ranking, swapped
from onnxprune.selection import FROM_ACTIVATIONS, problems_of, rank, unfitted_weights
from onnxprune.statistics import Statistics
from onnxprune.surroundings import Samples
from onnxprune.taking import Taking


class Fitting:
    """Chooses and fits, layer by layer, and holds what came of it.

    Args:
        analysis: of the original.
        readers: all of them.
        rankings: per group, of its units.
        counts: per group, how many units stay.
        method: how units are chosen.
        seed: of what is drawn.
        swaps: whether units that greedy elimination keeps are exchanged for better ones.

    Attributes:
        kept: per group index, the units that stay.
        errors: per group index, the relative error that the fits of its readers leave.
        notes: for the report.
        arrays: new values of stored tensors in their original shapes, once there are some.
        pending: groups whose units are chosen on the way; they are not among the kept ones until then.
    """

    def __init__(
        self,
        analysis: Analysis,
        readers: Sequence[Reader],
        rankings: Sequence[Ranking],
        counts: np.ndarray,
        method: str,
        seed: int,
        swaps: bool = False,
    ) -> None:
        self.analysis, self.graph, self.readers = analysis, analysis.graph, readers
        self.counts, self.method, self.seed = counts, method, seed
        self.swaps = swaps and method == "greedy"
        self.kept = {
            info.group.index: ranking.kept(int(count))
            for info, ranking, count in zip(analysis.groups, rankings, counts, strict=True)
        }
        self.errors: dict[int, float] = {}
        self.notes: list[str] = []
        self._silent: dict[str, np.ndarray] = {}
        self.arrays: Arrays = {}
        self.pending: frozenset[int] = frozenset()

    def begin(self, statistics: Mapping[int, Sequence[Statistics]], *, sweeping: bool) -> None:
        """Silence what no fit will; in a sweep, leave the units of groups with one reader open until it comes.

        Args:
            statistics: of the original, per reader index.
            sweeping: whether the readers will come one by one.
        """
        if sweeping and self.method in FROM_ACTIVATIONS:
            self.pending = frozenset(
                info.group.index
                for info in self.analysis.groups
                if self._is_narrower(info.group.index)
                and sum(info.group.index in r.columns for r in self.readers) == 1
                and not unfitted_weights(info, self.analysis, self.readers)
            )
        if self.swaps:
            for group in sorted(self.kept.keys() - self.pending):
                if self._is_narrower(group) and (problems := problems_of(group, self.readers, statistics, {})):
                    self.kept[group] = swapped(problems, self.kept[group])
        self._silent = silent_weights(self.analysis.groups, self.analysis, self.readers, self.kept)
        self.arrays = {name: self.graph.silenced(name, gone) for name, gone in self._silent.items()}
        for group in self.pending:
            del self.kept[group]

    def to_be_fitted(self) -> list[Reader]:
        """The readers that lose columns, and all that read what follows from them: it is not what it was any more."""
        readers = {r.layer.node.index: r for r in self.readers}
        changed, found = set(self.arrays), []
        for node in self.graph.nodes:
            reader = readers.get(node.index)
            drifts = not changed.isdisjoint((*node.inputs, *node.captured))
            if drifts or (reader is not None and self.is_cut(reader)):
                changed.update(node.outputs)
                if reader is not None:
                    found.append(reader)
        return found

    def is_cut(self, reader: Reader) -> bool:
        """Whether a reader loses columns."""
        return any(map(self._is_narrower, reader.columns))

    def _is_narrower(self, group: int) -> bool:
        """Whether a group loses units."""
        return bool(self.counts[group] < self.analysis.groups[group].units)

    def say(self, note: str) -> None:
        """Something for the report, said once."""
        if note not in self.notes:
            self.notes.append(note)

    def reader(
        self, reader: Reader, folds: Folds, samples: Sequence[Samples], scored: Sequence[Scored], spread: Map
    ) -> Arrays:
        """Choose among what a reader reads, where that is open, and fit it; see `onnxprune.calibrate.Sweep.run`."""
        together = {reader.index: [a + b for a, b in folds]}
        for group in [g for g in reader.columns if g in self.pending]:
            problems = problems_of(group, [reader], together, {reader.index: columns_gone(reader, self.kept)})
            ranking = rank(self.method, self.analysis.groups[group], problems, self.analysis, self.seed)
            units = ranking.kept(int(self.counts[group]))
            self.kept[group] = swapped(problems, units) if self.swaps else units
        left = columns_left(reader, self.kept)
        fits = [fit(part, left, weights) for part, weights in zip(folds, reader.weights, strict=True)]
        few = sum(fold.rows for fold in folds[0]) < DOUBTFUL * len(left)
        halves: Sequence[Fit] = ()
        if scored or (samples and few):
            halves = [fit([fold], left, reader.weights[0], [fits[0].ridge]) for fold in folds[0]]
        if samples:
            for side in samples:
                side.narrow(left)
            energy = sum(side.energy for side in samples)
            whole = all(side.is_whole for side in samples)
            gram = np.sum([fold.of(left).gram for fold in folds[0]], axis=0) if whole else None
            fits = [refine(fits[0], samples, energy, left, reader.weights[0], spread, gram, halves)]
        if scored:
            fits = [sharpen(fits[0], halves, scored, left, spread)]
        return self._fitted(reader, fits)

    def once(self, reader: Reader, statistics: Sequence[Statistics]) -> Arrays:
        """Fit a reader to what it gave in the original, from the statistics alone, per group of its convolution."""
        left = columns_left(reader, self.kept)
        parts = zip(statistics, reader.weights, strict=True)
        return self._fitted(reader, [fit([part], left, weights, [RIDGE]) for part, weights in parts])

    def block(self, net: Network, taken: Taking, arrays: Arrays) -> Arrays:
        """Fit a block's layers together; nothing where that does not help on samples held out."""
        seen, unseen = taken.data()
        if not len(seen):
            return {}
        readers = [(i.layer, i.unfolding) for i in net.block.inner] + [(r.layer, r.unfolding) for r in net.block.outer]
        parts = [
            Part(layer, unfolding, current(self.graph, layer, arrays), self._free(layer))
            for layer, unfolding in readers
        ]
        small = compact(net, parts, seen)
        if small is None:
            found = fit_block(net, parts, seen, unseen)
        else:
            seen, unseen = small.data(seen), small.data(unseen)
            found = fit_block(small.net, small.parts, seen, unseen)
            found = None if found is None else small.whole(parts, found)
        if found is None:
            return {}
        tensors: Arrays = {}
        for layer, matrices in zip(net.layers, found, strict=True):
            tensors |= stored_tensors(self.graph, layer, matrices)
        return tensors if self._fits(tensors) else {}

    def _free(self, layer: Layer) -> np.ndarray:
        """Which entries of a layer's matrices belong to units that stay so far."""
        free = {name: np.ones(self.graph.array(name).shape, bool) for name in (layer.weight, layer.bias) if name}
        for info in self.analysis.groups:
            if info.group.index in self.kept:
                for name, gone in removed_weights(info, self.analysis, self.kept[info.group.index]).items():
                    if name in free:
                        free[name] &= ~gone
        bias = free[layer.bias] if layer.bias else np.zeros(1, bool)
        found: np.ndarray = matrices_of(layer, free[layer.weight], bias) != 0.0  # a factor may be below zero
        return found

    def _fitted(self, reader: Reader, fits: Sequence[Fit]) -> Arrays:
        """A reader's fits as stored tensors."""
        self._note(reader, fits)
        found = stored_tensors(self.graph, reader.layer, np.stack([f.weights for f in fits]))
        found = {name: self.graph.silenced(name, self._silent.get(name), w) for name, w in found.items()}
        if self._fits(found):
            return found
        # the old ones stay, with zeros where units went
        kind = self.graph.array(reader.layer.weight).dtype
        self.notes.append(f"the weights fitted for {reader.layer.node.label!r} do not fit into {kind}: not fitted")
        gone = np.ones((1, reader.width, 1))
        gone[:, columns_gone(reader, self.kept)] = 0.0
        return stored_tensors(self.graph, reader.layer, reader.weights * gone)

    def _fits(self, arrays: Arrays) -> bool:
        """Whether the model's types can hold the values."""
        return all(np.isfinite(cast(a, self.graph.array(n).dtype)).all() for n, a in arrays.items())

    def _note(self, reader: Reader, fits: Sequence[Fit]) -> None:
        error = float(np.mean([f.error for f in fits]))
        for group in (g for g in reader.columns if len(self.kept[g]) < self.analysis.groups[g].units):
            self.errors[group] = max(self.errors.get(group, 0.0), error)
