"""The layer that gives scores of classes, fitted once more for the answers: which class, and how sure.

Squared error minds every score alike, also those of classes that nobody takes for the answer. So behind its
least-squares fit, a layer whose outputs are scores (rank 2, one for each class) is moved to

    min over W of  T^2 KL(softmax(s / T) || softmax(s' / T)) + c / 2K |s' - s0|^2

on average over the samples, with s the original's scores, s' those of W and s0 those of the least-squares fit, K
classes, and the temperature T of their yardstick (`divergence`; Hinton et al. 2015). For c = 1 the second term is what
the divergence itself would weigh if all classes were as likely; c is never smaller, so that little is lost where such
outputs are no classes' scores. The problem is convex.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.linalg import cholesky, solve_triangular
from scipy.special import log_softmax

from onnxprune.analysis import Analysis
from onnxprune.divergence import COMPARING, unsquashed, yardsticks
from onnxprune.parallel import Map
from onnxprune.readers import Reader
from onnxprune.reconstruct import Fit
from onnxprune.statistics import FOLDS
from onnxprune.surroundings import Behind

_CLOSENESS = (16.0, 4.0, 1.0)  # c: as far from the least-squares fit as samples that were not fitted to gain
_WORSE = 1.05  # times the squared error of scores may be, of samples that were not fitted to
_STEPS = 24  # of the quasi-Newton method, at most
_HISTORY = 4  # steps that it remembers: each costs twice the memory of the weights
_DAMPING = 1e-3  # of the Gram matrix, relative to the mean of its diagonal
_LARGEST = 1 << 21  # weights; more take too much of it
_BYTES = 96 << 20  # that what is kept of the samples may take
_PASSING = ("Flatten", "Reshape", "Squeeze", "Identity", "Dropout")


def gives_scores(analysis: Analysis, reader: Reader, behind: Behind) -> bool:
    """Whether a layer's outputs, and what `behind` adds to them, are scores of classes, one of each for a sample."""
    graph, shapes, count = analysis.graph, analysis.shapes, len(behind.shift)
    shape = shapes.shape(reader.layer.output) or ()
    channels = reader.layer.channel_axis % max(len(shape), 1)
    if len(reader.weights) != 1 or behind.residual or not (behind.scale == 1.0).all() or count < 2:
        return False
    if any(n != 1 for k, n in enumerate(shape) if k not in (0, channels)):
        return False
    ends = {unsquashed(graph, name) for name in graph.outputs}
    name = reader.layer.output
    while name not in ends:
        following = graph.consumers.get(name, ())
        if len(following) != 1 or following[0].domain:
            return False
        node = following[0]
        shifts = node.op == "Add" and name == reader.layer.output and behind.shift.any()  # by what `behind` found
        if not shifts and node.op not in _PASSING:
            return False
        name = node.outputs[0]
    # no answer excludes another
    each_alone = any(node.op in ("Sigmoid", *COMPARING) for node in graph.consumers.get(name, ()))
    return shapes.shape(name) == (shape[0], count) and not each_alone


@dataclass(eq=False)
class Scored:
    """What a layer reads, and the scores that it should give, of the samples of a fold.

    Attributes:
        shift: (K,) what is added to what the layer gives.
        count: samples that will come, in all folds.
        parts: per batch (n, p) rows that the layer reads and (n, K) scores of the original.
    """

    shift: np.ndarray
    count: int
    parts: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    def add(self, numbers: np.ndarray, rows: np.ndarray, wanted: np.ndarray) -> None:
        """Add a batch.

        Args:
            numbers: (n,) of the samples, among all: which are kept does not depend on the batches.
            rows: (n, p).
            wanted: (n, K).
        """
        step = -(-self.count * 4 * (rows.shape[1] + wanted.shape[1]) // _BYTES)
        step += step % FOLDS == 0  # of every fold some
        taken = numbers % step == 0
        self.parts.append((rows[taken].astype(np.float32), (wanted[taken] + self.shift).astype(np.float32)))

    def whole(self, kept: np.ndarray) -> _Side:
        """All of it, with these columns of the rows."""
        rows, wanted = (np.concatenate(arrays) for arrays in zip(*self.parts, strict=True))
        return _Side(rows[:, kept], wanted, self.shift.astype(np.float32))


@dataclass(frozen=True, eq=False)
class _Side:
    """Rows (n, p) of some samples and the scores (n, K) that they should give, of which a part is added behind."""

    rows: np.ndarray
    wanted: np.ndarray
    shift: np.ndarray

    def scores(self, weights: np.ndarray) -> np.ndarray:
        """What these weights give."""
        found: np.ndarray = self.rows @ weights.astype(np.float32) + self.shift
        return found

    def lost(self, weights: np.ndarray, heat: float) -> tuple[float, np.ndarray]:
        """The divergence, summed over the samples, and its gradient for the weights."""
        p, q = (log_softmax(s / heat, axis=1) for s in (self.wanted, self.scores(weights)))
        value = heat**2 * float(np.einsum("nk,nk->", np.exp(p), p - q, dtype=np.float64))
        return value, (self.rows.T @ (heat * (np.exp(q) - np.exp(p)))).astype(np.float64)

    def missed(self, weights: np.ndarray) -> float:
        """The squared error of the scores, summed."""
        gap = self.wanted - self.scores(weights)
        return float(np.einsum("nk,nk->", gap, gap, dtype=np.float64))


def sharpen(start: Fit, halves: Sequence[Fit], sides: Sequence[Scored], kept: np.ndarray, spread: Map) -> Fit:
    """Move a layer from its least-squares fit to where its answers are nearer to the original's.

    How far is said by samples that were not fitted to; where they gain by nothing, it stays where it is.

    Args:
        start: the fit to all samples.
        halves: the fits to each of the sides alone.
        sides: the samples.
        kept: indices of the kept columns.
        spread: works on both sides.
    """
    if start.weights[kept].size > _LARGEST or not all(any(len(rows) for rows, _ in side.parts) for side in sides):
        return start
    data = [side.whole(kept) for side in sides]
    heat = yardsticks([{"": side.wanted} for side in data])[""].temperature or 1.0
    alone = [half.weights[kept] for half in halves]

    def judged(weights: Sequence[np.ndarray]) -> tuple[float, float]:
        pairs = list(zip(weights, reversed(data), strict=True))
        return sum(other.lost(w, heat)[0] for w, other in pairs), sum(other.missed(w) for w, other in pairs)

    closeness, now = 0.0, list(alone)
    least, most = judged(alone)
    for far in _CLOSENESS:
        now = spread(functools.partial(_nearer, heat, far), [[side] for side in data], alone, now)
        lost, missed = judged(now)
        if not (lost < least and missed <= _WORSE * most):
            break
        closeness, least = far, lost
    if not closeness:
        return start
    first = start.weights[kept]
    found = start.weights.copy()
    found[kept] = _nearer(heat, closeness, data, first, first)
    before, after = (sum(side.missed(w[kept]) for side in data) for w in (start.weights, found))
    return Fit(found, start.ridge, start.error * after / max(before, np.finfo(float).tiny))


def _nearer(heat: float, closeness: float, data: Sequence[_Side], origin: np.ndarray, now: np.ndarray) -> np.ndarray:
    """The weights for one ``c``, by a quasi-Newton method (L-BFGS) in the metric of the rows' Gram matrix.

    Args:
        heat: the temperature.
        closeness: c.
        data: the samples.
        origin: (p, K) weights of the least-squares fit.
        now: (p, K) weights to begin with.
    """
    from scipy.optimize import minimize  # takes as long to import as NumPy

    count = sum(len(side.wanted) for side in data)
    gram = sum(side.rows.T @ side.rows for side in data).astype(np.float64) / count
    gram[np.diag_indices_from(gram)] += _DAMPING * float(np.diag(gram).mean()) + np.finfo(np.float32).tiny
    factor = cholesky(gram, lower=True)
    weight = closeness / origin.shape[1]

    def loss(move: np.ndarray) -> tuple[float, np.ndarray]:
        weights = origin + solve_triangular(factor, move.reshape(origin.shape), lower=True, trans=1)
        parts = [side.lost(weights, heat) for side in data]
        gradient = solve_triangular(factor, sum(g for _, g in parts) / count, lower=True)
        value = sum(v for v, _ in parts) / count + 0.5 * weight * float(move @ move)
        return value, gradient.ravel() + weight * move

    begin = (factor.T @ (now - origin)).ravel()
    options = {"maxiter": _STEPS, "maxcor": _HISTORY}
    found = minimize(loss, begin, jac=True, method="L-BFGS-B", options=options).x
    moved: np.ndarray = origin + solve_triangular(factor, found.reshape(origin.shape), lower=True, trans=1)
    return moved
