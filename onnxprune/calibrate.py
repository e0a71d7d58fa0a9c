"""Activations -> statistics, streamed: the network runs piece by piece, and only sums are kept.

`collect` runs the original once and sums the Gram matrix of every reader; error curves and first selections follow from
it. `Sweep` runs the original and the pruned network side by side, from reader to reader: a reader's target is what the
original gave, its input what the network pruned so far gives (He et al. 2017, section 3.2), and at a residual sum the
target is Y1 + Y2 - Y1', so that the shortcut's error is paid for in the branch (section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from onnxprune.analysis import Analysis
from onnxprune.blocks import Block, BlockData
from onnxprune.data import Calibration
from onnxprune.graph import Graph
from onnxprune.joint import Network
from onnxprune.precision import NARROW, float32_copy, types
from onnxprune.progress import Progress
from onnxprune.readers import Reader
from onnxprune.runtime import Runtime
from onnxprune.segments import Segments, late_order
from onnxprune.shelf import Shelf, Shelved
from onnxprune.statistics import FOLDS, Statistics
from onnxprune.surroundings import Behind, Samples, look_behind
from onnxprune.taking import Taking
from onnxprune.unfold import out_positions, sample_positions

TARGET_ROWS = 65536  # rows per reader: positions are drawn so that all samples together give about this many
ROWS_PER_COLUMN = 16  # and at least so many per column of the unfolded input
FRONTIER_BYTES = 1 << 30  # of one frontier in memory; a larger one goes to files
_CHUNK_BYTES = 256 << 20  # activations of a batch in the collecting pass
_LARGEST_BATCH = 64

Tensors = Mapping[str, np.ndarray]
Arrays = dict[str, np.ndarray]  # new values of stored tensors, in their original shapes


class Batches:
    """The calibration records in batches, with a fixed draw of output positions for each."""

    def __init__(self, data: Calibration, size: int, seed: int) -> None:
        step = size if data.batchable else 1
        self.data = data
        self.parts = [list(range(i, min(i + step, len(data)))) for i in range(0, len(data), step)]
        self.seed = seed

    def __len__(self) -> int:
        return len(self.parts)

    def feeds(self, batch: int) -> dict[str, np.ndarray]:
        """The model's inputs for one batch."""
        return self.data.feeds(self.parts[batch])

    def positions(self, reader: Reader, batch: int, total: int) -> np.ndarray:
        """Flat output positions of a reader to look at in this batch: the same ones for every network."""
        wanted = max(TARGET_ROWS, ROWS_PER_COLUMN * reader.width)
        rng = np.random.default_rng([self.seed, reader.index, batch])
        return sample_positions(total, -(-wanted // len(self.data)), rng)


def sample_bytes(analysis: Analysis, names: Sequence[str]) -> int:
    """Bytes that the named tensors take for one sample."""
    first = analysis.shapes.probes[0]
    samples = max((a.shape[0] for a in first.feeds.values() if a.ndim), default=1)
    return sum(4 * int(np.prod(first.shapes[n])) for n in names if n in first.shapes) // max(samples, 1)


def batch_size(analysis: Analysis, names: Sequence[str]) -> int:
    """Samples per batch such that the named tensors stay within the chunk."""
    return int(np.clip(_CHUNK_BYTES // max(sample_bytes(analysis, names), 1), 1, _LARGEST_BATCH))


def collect(
    analysis: Analysis, readers: Sequence[Reader], batches: Batches, runtime: Runtime, progress: Progress
) -> list[list[Statistics]]:
    """Run the original over the data and sum up what every reader reads.

    Returns:
        per reader, per group of its convolution, the statistics of the original network: target X @ W.
    """
    segments = Segments(analysis.graph, range(len(analysis.graph.nodes)), runtime, analysis.shapes)
    grams = [np.zeros((len(r.weights), r.width, r.width)) for r in readers]
    rows = [0] * len(readers)
    names = sorted({r.layer.data for r in readers} | {r.layer.output for r in readers if not _is_fixed(analysis, r)})
    piece = None
    for batch in range(len(batches)):
        feeds = batches.feeds(batch)
        piece = piece or segments.piece(0, len(analysis.graph.nodes), names, feeds)
        found = piece.run(feeds)
        for k, reader in enumerate(readers):
            x = found[reader.layer.data]
            fixed = _is_fixed(analysis, reader)
            shape = analysis.shapes.probes[0].shapes[reader.layer.output] if fixed else found[reader.layer.output].shape
            out = out_positions(reader.layer, shape)
            positions = batches.positions(reader, batch, int(np.prod(out, dtype=np.int64)))
            for g, part in enumerate(reader.unfolding.rows(x, positions, out)):
                grams[k][g] += part.T @ part
            rows[k] += len(x) * len(positions)
        progress.advance(len(batches.parts[batch]))
    return [
        [Statistics.of_linear(gram, weights, rows[k]) for gram, weights in zip(grams[k], r.weights, strict=True)]
        for k, r in enumerate(readers)
    ]


def _is_fixed(analysis: Analysis, reader: Reader) -> bool:
    """Whether a reader's output has the same inner sizes for every input."""
    rank = len(analysis.shapes.shape(reader.layer.output) or ())
    return all(analysis.shapes.is_static(reader.layer.output, axis) for axis in range(1, rank))


Fitter = Callable[[Reader, list[list[Statistics]], Samples | None], Arrays]
BlockFitter = Callable[[Network, BlockData, Sequence[Behind], Arrays], Arrays]
Recall = Callable[[Reader | Block], Arrays | None]


def _nothing(_: Reader | Block) -> Arrays | None:
    """Nothing was fitted before."""


class Sweep:
    """The original and the pruned network side by side, from reader to reader.

    Both run in the original's shapes: a removed channel is one that no reader reads any more.

    Args:
        analysis: of the original.
        readers: to stop at, in graph order.
        batches: the data.
        runtime: how to run.
        arrays: stored tensors that are changed from the start.
        blocks: to stop at as well, behind their last reader.
    """

    def __init__(
        self,
        analysis: Analysis,
        readers: Sequence[Reader],
        batches: Batches,
        runtime: Runtime,
        arrays: Arrays,
        blocks: Sequence[Block] = (),
    ) -> None:
        self.graph = analysis.graph
        self.analysis = analysis
        self.batches = batches
        self.arrays = dict(arrays)
        order = late_order(self.graph, {r.layer.node.index for r in readers})
        self.segments = Segments(self.graph, order, runtime, analysis.shapes)
        place = self.segments.place
        self.readers = sorted(readers, key=lambda r: place[r.layer.node.index])
        self.cuts = [place[r.layer.node.index] for r in self.readers]
        stops = {r.index for r in self.readers}
        self.runtime = runtime
        self.blocks = [b for b in blocks if batches.data.batchable and {r.index for r in b.outer} <= stops]
        # what is fitted by small steps is computed in float32 at least
        narrow = self.blocks and (runtime.as_float32 or types(self.graph.model) & NARROW)
        self._wide = Graph(float32_copy(self.graph.model), self.graph.folder) if narrow else self.graph
        self._ends = {id(b): max(place[r.layer.node.index] for r in b.outer) for b in self.blocks}
        self._held = {id(b): {*b.held, *self._moving(b)[1]} for b in self.blocks}

    def run(self, fit: Fitter, fit_block: BlockFitter, progress: Progress, recall: Recall = _nothing) -> Arrays:
        """Visit every reader and block.

        Args:
            fit: turns a reader's statistics (per group, per fold) into new stored tensors.
            fit_block: the same for a block and some samples of what it reads and should give.
            progress: advanced by one per reader.
            recall: what an earlier run fitted to a reader or a block, where it came so far; both networks are then only
                run on.
        """
        if not self.readers:
            return self.arrays
        with Shelf(FRONTIER_BYTES) as shelf:
            here = self._frontier(self.cuts[0])
            original = self._enter(here, {}, shelf)
            # until something changes, both networks are one
            pruned = self._enter(here, self.arrays, shelf) if self.arrays else list(original)
            taking = {id(b): Taking(b, self.graph, self.batches.parts, self.batches.seed) for b in self.blocks}
            done = {id(b): recall(b) for b in self.blocks}
            for k, reader in enumerate(self.readers):
                start, last = self.cuts[k], k + 1 == len(self.cuts)
                stop = start + 1 if last else self.cuts[k + 1]
                ahead = [] if last else self._frontier(stop)
                behind = self._behind(reader, here)
                blocks = [b for b in self.blocks if reader in b.outer]
                known = recall(reader)
                folds, samples = self._empty(reader), Samples.of(behind, reader, len(original))
                piece = None
                for batch in range(len(original)):
                    now, beside = shelf.get(original[batch]), shelf.get(pruned[batch])
                    piece = piece or self.segments.piece(start, stop, [*ahead, reader.layer.output], now)
                    found = piece.run(now)
                    output = found[reader.layer.output]
                    if known is None:
                        self._add(folds, samples, reader, behind, batch, now, beside, output)
                    for block in [b for b in blocks if done[id(b)] is None]:
                        taking[id(block)].add(batch, reader, behind, output, now, beside)
                    original[batch] = shelf.put({name: found[name] for name in ahead}, self._bytes(ahead))
                self.arrays |= fit(reader, folds, samples) if known is None else known
                for block in [b for b in blocks if self._ends[id(b)] == start]:
                    taken, changed = taking.pop(id(block)), done[id(block)]
                    if changed is None:
                        net = Network(self._wide, replace(self.runtime, as_float32=False), block)
                        changed = fit_block(net, taken.data(), taken.behind, self.arrays)
                    self.arrays |= changed
                    if changed:
                        self._again(block, here, pruned, shelf)
                if not last:
                    self._advance(start, stop, ahead, pruned, shelf)
                here = ahead
                progress.advance()
        return self.arrays

    def _frontier(self, cut: int) -> list[str]:
        """What is needed behind a cut, and what blocks that are still open read."""
        made = {n: self.segments.place[p.index] for n, p in self.graph.producer.items()}
        open_ = {n for b in self.blocks for n in self._held[id(b)] if made.get(n, -1) < cut <= self._ends[id(b)]}
        needed = self.segments.frontier(cut)
        return [*needed, *sorted(open_ - set(needed))]

    def _moving(self, block: Block) -> tuple[list[int], set[str]]:
        """Nodes to run again when a block has changed, up to its last reader; and the tensors that this takes."""
        nodes = [i.layer.node.index for i in block.inner]
        made = {name for k in nodes for name in self.graph.nodes[k].outputs}
        for index in self.segments.order[: self._ends[id(block)]]:
            node = self.graph.nodes[index]
            if made & {*node.inputs, *node.captured}:
                made.update(node.outputs)
                nodes.append(index)
        read = {n for k in nodes for n in (*self.graph.nodes[k].inputs, *self.graph.nodes[k].captured) if n}
        return nodes, read - made - self.graph.computed_from_constants

    def _again(self, block: Block, here: Sequence[str], states: list[Shelved], shelf: Shelf) -> None:
        """Run the pruned network again from a block's inner layers to its last reader."""
        nodes = self._moving(block)[0]
        made = {name for k in nodes for name in self.graph.nodes[k].outputs}
        names, piece = [name for name in here if name in made], None
        for batch, shelved in enumerate(states):
            tensors = shelf.get(shelved)
            piece = piece or self.segments.part(nodes, names, tensors, self.arrays)
            states[batch] = shelf.put({**tensors, **piece.run(tensors)}, self._bytes(here))

    def _behind(self, reader: Reader, here: Sequence[str]) -> Behind:
        behind, shapes = look_behind(self.graph, reader, set(here)), self.analysis.shapes
        if behind.residual and shapes.shape(behind.residual) != shapes.shape(reader.layer.output):
            return replace(behind, residual="", limits=None)  # a broadcast sum is not followed
        return behind

    def _enter(self, names: Sequence[str], arrays: Arrays, shelf: Shelf) -> list[Shelved]:
        """Run a network from its inputs to the first reader."""
        piece, states = None, []
        for batch in range(len(self.batches)):
            feeds = self.batches.feeds(batch)
            piece = piece or self.segments.piece(0, self.cuts[0], names, feeds, arrays)
            states.append(shelf.put(piece.run(feeds), self._bytes(names)))
        return states

    def _advance(self, start: int, stop: int, names: Sequence[str], states: list[Shelved], shelf: Shelf) -> None:
        """Run the pruned network on to the next reader."""
        piece = None
        for batch, shelved in enumerate(states):
            tensors = shelf.get(shelved)
            piece = piece or self.segments.piece(start, stop, names, tensors, self.arrays)
            states[batch] = shelf.put(piece.run(tensors), self._bytes(names))

    def _bytes(self, names: Sequence[str]) -> int:
        """What a frontier of both networks takes."""
        return 2 * len(self.batches.data) * sample_bytes(self.analysis, names)

    def _empty(self, reader: Reader) -> list[list[Statistics]]:
        group, width, outputs = reader.weights.shape
        return [[Statistics.empty(width, outputs) for _ in range(FOLDS)] for _ in range(group)]

    def _add(
        self,
        folds: list[list[Statistics]],
        samples: Samples | None,
        reader: Reader,
        behind: Behind,
        batch: int,
        original: Tensors,
        pruned: Tensors,
        output: np.ndarray,
    ) -> None:
        """Add a batch: what the pruned network reads here, and what the original gave."""
        x = pruned[reader.layer.data]
        out = out_positions(reader.layer, output.shape)
        positions = self.batches.positions(reader, batch, int(np.prod(out, dtype=np.int64)))
        target = reader.unfolding.targets(output, positions)
        shortcut: np.ndarray | None = None
        if behind.residual:
            here, there = original[behind.residual], pruned[behind.residual]
            shortcut = reader.unfolding.targets(there, positions)
            if here is not there:
                gap = reader.unfolding.targets(here, positions) - shortcut
                target = target + behind.before_scale(gap, (len(gap), 1, -1))
        # samples take turns between the folds, whatever the batch size
        fold = (np.arange(len(x)) + batch) % FOLDS
        for k in range(FOLDS):
            mine = np.flatnonzero(fold == k)
            if not len(mine):
                continue
            rows = reader.unfolding.rows(x[mine], positions, out)
            chosen = np.repeat(fold == k, target.shape[1] // len(x))
            wanted = target[:, chosen]
            for g in range(len(rows)):
                folds[g][k].add(rows[g], wanted[g])
            if samples is not None:
                samples.add(rows[0], wanted[0], shortcut[0][chosen] if shortcut is not None else None)
