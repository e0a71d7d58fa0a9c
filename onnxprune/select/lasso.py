"""Channel selection by LASSO (He et al. 2017, equation 2), from statistics alone.

    min over b of  1/(2N) |Y - sum_i b_i Z_i|^2 + a |b|_1,     Z_i = X_i W_i

With ``X_i`` the columns of unit i and ``W_i`` its weights, the Gram matrix of the ``Z_i`` needs no samples:
``<Z_i, Z_j> = <X_i'X_j, W_i W_j'>``, so the problem has as many variables as units. The whole path in ``a`` is followed
by least-angle regression, which gives a selection for every width at once.
"""

from __future__ import annotations

import warnings

import numpy as np

from onnxprune.select.problem import Problem, Ranking


def lasso(problems: list[Problem]) -> Ranking:
    """Rank the units of a group along the LASSO path.

    Args:
        problems: one per reader; a unit has one coefficient for all of its readers.

    Returns:
        for every width the units whose coefficients are largest at the point of the path where enough are non-zero;
        errors are not computed.
    """
    from sklearn.exceptions import ConvergenceWarning  # takes as long to import as all the rest
    from sklearn.linear_model import lars_path_gram

    units = len(problems[0].columns)
    gram, target = np.zeros((units, units)), np.zeros(units)
    for problem in problems:
        one, two = _contracted(problem)
        gram += problem.scale * one
        target += problem.scale * two
    norms = np.sqrt(np.maximum(np.diag(gram), np.finfo(float).tiny))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # nearly equal channels: the path ends early, which is fine
        _, _, path = lars_path_gram(target, gram, n_samples=1, method="lasso", return_path=True)
    strength = np.abs(path) * norms[:, None]  # what a unit contributes, (units, steps)
    count = (path != 0).sum(axis=0)
    sets = np.zeros((units + 1, units), bool)
    for width in range(1, units + 1):
        reached = np.flatnonzero(count >= width)
        step = int(reached[0]) if len(reached) else path.shape[1] - 1
        # at a tie, and where the path ends early, the stronger units of the original go first
        best = np.lexsort((-norms, -strength[:, step]))
        sets[width, best[:width]] = True
    return Ranking(sets, np.full(units + 1, np.nan))


def _contracted(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Gram matrix of the Z_i and their products with the target."""
    columns, weights = problem.columns, problem.weights
    units, width = columns.shape
    flat = columns.ravel()
    product = problem.statistics.gram[np.ix_(flat, flat)] * (weights[flat] @ weights[flat].T)
    gram = product.reshape(units, width, units, width).sum(axis=(1, 3))
    # what always stays (bias, other groups) is taken off the target: it is not up for selection
    rest = np.ones(len(weights), bool)
    rest[flat] = False
    rest &= problem.active
    cross = problem.statistics.cross - problem.statistics.gram[:, rest] @ weights[rest]
    target = np.einsum("ubo,ubo->u", cross[columns], weights[columns])
    return gram, target
