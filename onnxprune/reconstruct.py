"""Statistics and kept channels -> weights: ridge regression towards the weights as they are.

    min over W of  |Y - X_S W|^2 + r |W - V_S|^2

with S the kept columns, V the original weights and the bias unpenalised. Shrinking towards the original rather than
towards zero means that few samples can do little harm; ``r`` is chosen on samples that the fit has not seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from onnxprune.statistics import Statistics

RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the mean of the Gram matrix' diagonal


@dataclass(frozen=True, eq=False)
class Fit:
    """Fitted weights (p, o) with zeros outside the kept columns, the ridge and the relative error they leave."""

    weights: np.ndarray
    ridge: float
    error: float


def solve(statistics: Statistics, kept: np.ndarray, prior: np.ndarray, ridge: float) -> np.ndarray:
    """The ridge solution on the kept columns.

    Args:
        statistics: of the reader.
        kept: indices of the kept columns; the last column of the statistics is the bias.
        prior: (p, o) the weights to shrink towards.
        ridge: relative to the mean of the Gram matrix' diagonal.
    """
    gram = statistics.gram[np.ix_(kept, kept)].copy()
    diagonal = np.diag(gram)
    penalty = np.full(len(kept), ridge * max(float(diagonal.mean()), np.finfo(float).tiny))
    bias = kept == len(statistics.gram) - 1
    penalty[bias] = 1e-9 * diagonal[bias]
    gram[np.diag_indices_from(gram)] += penalty
    right = statistics.cross[kept] + penalty[:, None] * prior[kept]
    weights = np.zeros_like(prior, dtype=np.float64)
    weights[kept] = cho_solve(cho_factor(gram, lower=True, overwrite_a=True, check_finite=False), right)
    return weights


def fit(folds: Sequence[Statistics], kept: np.ndarray, prior: np.ndarray) -> Fit:
    """Choose the ridge on the half that was not fitted, then fit on everything.

    Args:
        folds: statistics of two disjoint halves of the samples.
        kept: indices of the kept columns.
        prior: (p, o) the weights as they are; without a fit, those of the kept columns would be used.
    """
    total = folds[0]
    for other in folds[1:]:
        total = total + other
    best, score = RIDGES[-1], np.inf
    if len(folds) > 1 and all(f.rows for f in folds):
        for ridge in RIDGES:
            seen = 0.0
            for k, held in enumerate(folds):
                rest = [f for j, f in enumerate(folds) if j != k]
                seen += held.error(_try(rest[0], kept, prior, ridge))
            if seen < score:
                best, score = ridge, seen
    weights = _try(total, kept, prior, best)
    sliced = np.zeros_like(prior, dtype=np.float64)
    sliced[kept] = prior[kept]
    if total.error(sliced) < total.error(weights):  # never worse than leaving them alone
        weights = sliced
    energy = max(float(total.energy.sum()), np.finfo(float).tiny)
    return Fit(weights, best, total.error(weights) / energy)


def _try(statistics: Statistics, kept: np.ndarray, prior: np.ndarray, ridge: float) -> np.ndarray:
    """Solve, with more ridge where the matrix is not positive definite."""
    while True:
        try:
            return solve(statistics, kept, prior, ridge)
        except np.linalg.LinAlgError:
            if ridge > 1e3:
                sliced = np.zeros_like(prior, dtype=np.float64)
                sliced[kept] = prior[kept]
                return sliced
            ridge *= 10.0
