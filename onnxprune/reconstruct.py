"""Statistics and kept channels -> weights: ridge regression towards the weights as they are.

    min over W of  |Y - X_S W|^2 + r |W - V_S|^2

with S the kept columns, V the original weights and the bias unpenalised. Shrinking towards the original rather than
towards zero means that few samples can do little harm; ``r`` is chosen on samples that the fit has not seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from onnxprune.statistics import Statistics

_REFINEMENTS = 8
_RELAXATION = 1.5  # steps of majorisation are short; over-relaxation below 2 keeps them descending
RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the mean of the Gram matrix' diagonal


@dataclass(frozen=True, eq=False)
class Fit:
    """Fitted weights (p, o) with zeros outside the kept columns, the ridge and the relative error they leave."""

    weights: np.ndarray
    ridge: float
    error: float


def solve(statistics: Statistics, kept: np.ndarray, prior: np.ndarray, ridge: float) -> np.ndarray:
    """The ridge solution on the kept columns, with more ridge where the matrix is not positive definite to rounding.

    Args:
        statistics: of the reader.
        kept: indices of the kept columns; the last column of the statistics is the bias.
        prior: (p, o) the weights to shrink towards, and what is left where no ridge helps.
        ridge: relative to the mean of the Gram matrix' diagonal.
    """
    while True:
        try:
            return _solve(statistics, kept, prior, ridge)
        except np.linalg.LinAlgError:
            if ridge > 1e3:
                sliced = np.zeros_like(prior, dtype=np.float64)
                sliced[kept] = prior[kept]
                return sliced
            ridge = max(10.0 * ridge, 1e-12)


def _solve(statistics: Statistics, kept: np.ndarray, prior: np.ndarray, ridge: float) -> np.ndarray:
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


def fit(folds: Sequence[Statistics], kept: np.ndarray, prior: np.ndarray, ridges: Sequence[float] = RIDGES) -> Fit:
    """Choose the ridge on the half that was not fitted, then fit on everything.

    Args:
        folds: statistics of two disjoint halves of the samples; of a single part, the last ridge is taken.
        kept: indices of the kept columns.
        prior: (p, o) the weights as they are; without a fit, those of the kept columns would be used.
        ridges: to choose from.
    """
    total = folds[0]
    for other in folds[1:]:
        total = total + other
    best, score = ridges[-1], np.inf
    if len(folds) > 1 and all(f.rows for f in folds):
        for ridge in ridges:
            seen = 0.0
            for k, held in enumerate(folds):
                rest = [f for j, f in enumerate(folds) if j != k]
                seen += held.error(solve(rest[0], kept, prior, ridge))
            if not seen < score:  # held-out error falls and then rises with the ridge
                break
            best, score = ridge, seen
    weights = solve(total, kept, prior, best)
    sliced = np.zeros_like(prior, dtype=np.float64)
    sliced[kept] = prior[kept]
    if total.error(sliced) < total.error(weights):  # never worse than leaving them alone
        weights = sliced
    energy = max(float(total.energy.sum()), np.finfo(float).tiny)
    return Fit(weights, best, total.error(weights) / energy)


@dataclass(frozen=True, eq=False)
class Saturation:
    """What stands between a layer's output ``z`` and a limiter: ``clip(scale * z + offset, low, high)``.

    Attributes:
        scale: (o,) of a BatchNormalization in between; ones where there is none.
        low: lower limit (zero for Relu).
        high: upper limit (infinite for Relu).
    """

    scale: np.ndarray
    low: float
    high: float

    def target(self, wanted: np.ndarray, offset: np.ndarray, now: np.ndarray) -> np.ndarray:
        """The nearest output to ``now`` that the limiter makes as good as ``wanted``; all (rows, o)."""
        after, goal = self.scale * now + offset, self.scale * wanted + offset
        limited = np.where(goal <= self.low, np.minimum(after, self.low), goal)
        if np.isfinite(self.high):
            limited = np.where(goal >= self.high, np.maximum(after, self.high), limited)
        alive = np.abs(self.scale) > 1e-3 * np.abs(self.scale).max()
        safe = np.where(alive, self.scale, 1.0)
        result: np.ndarray = np.where(alive & (limited != goal), (limited - offset) / safe, wanted)
        return result

    def open(self, wanted: np.ndarray, offset: np.ndarray, now: np.ndarray) -> np.ndarray:
        """Where a small change of ``now`` changes what is missing: not where both are cut off alike."""
        after, goal = self.scale * now + offset, self.scale * wanted + offset
        shut = (goal <= self.low) & (after <= self.low)
        if np.isfinite(self.high):
            shut |= (goal >= self.high) & (after >= self.high)
        result: np.ndarray = ~shut
        return result


Chunk = tuple[np.ndarray, np.ndarray, np.ndarray]


def refine(start: Fit, parts: Iterable[Chunk], saturation: Saturation, kept: np.ndarray, prior: np.ndarray) -> Fit:
    """Fit what comes out of the limiter behind the layer, rather than what goes in.

    Where the original is cut off, any output beyond the limit is as good. The squared error over such one-sided targets
    is convex; it is brought down by majorisation: set the target of every cut-off entry to the nearest good value,
    solve, repeat. Each step is one least-squares solution with the same matrix (in the spirit of the asymmetric
    nonlinear reconstruction of Zhang et al. 2015, *Accelerating Very Deep Convolutional Networks*).

    Args:
        start: the linear fit.
        parts: what is gone through at every step, a part of the rows at a time: (rows, kept) unfolded input, (rows, o)
            target of the layer's output, (rows, o) what is added behind it.
        saturation: the limiter.
        kept: indices of the kept columns.
        prior: (p, o) the weights to shrink towards, as in `fit`.
    """
    gram, energy = np.zeros((len(kept), len(kept))), 0.0
    for rows, wanted, _ in parts:
        gram += rows.T @ rows
        energy += float(np.square(wanted, dtype=np.float64).sum())
    energy = max(energy, np.finfo(float).tiny)
    bias = kept == len(prior) - 1
    ridge = np.full(len(kept), max(start.ridge, RIDGES[0]) * max(float(np.diag(gram).mean()), np.finfo(float).tiny))
    ridge[bias] = 1e-9 * np.diag(gram)[bias]
    gram[np.diag_indices_from(gram)] += ridge
    try:
        factor = cho_factor(gram, lower=True, overwrite_a=True, check_finite=False)
    except np.linalg.LinAlgError:
        return start
    weights, losses = start.weights[kept], []
    for step in range(_REFINEMENTS + 1):
        loss, right = 0.0, ridge[:, None] * prior[kept]
        for rows, wanted, offset in parts:
            now = rows @ weights.astype(rows.dtype)
            goal = saturation.target(wanted, offset, now)
            loss += float(np.square(goal - now, dtype=np.float64).sum())
            if step < _REFINEMENTS:
                right += rows.T @ goal
        losses.append(loss)
        if step < _REFINEMENTS:
            weights = weights + _RELAXATION * (cho_solve(factor, right) - weights)
    if not losses[-1] < losses[0]:
        return Fit(start.weights, start.ridge, losses[0] / energy)
    full = np.zeros_like(start.weights)
    full[kept] = weights
    return Fit(full, start.ridge, losses[-1] / energy)
