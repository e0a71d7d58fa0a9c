"""What the readers of the original network read, summed up, and what it gives where the fits look.

The network runs once, in pieces, so that of few tensors all values are held at a time and batches can be large: of
small ones a run and the sums take as long as of larger ones.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune.analysis import Analysis
from onnxprune.answers import Answers
from onnxprune.batches import Batches, sample_bytes
from onnxprune.memory import Room
from onnxprune.parallel import MOST, workers
from onnxprune.progress import Progress
from onnxprune.readers import Reader, check_finite
from onnxprune.runtime import Runtime
from onnxprune.segments import Segments
from onnxprune.shelf import Shelf, Shelved
from onnxprune.statistics import Gram, Statistics
from onnxprune.unfold import out_positions

Tensors = Mapping[str, np.ndarray]


def collect(
    analysis: Analysis,
    readers: Sequence[Reader],
    batches: Batches,
    runtime: Runtime,
    progress: Progress,
    summed: int | None = None,
    answers: Answers | None = None,
    room: Room | None = None,
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
        room: what all this may take.

    Returns:
        per reader, per group of its convolution, the statistics of the original network: target X @ W.

    Raises:
        InputError: there is something that cannot be summed.
    """
    room = room or Room.of(None, 0)
    at_once, shared = runtime.shared_out(min(MOST, len(batches)))
    segments = Segments(analysis.graph, range(len(analysis.graph.nodes)), shared, analysis.shapes)
    grams = [[Gram(r.width) for _ in r.weights] for r in readers]
    rows = [0] * len(readers)
    wanted = [{r.layer.data} | (set() if _is_fixed(analysis, r) else {r.layer.output}) for r in readers]
    answered = answers.readers if answers is not None else ()
    wanted += [set(answers.names(r)) for r in answered] if answers is not None else []
    count, most = sum(map(len, batches.parts)), math.inf
    if in_pieces(analysis, [*readers, *answered], count, room):
        # the runtime holds tensors and hands them over, and as much is made of them
        most = room.batch / (4 * at_once * max(map(len, batches.parts)))

    def add(k: int, found: Mapping[int, Tensors]) -> None:
        """Sum up what one of the readers reads in some batches."""
        reader, fixed = readers[k], _is_fixed(analysis, readers[k])
        for batch, tensors in found.items():
            part = batches.parts[batch]
            mine = len(part) if summed is None else sum(record < summed for record in part)
            if not mine:
                continue
            # a record of several samples is a batch of its own
            x = tensors[reader.layer.data][: mine if mine < len(part) else None]
            made = analysis.shapes.probes[0].shapes if fixed else {n: a.shape for n, a in tensors.items()}
            out = out_positions(reader.layer, made[reader.layer.output])
            positions = batches.positions(reader, batch, int(np.prod(out, dtype=np.int64)))
            for gram, unfolded in zip(grams[k], reader.unfolding.rows(x, positions, out), strict=True):
                gram.add(unfolded)
            rows[k] += len(x) * len(positions)

    stretches = _stretches(analysis, segments, wanted, most)
    states: list[Shelved] = [{} for _ in range(len(batches))]
    done = 0
    with Shelf(room.frontier) as shelf, workers(at_once) as spread:
        for number, stretch in enumerate(stretches):
            summing = [k for k in stretch.due if k < len(readers)]
            answering = [answered[k - len(readers)] for k in stretch.due if k >= len(readers)]
            names = sorted(set(stretch.passed).union(*(wanted[k] for k in stretch.due)))
            together = count * sample_bytes(analysis, stretch.passed)
            piece = None
            for wave in batches.waves(at_once):
                given = [shelf.get(states[batch]) if number else batches.feeds(batch) for batch in wave]
                piece = piece or segments.piece(stretch.start, stretch.stop, names, given[0])
                found = dict(zip(wave, spread(piece.run, given), strict=True))
                if answers is not None and answering:
                    if not wave.start:
                        answers.settle(answering, found[0])
                    spread(functools.partial(answers.take, answering), found.keys(), found.values())
                spread(functools.partial(add, found=found), summing)
                for batch, tensors in found.items():
                    states[batch] = shelf.put({name: tensors[name] for name in stretch.passed}, together)
                del given, found  # before the next batches come
                share = (number * len(batches) + wave.stop) / (len(stretches) * len(batches))
                progress.advance(int(share * count) - done)
                done = int(share * count)
    sums = [
        [Statistics.of_linear(gram.value, weights, rows[k]) for gram, weights in zip(grams[k], r.weights, strict=True)]
        for k, r in enumerate(readers)
    ]
    for reader, parts in zip(readers, sums, strict=True):
        check_finite(reader, parts, "the network")
    return sums


def in_pieces(analysis: Analysis, readers: Sequence[Reader], count: int, room: Room) -> bool:
    """Whether what flows between pieces finds room in memory.

    To write it to files and read it again takes longer than larger batches save.

    Args:
        analysis: of the network.
        readers: of it.
        count: of the samples.
        room: what there is.
    """
    return count * max((sample_bytes(analysis, [r.layer.data]) for r in readers), default=0) <= room.frontier


@dataclass(frozen=True)
class _Stretch:
    """Nodes that are run in one go.

    Attributes:
        start: the position of the first one.
        stop: the position behind the last one.
        due: of what is looked at together, which ones are known in full then.
        passed: tensors that the next stretches need.
    """

    start: int
    stop: int
    due: tuple[int, ...]
    passed: tuple[str, ...]


def _stretches(
    analysis: Analysis, segments: Segments, wanted: Sequence[Collection[str]], most: float
) -> list[_Stretch]:
    """The network in stretches of which each makes about so many bytes of wanted tensors for a sample, at most.

    Args:
        analysis: of the network.
        segments: of it.
        wanted: tensors that are looked at together.
        most: bytes.
    """
    graph, known = analysis.graph, analysis.shapes.known
    places = {name: segments.place[node.index] for name, node in graph.producer.items()}
    last = [max((places.get(name, 0) for name in names), default=0) for names in wanted]
    everything = set[str]().union(*wanted)

    def passed(stop: int) -> list[str]:
        later = {name for names, at in zip(wanted, last, strict=True) if at >= stop for name in names}
        here = {name for name in later if places.get(name, -1) < stop}
        return sorted(here.union(segments.frontier(stop)))

    stops, taken = [0], 0
    for stop, index in enumerate(segments.order):
        size = sample_bytes(analysis, [name for name in graph.nodes[index].outputs if name in everything])
        # a list of tensors, whose shape is not known, cannot be kept
        if taken and taken + size > most and size and all(map(known, passed(stop))):
            stops.append(stop)
            taken = 0
        taken += size
    stops.append(len(segments.order))
    return [
        _Stretch(
            start,
            stop,
            tuple(k for k, at in enumerate(last) if start <= at < stop),
            tuple(passed(stop)) if stop < stops[-1] else (),
        )
        for start, stop in itertools.pairwise(stops)
    ]


def _is_fixed(analysis: Analysis, reader: Reader) -> bool:
    """Whether a reader's output has the same inner sizes for every input."""
    rank = len(analysis.shapes.shape(reader.layer.output) or ())
    return all(analysis.shapes.is_static(reader.layer.output, axis) for axis in range(1, rank))
