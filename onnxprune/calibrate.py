"""The pruned network from reader to reader, every one fitted as it comes.

A reader's target is what the original gave, its input what the network pruned so far gives (He et al. 2017, section
3.2); at a residual sum the target is Y1 + Y2 - Y1', so that the shortcut's error is paid for in the branch (section
3.3). The network runs piece by piece, and only frontiers and sums are kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from onnxprune.analysis import Analysis
from onnxprune.answers import Answers
from onnxprune.batches import sample_bytes
from onnxprune.blocks import Block
from onnxprune.graph import Graph
from onnxprune.joint import Network
from onnxprune.memory import Room, give_back
from onnxprune.parallel import MOST, Map, workers
from onnxprune.precision import NARROW, float32_copy, types
from onnxprune.progress import Progress
from onnxprune.readers import Reader, check_finite
from onnxprune.runtime import Runtime
from onnxprune.scores import Scored, gives_scores
from onnxprune.segments import Segments, late_order
from onnxprune.shelf import Shelf, Shelved
from onnxprune.statistics import FOLDS, Statistics, Sums
from onnxprune.surroundings import Behind, Samples, look_behind
from onnxprune.taking import Taking

Tensors = Mapping[str, np.ndarray]
Arrays = dict[str, np.ndarray]  # new values of stored tensors, in their original shapes


Folds = Sequence[Sequence[Statistics]]  # per group of a reader's convolution, per fold
Fitter = Callable[[Reader, Folds, Sequence[Samples], Sequence[Scored], Map], Arrays]
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
        closely: of the readers, those that samples are kept of: for the fit to what comes out of a limiter behind
            them, and for that of their blocks.
        twice: whether those whose block is fitted are fitted to the limiter before.
    """

    def __init__(
        self,
        analysis: Analysis,
        readers: Sequence[Reader],
        answers: Answers,
        runtime: Runtime,
        arrays: Arrays,
        room: Room | None = None,
        closely: Collection[Reader] = (),
        twice: bool = True,
    ) -> None:
        self.graph = analysis.graph
        self.room = room or Room.of(None, 0)
        self.used_files = False
        self.closely, self.twice = {r.index for r in closely}, twice
        self.answers = answers
        self.analysis = analysis
        self.batches = answers.batches
        self.arrays = dict(arrays)
        order = late_order(self.graph, {r.layer.node.index for r in readers})
        self.at_once, shared = runtime.shared_out(min(MOST, len(self.batches)))
        self.segments = Segments(self.graph, order, shared, analysis.shapes)
        place = self.segments.place
        self.readers = sorted(readers, key=lambda r: place[r.layer.node.index])
        self.cuts = [place[r.layer.node.index] for r in self.readers]
        self.runtime = runtime
        visited = {r.index for r in readers}
        outer = ((v.block, {r.index for r in v.block.outer}) for v in answers.views.values())
        # an outer reader that is not fitted keeps what it reads
        self.blocks = [block for block, its in outer if its <= visited and not its.isdisjoint(self.closely)]
        # what is fitted by small steps is computed in float32 at least
        narrow = self.blocks and (runtime.as_float32 or types(self.graph.model) & NARROW)
        self._wide = Graph(float32_copy(self.graph.model), self.graph.folder) if narrow else self.graph
        self._ends = {id(b): max(place[r.layer.node.index] for r in b.outer) for b in self.blocks}
        self._held = {id(b): {*b.held, *self._moving(b)[1]} for b in self.blocks}

    def run(self, fit: Fitter, fit_block: BlockFitter, progress: Progress, recall: Recall = _nothing) -> Arrays:
        """Visit every reader and block.

        Args:
            fit: turns a reader's statistics, and samples of every fold where a limiter or scores of classes are behind
                it, into new stored tensors; it is given what works on several things at a time.
            fit_block: the same for a block, and what was taken in of what it reads and should give.
            progress: advanced by one per reader.
            recall: what an earlier run fitted to a reader or a block, where it came so far; the network is then
                only run on.
        """
        if not self.readers:
            return self.arrays
        with Shelf(self.room.frontier) as shelf, Shelf(self.room.rows) as rows, workers(self.at_once) as spread:
            here, answers = self._frontier(self.cuts[0]), self.answers
            pruned = self._enter(here, shelf, spread)
            taking = {id(b): Taking(answers.views[b.tensor]) for b in self.blocks}
            done = {id(b): recall(b) for b in self.blocks}
            for k, reader in enumerate(self.readers):
                start, last = self.cuts[k], k + 1 == len(self.cuts)
                stop = start + 1 if last else self.cuts[k + 1]
                ahead = [] if last else self._frontier(stop)
                behind = self._behind(reader, here)
                blocks = [b for b in self.blocks if reader in b.outer]
                known = recall(reader)
                if known is None:
                    kept = rows if reader.index in self.closely and (self.twice or not blocks) else None
                    given = self._folds(reader, behind, shelf, kept, pruned, spread)
                    known = fit(reader, *given, spread)
                    del given  # a block's fit needs the room
                for block in [b for b in blocks if done[id(b)] is None]:
                    taking[id(block)].begin()
                    take = functools.partial(self._take, taking[id(block)], reader, behind, shelf)
                    spread(take, range(len(pruned)), pruned)
                self.arrays |= known
                moved: set[int] = set()
                for block in [b for b in blocks if self._ends[id(b)] == start]:
                    changed = done[id(block)]
                    if changed is None:
                        give_back()
                        # of all samples at once, in many sessions
                        net = Network(self._wide, replace(self.runtime, as_float32=False, hoards=False), block)
                        changed = fit_block(net, taking.pop(id(block)), self.arrays)
                    self.arrays |= changed
                    moved.update(self._moving(block)[0] if changed else ())
                if not last:
                    self._advance([*moved, *self.segments.order[start:stop]], ahead, pruned, shelf, spread)
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
        """Nodes to run again when a block has changed, before its last reader; and the tensors that this takes."""
        nodes = [i.layer.node.index for i in block.inner]
        made = {name for k in nodes for name in self.graph.nodes[k].outputs}
        for index in self.segments.order[: self._ends[id(block)]]:
            node = self.graph.nodes[index]
            if made & {*node.inputs, *node.captured}:
                made.update(node.outputs)
                nodes.append(index)
        read = {n for k in nodes for n in (*self.graph.nodes[k].inputs, *self.graph.nodes[k].captured) if n}
        return nodes, read - made - self.graph.computed_from_constants

    def _behind(self, reader: Reader, here: Sequence[str]) -> Behind:
        behind, shapes = look_behind(self.graph, reader, set(here)), self.analysis.shapes
        if behind.residual and shapes.shape(behind.residual) != shapes.shape(reader.layer.output):
            return replace(behind, residual="", limits=None)  # a broadcast sum is not followed
        return behind

    def _enter(self, names: Sequence[str], shelf: Shelf, spread: Map) -> list[Shelved]:
        """Run the pruned network from its inputs to the first reader."""
        piece, states = None, []
        for wave in self.batches.waves(self.at_once):
            feeds = [self.runtime.feeds(self.batches.feeds(batch)) for batch in wave]  # some of it is read later on
            piece = piece or self.segments.piece(0, self.cuts[0], names, feeds[0], self.arrays)
            states += [shelf.put(found, self._bytes(names)) for found in spread(piece.run, feeds)]
        return states

    def _advance(
        self, nodes: Sequence[int], names: Sequence[str], states: list[Shelved], shelf: Shelf, spread: Map
    ) -> None:
        """Run the pruned network on to the next reader: nodes that changed or are new, and what is needed behind."""
        piece = self.segments.part(nodes, names, shelf.get(states[0]), self.arrays)

        def run(batch: int) -> None:  # in place: of no batch both frontiers are held for long
            states[batch] = self._kept(states[batch], piece.compute(shelf.get(states[batch])), names, shelf)

        spread(run, range(len(states)))

    def _bytes(self, names: Sequence[str]) -> int:
        """What a frontier takes."""
        return len(self.batches.data) * sample_bytes(self.analysis, names)

    def _take(self, taking: Taking, reader: Reader, behind: Behind, shelf: Shelf, batch: int, state: Shelved) -> None:
        """Take in a batch for the fit of a block."""
        taking.add(batch, reader, behind, self.answers.in_view(reader, batch), shelf.get(state))

    def _folds(
        self,
        reader: Reader,
        behind: Behind,
        shelf: Shelf,
        rows: Shelf | None,
        states: Sequence[Shelved],
        spread: Map,
    ) -> tuple[Folds, list[Samples], list[Scored]]:
        """What a reader is fitted to: sums, and samples where rows have a shelf and a fit asks for them."""
        count = len(self.batches.data) * self.batches.each(0, len(shelf.get(states[0])[reader.layer.data]))
        classes = rows is not None and gives_scores(self.analysis, reader, behind)
        samples = [None if rows is None else Samples.of(behind, reader, count, rows) for _ in range(FOLDS)]
        scored = [Scored(behind.shift, count) if classes else None for _ in range(FOLDS)]
        found = spread(functools.partial(self._sum, reader, behind, shelf, states), range(FOLDS), samples, scored)
        folds = list(zip(*found, strict=True))
        check_finite(reader, (each for part in folds for each in part), "the network as pruned so far")
        return folds, [each for each in samples if each is not None], [each for each in scored if each is not None]

    def _sum(
        self,
        reader: Reader,
        behind: Behind,
        shelf: Shelf,
        states: Sequence[Shelved],
        fold: int,
        samples: Samples | None,
        scored: Scored | None,
    ) -> list[Statistics]:
        """Sum up a fold: what the pruned network reads here, and what the original gave; per group of the layer."""
        batches, (group, width, outputs) = self.batches, reader.weights.shape
        sums = [Sums(width, outputs) for _ in range(group)]
        for batch in batches.of_fold(fold):
            pruned, answer = shelf.get(states[batch]), self.answers.at_positions(reader, batch)
            x, target = pruned[reader.layer.data], answer.output
            mine = batches.rows_of(fold, batch, len(x))
            if not len(x[mine]) or not target.size:  # no sample came this way: an expert that is not asked, say
                continue
            positions = batches.positions(reader, batch, int(np.prod(answer.out, dtype=np.int64)))
            each = target.shape[1] // len(x)
            shortcut: np.ndarray | None = None
            if behind.residual and answer.residual is not None:
                shortcut = reader.unfolding.targets(pruned[behind.residual], positions)
                gap = answer.residual - shortcut
                target = target + behind.before_scale(gap, (len(gap), 1, -1))
            rows = reader.unfolding.rows(x[mine], positions, answer.out)
            if not isinstance(mine, slice):
                taken = (mine[:, None] * each + np.arange(each)).reshape(-1)
                target, shortcut = target[:, taken], None if shortcut is None else shortcut[:, taken]
            for part, r, t in zip(sums, rows, target, strict=True):
                part.add(r, t)
            numbers = batches.numbers(batch, len(x))[mine]
            if scored is not None:
                scored.add(numbers, rows[0], target[0])
            if samples is not None:
                numbers = (numbers[:, None] * each + np.arange(each)).reshape(-1)
                samples.add(numbers, each, rows[0], target[0], shortcut[0] if shortcut is not None else None)
        return [part.statistics for part in sums]
