"""Which units of a group stay: the methods by name, applied to the statistics of the group's readers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from onnxprune.analysis import Analysis, GroupInfo
from onnxprune.errors import InputError
from onnxprune.readers import Reader
from onnxprune.reconstruct import solve
from onnxprune.select import DAMPING, Problem, Ranking, greedy, lasso, ordered, wanda
from onnxprune.statistics import Statistics

METHODS = ("greedy", "lasso", "wanda", "l1", "slimming", "random")
_WIDTHS = 16  # at which the errors of a ranking are worked out
FROM_ACTIVATIONS = {"greedy": greedy, "lasso": lasso, "wanda": wanda}


def problems_of(
    group: int,
    readers: Sequence[Reader],
    statistics: Mapping[int, Sequence[Statistics]],
    gone: Mapping[int, np.ndarray],
) -> list[Problem]:
    """The selection problems of a group, one per reader and group of its convolution.

    Args:
        group: index of the group.
        readers: all readers.
        statistics: per reader index, per group of its convolution.
        gone: per reader index, columns that belong to units removed before.
    """
    problems = []
    for reader in readers:
        if group not in reader.columns or reader.index not in statistics:
            continue
        scales = reader.output_scale.reshape(len(reader.weights), -1)
        active = np.ones(reader.width, bool)
        active[gone.get(reader.index, np.empty(0, np.int64))] = False
        parts = []
        for g, part in enumerate(statistics[reader.index]):
            scaled = Statistics(part.gram, part.cross * scales[g], part.energy * scales[g] ** 2, part.rows)
            parts.append((scaled, reader.weights[g] * scales[g]))
        # of a target that never changes, all variance is rounding; of one that is nothing at all, there is none
        rounding = float(np.finfo(np.float32).eps) * sum(float(s.energy.sum()) for s, _ in parts)
        energy = max(sum(_variance(s) for s, _ in parts), rounding) or 1.0
        problems += [Problem(s, w, reader.columns[group], active, 1.0 / energy) for s, w in parts]
    return problems


def _variance(statistics: Statistics) -> float:
    """Energy of the target about its mean; the last column of the Gram matrix holds the sums."""
    sums = statistics.cross[-1]
    return float((statistics.energy - sums**2 / max(statistics.rows, 1)).sum())


def rank(method: str, info: GroupInfo, problems: list[Problem], analysis: Analysis, seed: int) -> Ranking:
    """Rank a group's units.

    A group that no fitted layer reads, and methods that look at weights alone, are ranked by weights.
    """
    if method == "random":
        return ordered(np.random.default_rng([seed, info.group.index]).permutation(info.units))
    if method == "slimming":
        return ordered(np.argsort(-scales(info, analysis), kind="stable"))
    if method == "l1" or not problems:
        return ordered(np.argsort(-filter_norms(info, analysis), kind="stable"))
    return FROM_ACTIVATIONS[method](problems)


def with_errors(ranking: Ranking, problems: Sequence[Problem]) -> Ranking:
    """A ranking with the squared error of the best weights: worked out at some widths, and in proportion in between.

    Without, the damage between two widths at which it was measured would be taken to grow evenly.

    Args:
        ranking: whose errors need not be known.
        problems: of the group; where there are none, the ranking stays as it is.
    """
    if not problems or not np.isnan(ranking.errors).any():
        return ranking
    units = len(ranking.sets) - 1
    widths = np.unique(np.linspace(0, units, _WIDTHS + 1).round().astype(np.int64))
    errors = [sum(_least_error(problem, ranking.sets[width]) for problem in problems) for width in widths]
    return replace(ranking, errors=np.interp(np.arange(units + 1), widths, errors))


def _least_error(problem: Problem, kept: np.ndarray) -> float:
    active = problem.active.copy()
    active[problem.columns[~kept].ravel()] = False
    weights = solve(problem.statistics, np.flatnonzero(active), problem.weights, DAMPING)
    return problem.scale * problem.statistics.error(weights)


def filter_norms(info: GroupInfo, analysis: Analysis) -> np.ndarray:
    """Sum of absolute weights of the filters that make each unit (Li et al. 2017), (units,)."""
    graph = analysis.graph
    made = {(layer.weight, layer.out_axis) for layer in analysis.layers if layer.node.label in info.producers}
    total = np.zeros(info.units)
    axes = [axis for axis in info.group.axes if (axis.tensor, axis.axis) in made]
    for axis in axes or [a for a in info.group.axes if graph.is_stored(a.tensor)]:
        array = np.abs(graph.array(axis.tensor).astype(np.float64))
        per_position = array.sum(axis=tuple(k for k in range(array.ndim) if k != axis.axis))
        total += per_position[axis.positions].sum(axis=1)
    return total


def scales(info: GroupInfo, analysis: Analysis) -> np.ndarray:
    """Absolute scale of BatchNormalization of each unit, averaged over the nodes it passes (Liu et al. 2017).

    Raises:
        InputError: the group passes no BatchNormalization.
    """
    graph = analysis.graph
    gammas = {n.inputs[1] for n in graph.nodes if n.op == "BatchNormalization" and graph.is_stored(n.inputs[1])}
    found = [
        np.abs(graph.array(axis.tensor).astype(np.float64))[axis.positions].mean(axis=1)
        for axis in info.group.axes
        if axis.tensor in gammas
    ]
    if not found:
        raise InputError(
            f"--select slimming needs BatchNormalization nodes; group {info.name!r} passes none"
            " (they may be folded into the convolutions): export the model without folding, or use --select greedy"
        )
    result: np.ndarray = np.mean(found, axis=0)
    return result


def unfitted_weights(info: GroupInfo, analysis: Analysis, readers: Sequence[Reader]) -> bool:
    """Whether some layer that reads the group is not among the readers, so that zeros there cannot silence it."""
    reading = {r.layer.node.label for r in readers if info.group.index in r.columns}
    return not set(info.consumers) <= reading or not reading
