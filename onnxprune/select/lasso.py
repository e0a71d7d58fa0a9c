"""Channel selection by LASSO (He et al. 2017, equation 2), from statistics alone.

    min over b, W_0 of  1/(2N) |Y - X_0 W_0 - sum_i b_i Z_i|^2 + a |b|_1,     Z_i = X_i W_i

With ``X_i`` the columns of unit i and ``W_i`` its weights, the Gram matrix of the ``Z_i`` needs no samples:
``<Z_i, Z_j> = <X_i'X_j, W_i W_j'>``, so the problem has as many variables as units. Columns ``X_0`` that are not up for
selection (the bias, other groups) are free: what they can make up for, once they are fitted again, is no reason to keep
a unit. The path in ``a`` is followed by least-angle regression until a quarter of the units is gone; then the weights
``W_i`` of the others are fitted again, and the next path begins: the paper's two steps in turns.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np

from onnxprune.reconstruct import penalty, shrunk
from onnxprune.select.problem import DAMPING, Problem, Ranking
from onnxprune.statistics import Statistics

_SHARE = 0.25  # of the units that are left, how many go before weights are fitted again


def lasso(problems: list[Problem]) -> Ranking:
    """Rank the units of a group along LASSO paths.

    Args:
        problems: one per reader; a unit has one coefficient for all of its readers.

    Returns:
        for every width the units whose coefficients are largest at the point of the path where enough are non-zero;
        errors are not computed.
    """
    units = len(problems[0].columns)
    free = [_freed(problem) for problem in problems]
    sets = np.zeros((units + 1, units), bool)
    sets[units] = True
    left = np.arange(units)
    while len(left) > 1:
        gram, target = np.zeros((len(left), len(left))), np.zeros(len(left))
        for problem, sums in zip(problems, free, strict=True):
            one, two = _contracted(problem, sums, left)
            gram += problem.scale * one
            target += problem.scale * two
        fewest = len(left) - math.ceil(_SHARE * len(left))
        for width, chosen in _path(gram, target, range(fewest, len(left))).items():
            sets[width, left[chosen]] = True
        left = np.flatnonzero(sets[fewest])
    return Ranking(sets, np.full(units + 1, np.nan))


def _path(gram: np.ndarray, target: np.ndarray, widths: Sequence[int]) -> dict[int, np.ndarray]:
    """For some widths, which variables the path keeps."""
    from sklearn.exceptions import ConvergenceWarning  # takes as long to import as all the rest
    from sklearn.linear_model import lars_path_gram

    norms = np.sqrt(np.maximum(np.diag(gram), np.finfo(float).tiny))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # nearly equal channels: the path ends early, which is fine
        _, _, path = lars_path_gram(target, gram, n_samples=1, method="lasso", return_path=True)
    strength = np.abs(path) * norms[:, None]  # what a unit contributes, (units, steps)
    count = (path != 0).sum(axis=0)
    found = {}
    for width in widths:
        reached = np.flatnonzero(count >= width)
        step = int(reached[0]) if len(reached) else path.shape[1] - 1
        # at a tie, and where the path ends early, the stronger units of the original go first
        found[width] = np.lexsort((-norms, -strength[:, step]))[:width]
    return found


def _freed(problem: Problem) -> Statistics:
    """Sums of the units' columns alone, unit by unit, the other columns fitted to what is left (Schur complements)."""
    gram, cross, flat = problem.statistics.gram, problem.statistics.cross, problem.columns.ravel()
    rest = problem.active.copy()
    rest[flat] = False
    fixed = np.flatnonzero(rest)
    among = gram[np.ix_(fixed, fixed)]
    cost = penalty(np.diag(among), fixed == len(gram) - 1, DAMPING)
    among[np.diag_indices_from(among)] += cost + np.finfo(float).tiny
    fitted = np.linalg.solve(among, gram[np.ix_(fixed, flat)])
    left = cross[flat] - fitted.T @ (cross[fixed] + cost[:, None] * problem.weights[fixed])
    own = gram[np.ix_(flat, flat)] - gram[np.ix_(flat, fixed)] @ fitted
    return Statistics(own, left, problem.statistics.energy, problem.statistics.rows)


def _contracted(problem: Problem, free: Statistics, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gram matrix of the Z_i of some units and their products with the target, for weights that are fitted again.

    Args:
        problem: of one reader.
        free: sums of all units' columns, as `_freed` gives them.
        units: those that are left.
    """
    width = problem.columns.shape[1]
    sums = free.of(np.arange(problem.columns.size).reshape(-1, width)[units].ravel())
    prior = problem.weights[problem.columns[units].ravel()]
    weights = shrunk(sums, np.zeros(len(prior), bool), prior, DAMPING)
    product = sums.gram * (weights @ weights.T)
    target = (sums.cross * weights).sum(axis=1)
    return product.reshape(len(units), width, len(units), width).sum(axis=(1, 3)), target.reshape(-1, width).sum(axis=1)
