"""What a group's loss does to the network's output: the yardstick that makes errors comparable across layers.

Each group is narrowed alone, its readers fitted again in closed form, to a few widths, and the rest of the network is
run from there on a small part of the data (`divergence` says how outputs are compared).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune.analysis import Analysis
from onnxprune.batches import Batches, sample_bytes
from onnxprune.calibrate import Arrays
from onnxprune.divergence import Yardstick, deviation, unsquashed, yardsticks
from onnxprune.graph import Graph
from onnxprune.memory import Room
from onnxprune.parallel import MOST, workers
from onnxprune.picks import judged, picked
from onnxprune.precision import cast
from onnxprune.progress import Progress
from onnxprune.runtime import Runtime
from onnxprune.segments import Piece, Segments, late_order
from onnxprune.shelf import Shelf

_LOOKED_AT = 1 << 30  # bytes that the largest frontier of the samples may take

Variant = Mapping[str, np.ndarray]  # new values of some stored tensors


@dataclass(frozen=True, eq=False)
class Variants:
    """Alternatives to a network that all change the same stored tensors.

    Attributes:
        tensors: their names.
        made: from the number of an alternative to their values.
        count: how many alternatives there are.
        reference: what they are compared with; the original unless given.
    """

    tensors: Sequence[str]
    made: Callable[[int], Variant]
    count: int
    reference: Callable[[], Variant] | None = None


def _moved(
    suffix: Piece,
    states: Sequence[Mapping[str, np.ndarray]],
    wanted: Sequence[Mapping[str, np.ndarray]],
    compared: Mapping[str, Yardstick],
    arrays: Arrays,
    batch: int,
) -> float:
    """What a variant does to the output, summed over the samples of a batch."""
    return deviation(wanted[batch], suffix.run(states[batch], arrays), compared)


def _made(graph: Graph, variants: Variants, number: int) -> Arrays:
    """The values of one of the variants, as the model has them."""
    return _in_types(graph, variants.made(number))


def _in_types(graph: Graph, variant: Variant) -> Arrays:
    """The values as the model has them."""
    return {name: cast(values, graph.array(name).dtype) for name, values in variant.items()}


def measure(
    analysis: Analysis,
    variants: Mapping[int, Variants],
    batches: Batches,
    runtime: Runtime,
    progress: Progress,
    room: Room,
    arrays: Variant | None = None,
) -> dict[int, list[float]]:
    """Deviation of the output for variants of the network, each run only from the first changed layer on.

    Args:
        analysis: of the original.
        variants: per group.
        batches: the data to run on.
        runtime: how to run.
        progress: advanced by one per group.
        room: what this may take.
        arrays: stored tensors that are others in the network that the variants are of.
    """
    graph = analysis.graph
    # what is known to have a shape: lists of tensors and maps of names are no answers whose changes can be measured
    made = graph.producer.keys() - graph.computed_from_constants  # and not handed through from the inputs
    outputs = [n for n in graph.outputs if n in made and analysis.shapes.known(n)]
    fronts, alone = judged(analysis)
    rows = picked(analysis) if alone else frozenset[str]()
    names = list(dict.fromkeys([*(unsquashed(graph, n) for n in outputs), *fronts]))
    changed = {g: sorted(v.tensors) for g, v in variants.items() if v.count and v.tensors}
    first = {g: min(n.index for name in tensors for n in graph.consumers[name]) for g, tensors in changed.items()}
    order = late_order(graph, set(first.values()))
    segments = Segments(graph, order, runtime, analysis.shapes)
    place = {g: min(segments.place[n.index] for name in changed[g] for n in graph.consumers[name]) for g in changed}
    sizes = {at: sample_bytes(analysis, segments.frontier(at)) for at in set(place.values())}
    most = max(_LOOKED_AT // max(*sizes.values(), sample_bytes(analysis, fronts), 1), 1)
    used = [k for k in range(len(batches)) if batches.parts[k][-1] < most] or [0]
    samples = sum(len(batches.parts[k]) for k in used)
    parts = len(used) * max((v.count for v in variants.values()), default=0)
    at_once, shared = runtime.shared_out(min(max(parts, 1), MOST))
    suffixes = Segments(graph, order, shared, analysis.shapes)
    # where nothing that is stored silences a unit, its price is not known
    results = {g: [np.inf] * v.count for g, v in variants.items() if v.count and not v.tensors}
    with Shelf(room.frontier) as shelf, workers(at_once) as spread:
        states = [shelf.put(batches.feeds(k), samples * sample_bytes(analysis, segments.frontier(0))) for k in used]
        whole = segments.piece(0, len(order), names, shelf.get(states[0]))
        expected = [whole.run(shelf.get(state)) for state in states]
        del whole  # a session holds what it once needed
        compared = yardsticks(expected)
        here = 0
        for group in sorted(changed, key=lambda g: place[g]):
            if place[group] > here:
                frontier = segments.frontier(place[group])
                piece = segments.piece(here, place[group], frontier, shelf.get(states[0]), arrays)
                here = place[group]
                for k, state in enumerate(states):
                    found = piece.compute(shelf.get(state))
                    passed = {name: state[name] for name in frontier if name not in found}
                    states[k] = {**passed, **shelf.put(found, samples * sizes[here])}
                del piece, found
            # the outputs that come before this point are in the frontier only if somebody still reads them
            later = [n for n in names if segments.place[graph.producer[n].index] >= here]
            if not set(later).isdisjoint(fronts):  # of other boxes, say, none is a counterpart of another
                later = [n for n in later if n in fronts or n not in rows]
            suffix = suffixes.piece(here, len(order), later, shelf.get(states[0]), arrays, changed[group])
            given = [shelf.get(state) for state in states]
            if (reference := variants[group].reference) is None:
                wanted = [{n: found[n] for n in later} for found in expected]
            else:
                values = _in_types(graph, reference())
                wanted = spread(functools.partial(suffix.run, free=values), given)
            arrays_of = spread(functools.partial(_made, graph, variants[group]), range(variants[group].count))
            jobs = zip(*itertools.product(arrays_of, range(len(given))), strict=True)
            moved = spread(functools.partial(_moved, suffix, given, wanted, compared), *jobs)
            results[group] = (np.reshape(moved, (len(arrays_of), -1)).sum(axis=1) / samples).tolist()
            del suffix
            progress.advance()
    return results
