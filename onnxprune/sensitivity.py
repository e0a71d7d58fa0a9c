"""What a group's loss does to the network's output: the yardstick that makes errors comparable across layers.

Each group is narrowed alone, its readers fitted again in closed form, to a few widths, and the rest of the network is
run from there on a small part of the data: Kullback-Leibler divergence where the output is class scores, relative
squared error elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import log_softmax

from onnxprune.analysis import Analysis
from onnxprune.calibrate import FRONTIER_BYTES, Arrays, Batches, sample_bytes
from onnxprune.precision import cast
from onnxprune.progress import Progress
from onnxprune.runtime import Runtime
from onnxprune.segments import Segments, late_order


def divergence(original: Mapping[str, np.ndarray], changed: Mapping[str, np.ndarray]) -> float:
    """How far outputs moved, summed over the samples and the floating-point outputs.

    Scores (rank 2, at least two classes) are compared as distributions, mean KL(original || changed) in nats; they may
    be logits or probabilities. Other outputs by squared error relative to their variance.
    """
    total = 0.0
    for name, a in original.items():
        b = changed[name]
        if a.dtype.kind != "f" or a.shape != b.shape or not a.size:
            continue
        one, two = a.astype(np.float64), b.astype(np.float64)
        if not np.isfinite(two).all():
            return float("inf")
        if a.ndim == 2 and a.shape[1] > 1:
            p, q = _log_probabilities(one), _log_probabilities(two)
            total += float((np.exp(p) * (p - q)).sum())
        else:
            spread = float(np.square(one - one.mean()).mean()) or 1.0
            total += float(np.square(one - two).mean() / spread) * len(a)
    return total


def _log_probabilities(scores: np.ndarray) -> np.ndarray:
    if (scores >= 0).all() and np.allclose(scores.sum(axis=1), 1.0, atol=1e-3):
        result: np.ndarray = np.log(np.maximum(scores, 1e-12))
        return result
    found: np.ndarray = log_softmax(scores, axis=1)
    return found


Variant = Mapping[str, np.ndarray]  # new values of some stored tensors


def measure(
    analysis: Analysis,
    variants: Mapping[int, Sequence[Variant]],
    batches: Batches,
    runtime: Runtime,
    progress: Progress,
) -> dict[int, list[float]]:
    """Divergence of the output for variants of the network, each run only from the first changed layer on.

    Args:
        analysis: of the original.
        variants: per group, alternatives that all change the same stored tensors.
        batches: the data to run on.
        runtime: how to run.
        progress: advanced by one per group.
    """
    graph = analysis.graph
    names = [n for n in graph.outputs if n not in graph.computed_from_constants]
    changed = {g: sorted(options[0]) for g, options in variants.items() if options and options[0]}
    first = {g: min(n.index for name in tensors for n in graph.consumers[name]) for g, tensors in changed.items()}
    order = late_order(graph, set(first.values()))
    segments = Segments(graph, order, runtime, analysis.shapes)
    place = {g: min(segments.place[n.index] for name in changed[g] for n in graph.consumers[name]) for g in changed}
    widest = max((sample_bytes(analysis, segments.frontier(at)) for at in set(place.values())), default=0)
    room = max(FRONTIER_BYTES // max(widest, 1), 1)
    used = [k for k in range(len(batches)) if sum(map(len, batches.parts[: k + 1])) <= room] or [0]
    states = [dict(batches.feeds(batch)) for batch in used]
    whole = segments.piece(0, len(order), names, states[0])
    expected = [whole.run(feeds) for feeds in states]
    # where nothing that is stored silences a unit, its price is not known
    results = {g: [np.inf] * len(options) for g, options in variants.items() if options and not options[0]}
    here = 0
    samples = sum(len(batches.parts[k]) for k in used)
    for group in sorted(changed, key=lambda g: place[g]):
        if place[group] > here:
            piece = segments.piece(here, place[group], segments.frontier(place[group]), states[0])
            states = [piece.run(tensors) for tensors in states]
            here = place[group]
        # the outputs that come before this point are in the frontier only if somebody still reads them
        later = [n for n in names if n not in graph.producer or segments.place[graph.producer[n].index] >= here]
        suffix = segments.piece(here, len(order), later, states[0], free=changed[group])
        results[group] = []
        for variant in variants[group]:
            arrays: Arrays = {k: cast(v, graph.array(k).dtype) for k, v in variant.items()}
            moved = sum(
                divergence({n: wanted[n] for n in later}, suffix.run(tensors, arrays))
                for tensors, wanted in zip(states, expected, strict=True)
            )
            results[group].append(moved / samples)
        progress.advance()
    return results
