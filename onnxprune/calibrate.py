"""Activations -> statistics, streamed: the network runs piece by piece, and only sums are kept.

`collect` runs the original once and sums the Gram matrix of every reader; error curves and first selections follow from
it. `Sweep` runs the pruned network from reader to reader: a reader's target is what the original gave, its input what
the network pruned so far gives (He et al. 2017, section 3.2); at a residual sum the target is Y1 + Y2 - Y1', so that
the shortcut's error is paid for in the branch (section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from onnxprune.analysis import Analysis
from onnxprune.answers import Answer, Answers
from onnxprune.batches import Batches, sample_bytes
from onnxprune.blocks import Block
from onnxprune.graph import Graph
from onnxprune.joint import Network
from onnxprune.memory import Room, give_back
from onnxprune.precision import NARROW, float32_copy, types
from onnxprune.progress import Progress
from onnxprune.readers import Reader, check_finite
from onnxprune.runtime import Runtime
from onnxprune.segments import Piece, Segments, late_order
from onnxprune.shelf import Shelf, Shelved
from onnxprune.statistics import FOLDS, Gram, Statistics, Sums
from onnxprune.surroundings import Behind, Samples, look_behind
from onnxprune.taking import Taking
from onnxprune.unfold import out_positions

Tensors = Mapping[str, np.ndarray]
Arrays = dict[str, np.ndarray]  # new values of stored tensors, in their original shapes


def collect(
    analysis: Analysis,
    readers: Sequence[Reader],
    batches: Batches,
    runtime: Runtime,
    progress: Progress,
    summed: int | None = None,
    answers: Answers | None = None,
) -> list[list[Statistics]]:
    """Run the original over the data and sum up what every reader reads.

    Args:
        analysis: of the original.
        readers: to sum up.
        batches: the data.
        runtime: how to run.
        progress: advanced by the number of samples.
        summed: the first so many records only.
        answers: to fill on the way; they are on the same batches.

    Returns:
        per reader, per group of its convolution, the statistics of the original network: target X @ W.

    Raises:
        InputError: there is something that cannot be summed.
    """
    segments = Segments(analysis.graph, range(len(analysis.graph.nodes)), runtime, analysis.shapes)
    grams = [[Gram(r.width) for _ in r.weights] for r in readers]
    rows = [0] * len(readers)
    read = {r.layer.data for r in readers} | {r.layer.output for r in readers if not _is_fixed(analysis, r)}
    names = sorted(read.union(answers.names if answers is not None else ()))
    piece = None
    for batch, part in enumerate(batches.parts):
        mine = len(part) if summed is None else sum(record < summed for record in part)
        count = mine if mine < len(part) else None  # a record of several samples is a batch of its own
        feeds = batches.feeds(batch)
        piece = piece or segments.piece(0, len(analysis.graph.nodes), names, feeds)
        found = piece.run(feeds)
        del feeds
        if answers is not None:
            answers.add(found)
        for k, reader in enumerate(readers if mine else ()):
            x = found[reader.layer.data][:count]
            fixed = _is_fixed(analysis, reader)
            shape = analysis.shapes.probes[0].shapes[reader.layer.output] if fixed else found[reader.layer.output].shape
            out = out_positions(reader.layer, shape)
            positions = batches.positions(reader, batch, int(np.prod(out, dtype=np.int64)))
            for gram, unfolded in zip(grams[k], reader.unfolding.rows(x, positions, out), strict=True):
                gram.add(unfolded)
            rows[k] += len(x) * len(positions)
            del x
        del found  # before the next batch comes
        progress.advance(len(part))
    sums = [
        [Statistics.of_linear(gram.value, weights, rows[k]) for gram, weights in zip(grams[k], r.weights, strict=True)]
        for k, r in enumerate(readers)
    ]
    for reader, parts in zip(readers, sums, strict=True):
        check_finite(reader, parts, "the network")
    return sums


def _is_fixed(analysis: Analysis, reader: Reader) -> bool:
    """Whether a reader's output has the same inner sizes for every input."""
    rank = len(analysis.shapes.shape(reader.layer.output) or ())
    return all(analysis.shapes.is_static(reader.layer.output, axis) for axis in range(1, rank))


FEW = 1000  # samples

Fitter = Callable[[Reader, list[list[Statistics]], Samples | None], Arrays]
BlockFitter = Callable[[Network, Taking, Arrays], Arrays]
Recall = Callable[[Reader | Block], Arrays | None]


def _nothing(_: Reader | Block) -> Arrays | None:
    """Nothing was fitted before."""


class Sweep:
    """The pruned network from reader to reader, beside what the original gave there.

    It runs in the original's shapes: a removed channel is one that no reader reads any more.

    Args:
        analysis: of the original.
        readers: to stop at, in graph order.
        answers: of the original, for these readers at least; known. The data are those that they are on, and their
            blocks are stopped at as well, behind their last reader.
        runtime: how to run.
        arrays: stored tensors that are changed from the start.
        room: what all this may take.
        limiters: whether samples are kept for a fit to what comes out of the limiter behind a reader.
    """

    def __init__(
        self,
        analysis: Analysis,
        readers: Sequence[Reader],
        answers: Answers,
        runtime: Runtime,
        arrays: Arrays,
        room: Room | None = None,
        limiters: bool = True,
    ) -> None:
        self.graph = analysis.graph
        self.room = room or Room.of(None, 0)
        self.used_files = False
        self.limiters = limiters
        self.answers = answers
        self.analysis = analysis
        self.batches = answers.batches
        self.arrays = dict(arrays)
        order = late_order(self.graph, {r.layer.node.index for r in readers})
        self.segments = Segments(self.graph, order, runtime, analysis.shapes)
        place = self.segments.place
        self.readers = sorted(readers, key=lambda r: place[r.layer.node.index])
        self.cuts = [place[r.layer.node.index] for r in self.readers]
        stops = {r.index for r in self.readers}
        self.runtime = runtime
        self.blocks = [v.block for v in answers.views.values() if {r.index for r in v.block.outer} <= stops]
        # what is fitted by small steps is computed in float32 at least
        narrow = self.blocks and (runtime.as_float32 or types(self.graph.model) & NARROW)
        self._wide = Graph(float32_copy(self.graph.model), self.graph.folder) if narrow else self.graph
        self._ends = {id(b): max(place[r.layer.node.index] for r in b.outer) for b in self.blocks}
        self._held = {id(b): {*b.held, *self._moving(b)[1]} for b in self.blocks}

    def run(self, fit: Fitter, fit_block: BlockFitter, progress: Progress, recall: Recall = _nothing) -> Arrays:
        """Visit every reader and block.

        Args:
            fit: turns a reader's statistics (per group, per fold) into new stored tensors.
            fit_block: the same for a block, and what was taken in of what it reads and should give.
            progress: advanced by one per reader.
            recall: what an earlier run fitted to a reader or a block, where it came so far; the network is then
                only run on.
        """
        if not self.readers:
            return self.arrays
        with Shelf(self.room.frontier) as shelf, Shelf(self.room.rows) as rows:
            here, answers = self._frontier(self.cuts[0]), self.answers
            pruned = self._enter(here, shelf)
            taking = {id(b): Taking(answers.views[b.tensor]) for b in self.blocks}
            done = {id(b): recall(b) for b in self.blocks}
            for k, reader in enumerate(self.readers):
                start, last = self.cuts[k], k + 1 == len(self.cuts)
                stop = start + 1 if last else self.cuts[k + 1]
                ahead = [] if last else self._frontier(stop)
                behind = self._behind(reader, here)
                blocks = [b for b in self.blocks if reader in b.outer]
                known = recall(reader)
                folds = self._empty(reader)
                # a block's fit, which follows, minds the limiter too, but few samples stop it early
                alone = self.limiters and (not blocks or len(self.batches.data) < FEW)
                samples = Samples.of(behind, reader, len(self.batches.data), rows) if alone else None
                for batch, state in enumerate(pruned):
                    tensors = shelf.get(state)
                    if known is None:
                        self._add(folds, samples, reader, behind, batch, answers.at_positions(reader, batch), tensors)
                    for block in [b for b in blocks if done[id(b)] is None]:
                        taking[id(block)].add(batch, reader, behind, answers.in_view(reader, batch), tensors)
                if known is None:
                    found = [[sums.statistics for sums in part] for part in folds]
                    check_finite(reader, (each for part in found for each in part), "the network as pruned so far")
                    known = fit(reader, found, samples)
                    del found
                del folds, samples  # a block's fit needs the room
                self.arrays |= known
                for block in [b for b in blocks if self._ends[id(b)] == start]:
                    changed = done[id(block)]
                    if changed is None:
                        give_back()
                        # of all samples at once, in many sessions
                        net = Network(self._wide, replace(self.runtime, as_float32=False, hoards=False), block)
                        changed = fit_block(net, taking.pop(id(block)), self.arrays)
                    self.arrays |= changed
                    if changed:
                        self._again(block, here, pruned, shelf)
                if not last:
                    self._advance(start, stop, ahead, pruned, shelf)
                here = ahead
                progress.advance()
            self.used_files = shelf.used_files or rows.used_files or answers.shelf.used_files
        return self.arrays

    def _kept(self, old: Shelved, new: Tensors, names: Sequence[str], shelf: Shelf) -> Shelved:
        """A batch of a frontier: what was computed anew, and the rest as it is kept already."""
        passed = {name: old[name] for name in names if name not in new}
        return {**passed, **shelf.put({name: new[name] for name in names if name in new}, self._bytes(names))}

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
        names = [name for name in here if name in made]
        self._run(self.segments.part(nodes, names, shelf.get(states[0]), self.arrays), here, states, shelf)

    def _behind(self, reader: Reader, here: Sequence[str]) -> Behind:
        behind, shapes = look_behind(self.graph, reader, set(here)), self.analysis.shapes
        if behind.residual and shapes.shape(behind.residual) != shapes.shape(reader.layer.output):
            return replace(behind, residual="", limits=None)  # a broadcast sum is not followed
        return behind

    def _enter(self, names: Sequence[str], shelf: Shelf) -> list[Shelved]:
        """Run the pruned network from its inputs to the first reader."""
        piece, states = None, []
        for batch in range(len(self.batches)):
            feeds = self.batches.feeds(batch)
            piece = piece or self.segments.piece(0, self.cuts[0], names, feeds, self.arrays)
            states.append(shelf.put(piece.run(feeds), self._bytes(names)))
        return states

    def _advance(self, start: int, stop: int, names: Sequence[str], states: list[Shelved], shelf: Shelf) -> None:
        """Run the pruned network on to the next reader."""
        piece = self.segments.piece(start, stop, names, shelf.get(states[0]), self.arrays)
        self._run(piece, names, states, shelf)

    def _run(self, piece: Piece, names: Sequence[str], states: list[Shelved], shelf: Shelf) -> None:
        for batch, shelved in enumerate(states):
            states[batch] = self._kept(shelved, piece.compute(shelf.get(shelved)), names, shelf)

    def _bytes(self, names: Sequence[str]) -> int:
        """What a frontier takes."""
        return len(self.batches.data) * sample_bytes(self.analysis, names)

    def _empty(self, reader: Reader) -> list[list[Sums]]:
        group, width, outputs = reader.weights.shape
        return [[Sums(width, outputs) for _ in range(FOLDS)] for _ in range(group)]

    def _add(
        self,
        folds: list[list[Sums]],
        samples: Samples | None,
        reader: Reader,
        behind: Behind,
        batch: int,
        answer: Answer,
        pruned: Tensors,
    ) -> None:
        """Add a batch: what the pruned network reads here, and what the original gave."""
        x, target, out = pruned[reader.layer.data], answer.output, answer.out
        if not len(x) or not target.size:  # no sample came this way: an expert that is not asked, say
            return
        positions = self.batches.positions(reader, batch, int(np.prod(out, dtype=np.int64)))
        shortcut: np.ndarray | None = None
        if behind.residual and answer.residual is not None:
            shortcut = reader.unfolding.targets(pruned[behind.residual], positions)
            gap = answer.residual - shortcut
            target = target + behind.before_scale(gap, (len(gap), 1, -1))
        # samples take turns between the folds; a record of several samples parts them
        first, each = self.batches.parts[batch][0], target.shape[1] // len(x)
        fold = (first + np.arange(len(x))) % FOLDS
        rows = reader.unfolding.rows(x, positions, out)
        for k in range(FOLDS):
            mine = np.repeat(fold == k, each)
            for g, part in enumerate(folds):
                part[k].add(rows[g, mine], target[g, mine])
        if samples is not None:
            numbers = first * each + np.arange(len(x) * each)
            samples.add(numbers, each, rows[0], target[0], shortcut[0] if shortcut is not None else None)
