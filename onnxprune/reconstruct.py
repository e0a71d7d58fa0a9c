"""Statistics and kept channels -> weights: ridge regression towards the weights as they are.

    min over W of  |Y - X_S W|^2 + r |W - V_S|^2

with S the kept columns, V the original weights and the bias unpenalised. Shrinking towards the original rather than
towards zero means that few samples can do little harm; ``r`` is chosen on samples that the fit has not seen.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from onnxprune.parallel import Map, workers
from onnxprune.statistics import Gram, Statistics

_REFINEMENTS = 8
DOUBTFUL = 32  # rows for a column: of fewer, a fit has to show on others what it is worth
_RELAXATION = 1.5  # steps of majorisation are short; over-relaxation below 2 keeps them descending
_NOISE = float(np.finfo(np.float32).eps)  # of the energy: smaller errors are those of the sums themselves
RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the mean of the Gram matrix' diagonal


@dataclass(frozen=True, eq=False)
class Fit:
    """Fitted weights (p, o) with zeros outside the kept columns, the ridge and the relative error they leave.

    The ridge is infinite where samples held out gain nothing by a fit: the weights are as they were.
    """

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
    found = np.zeros_like(prior, dtype=np.float64)
    found[kept] = shrunk(statistics.of(kept), kept == len(prior) - 1, prior[kept], ridge)
    return found


def shrunk(statistics: Statistics, bias: np.ndarray, prior: np.ndarray, ridge: float) -> np.ndarray:
    """`solve` where all columns are kept; which of them is the bias."""
    if np.isinf(ridge):
        return prior.astype(np.float64)
    while True:
        cost = penalty(np.diag(statistics.gram), bias, ridge)
        gram = statistics.gram.copy()
        gram[np.diag_indices_from(gram)] += cost
        right = statistics.cross + cost[:, None] * prior
        try:
            found: np.ndarray = cho_solve(cho_factor(gram, lower=True, overwrite_a=True, check_finite=False), right)
            return found
        except np.linalg.LinAlgError:
            if ridge > 1e3:
                return prior.astype(np.float64)
            ridge = max(10.0 * ridge, 1e-12)


def penalty(diagonal: np.ndarray, bias: np.ndarray, ridge: float) -> np.ndarray:
    """What a fit pays for a step away from the weights as they are, per column: hardly anything for that of the bias.

    Args:
        diagonal: of the Gram matrix.
        bias: which of the columns it is.
        ridge: relative to the mean of the diagonal.
    """
    found = np.full(len(diagonal), ridge * max(float(diagonal.mean()), np.finfo(float).tiny))
    found[bias] = 1e-9 * diagonal[bias]
    return found


def fit(folds: Sequence[Statistics], kept: np.ndarray, prior: np.ndarray, ridges: Sequence[float] = RIDGES) -> Fit:
    """Choose the ridge on the half that was not fitted, then fit on everything; or leave the weights as they are.

    Args:
        folds: statistics of two disjoint halves of the samples; of a single part, the last ridge is taken.
        kept: indices of the kept columns.
        prior: (p, o) the weights as they are; without a fit, those of the kept columns would be used.
        ridges: to choose from.
    """
    parts = [f.of(kept) for f in folds]
    total = functools.reduce(operator.add, parts)
    sliced, bias = prior[kept].astype(np.float64), kept == len(prior) - 1
    energy = max(float(total.energy.sum()), np.finfo(float).tiny)
    best, score = ridges[-1], np.inf
    if len(parts) > 1 and all(f.rows for f in parts):
        for ridge in ridges:
            seen = 0.0
            for k, held in enumerate(parts):
                rest = [f for j, f in enumerate(parts) if j != k]
                seen += held.error(shrunk(rest[0], bias, sliced, ridge))
            if not seen < score:  # held-out error falls and then rises with the ridge
                break
            best, score = ridge, seen
        if not score + _NOISE * energy < sum(held.error(sliced) for held in parts):
            best = np.inf
    weights = shrunk(total, bias, sliced, best)
    error, unfitted = total.error(weights), total.error(sliced)
    if unfitted < error:  # never worse than leaving them alone
        weights, error = sliced, unfitted
    whole = np.zeros_like(prior, dtype=np.float64)
    whole[kept] = weights
    return Fit(whole, best, error / energy)


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

    def interval(self, wanted: np.ndarray, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """From where to where an output is as good as ``wanted``, behind the limiter; all (rows, o).

        Where the original is not cut off, that is ``wanted`` alone.
        """
        goal = self.scale * wanted + offset
        alive = np.abs(self.scale) > 1e-3 * np.abs(self.scale).max()
        safe = np.where(alive, self.scale, 1.0)
        least, most = wanted.copy(), wanted.copy()
        for limit, shut, turned in ((self.low, goal <= self.low, False), (self.high, goal >= self.high, True)):
            if np.isfinite(limit):
                upwards = (self.scale < 0) != turned  # which outputs are cut off: all above the bound, or all below
                bound = ((limit - offset) / safe).astype(wanted.dtype)
                least = np.where(shut, np.where(upwards & alive, bound, -np.inf), least)
                most = np.where(shut, np.where(~upwards & alive, bound, np.inf), most)
        return least.astype(wanted.dtype, copy=False), most.astype(wanted.dtype, copy=False)


Chunk = tuple[np.ndarray, np.ndarray, np.ndarray]


def refine(
    start: Fit,
    sides: Sequence[Iterable[Chunk]],
    energy: float,
    kept: np.ndarray,
    prior: np.ndarray,
    spread: Map,
    gram: np.ndarray | None = None,
    halves: Sequence[Fit] = (),
) -> Fit:
    """Fit what comes out of the limiter behind the layer, rather than what goes in.

    Where the original is cut off, any output beyond the limit is as good. The squared error over such one-sided targets
    is convex; it is brought down by majorisation: set the target of every entry to the nearest good value, solve,
    repeat. Each step is one least-squares solution with the same matrix (in the spirit of the asymmetric nonlinear
    reconstruction of Zhang et al. 2015, *Accelerating Very Deep Convolutional Networks*).

    Args:
        start: the linear fit.
        sides: what is gone through at every step, side by side, a part of the rows at a time: (rows, kept) unfolded
            input, (rows, o) the least and (rows, o) the largest output that is as good as the original's.
        energy: of the original's output on these rows.
        kept: indices of the kept columns.
        prior: (p, o) the weights to shrink towards, as in `fit`.
        spread: works on the sides.
        gram: (kept, kept) ``X'X`` of all rows; None where it is to be found.
        halves: the linear fits to each of the two sides alone, where rows are so few that it is in doubt what they say
            of others: nothing is refined then unless what is refined on one side is better on the other as well.
    """
    if np.isinf(start.ridge):  # what does not even gain by the linear fit
        return start
    if halves and not _helps(halves, sides, kept, prior):
        return start
    if gram is None:
        gram = functools.reduce(operator.add, spread(functools.partial(_gram, len(kept)), sides))
    energy = max(energy, np.finfo(float).tiny)
    ridge = penalty(np.diag(gram), kept == len(prior) - 1, max(start.ridge, RIDGES[0]))
    try:
        factor = cho_factor(gram + np.diag(ridge), lower=True, overwrite_a=True, check_finite=False)
    except np.linalg.LinAlgError:
        return start
    weights, losses = start.weights[kept], []
    for step in range(_REFINEMENTS + 1):
        last = step == _REFINEMENTS
        found = spread(functools.partial(_nearest, weights, last), sides)
        losses.append(sum(loss for loss, _ in found))
        if not last:
            right = ridge[:, None] * prior[kept] + sum(product for _, product in found)
            weights = weights + _RELAXATION * (cho_solve(factor, right) - weights)
    if not losses[-1] < losses[0]:
        return Fit(start.weights, start.ridge, losses[0] / energy)
    full = np.zeros_like(start.weights)
    full[kept] = weights
    return Fit(full, start.ridge, losses[-1] / energy)


def _helps(halves: Sequence[Fit], sides: Sequence[Iterable[Chunk]], kept: np.ndarray, prior: np.ndarray) -> bool:
    """Whether what is refined on either side is better on the other."""
    before = after = 0.0
    with workers(1) as alone:
        for half, side, other in zip(halves, sides, reversed(sides), strict=True):
            refined = refine(half, [side], 1.0, kept, prior, alone)
            before, after = (
                total + _nearest(each.weights[kept], True, other)[0]
                for total, each in ((before, half), (after, refined))
            )
    return after < before


def _gram(columns: int, side: Iterable[Chunk]) -> np.ndarray:
    """``X'X`` of all rows."""
    sums = Gram(columns)
    for rows, _, _ in side:
        sums.add(rows)
    return sums.value


def _nearest(weights: np.ndarray, last: bool, side: Iterable[Chunk]) -> tuple[float, np.ndarray]:
    """How far the outputs are from the nearest good ones, squared; and those times the input, unless it is the last."""
    loss, right = 0.0, np.zeros_like(weights)
    for rows, least, most in side:
        goal = rows @ weights.astype(rows.dtype)
        now = goal.copy()
        np.clip(now, least, most, out=goal)
        now -= goal
        loss += float(np.einsum("ro,ro->", now, now, dtype=np.float64))
        if not last:
            right += rows.T @ goal
    return loss, right
