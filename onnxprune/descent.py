"""The least-squares problem of a block, solved step by step for as long as samples held out gain by it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from onnxprune.blocks import BlockData
from onnxprune.joint import Linear, Network, Part, State, Vector, look, read
from onnxprune.memory import give_back
from onnxprune.parallel import MOST, Map, workers
from onnxprune.statistics import squared

ROUNDS = 2  # times that the pattern is looked at, at most
STEPS = 6  # of conjugate gradients at most, each round; the first one is also tried by half, where it is too far
_WORTH = 1e-3  # of the error at the start: what a step has to gain for another one to be taken
_ROWS_PER_COLUMN = 12  # of those that a preconditioner is made of: it need not be exact
_DAMPING = 1e-3  # of the Gram matrices, relative to the mean of the diagonal


@np.errstate(over="ignore", invalid="ignore")  # what is no number never counts as better
def fit_block(net: Network, parts: Sequence[Part], data: BlockData, held_out: BlockData) -> Vector | None:
    """Better weights for all layers of a block; None where none were found.

    Args:
        net: the block.
        parts: its layers, the inner ones first.
        data: samples to fit to.
        held_out: samples to judge by: a change that does not help there is not made.
    """
    scales = [1.0 / max(e, float(np.finfo(np.float32).tiny)) for e in data.energy]
    with workers(net.at_once) as spread:
        fitted, judging = _Side(net, data, scales, spread), _Side(net, held_out, scales, spread)
        weights = [p.weights for p in parts]
        states = fitted.look(weights)
        loss, judged = _loss(states), _loss(judging.look(weights))
        first = judged
        known = spread(lambda chunk, state: read(net, parts, chunk, state), fitted.chunks, states)
        for _ in range(ROUNDS):
            if not np.isfinite(loss):
                break
            found, least = None, judged
            try:
                give_back()
                problem = _Problem(fitted, parts, weights, states, known)
                # few steps keep the change small where samples are few: how many is for the other samples to say
                for number, change in enumerate(_path(problem)):
                    before, seen = least, _loss(judging.look(_sum(weights, change)))
                    if not number and not seen < least:
                        change = [0.5 * c for c in change]
                        seen = _loss(judging.look(_sum(weights, change)))
                    if seen < least:
                        found, least = change, seen
                    if number and not before - seen > _WORTH * first:
                        break
            except np.linalg.LinAlgError:  # activations so large that their squares are no numbers
                break
            if found is None:
                break
            after = fitted.look(_sum(weights, found))
            if not _loss(after) < loss:
                break
            weights, states, loss, judged = _sum(weights, found), after, _loss(after), least
    return weights if judged < first else None


class _Side:
    """Samples of a block in chunks that are worked on side by side.

    Args:
        net: the block.
        data: what it reads and should give.
        scales: what the squared error of each outer layer counts.
        spread: works on several chunks at a time.
    """

    def __init__(self, net: Network, data: BlockData, scales: Sequence[float], spread: Map) -> None:
        self.net, self.scales, self.spread = net, scales, spread
        step = max(-(-len(data) // MOST), 1)
        self.chunks = [data.take(slice(k, k + step)) for k in range(0, len(data), step)]

    def look(self, weights: Vector) -> list[State]:
        """What flows in the block at some weights."""
        return self.spread(lambda chunk: look(self.net, weights, chunk, self.scales), self.chunks)


def _loss(states: Sequence[State]) -> float:
    return sum(state.loss for state in states)


class _Problem:
    """The linear map of a block around its states, over all chunks, with a preconditioner.

    Args:
        side: the samples.
        parts: the block's layers, the inner ones first.
        weights: where the map is looked at.
        states: of every chunk there.
        known: per chunk and inner layer its unfolded input.
    """

    def __init__(
        self,
        side: _Side,
        parts: Sequence[Part],
        weights: Vector,
        states: Sequence[State],
        known: Sequence[list[np.ndarray]],
    ) -> None:
        self.side, self.parts, self.weights, self.states = side, parts, weights, states
        net, scales = side.net, side.scales
        self.inner = len(net.block.inner)
        self.maps: list[Linear] = side.spread(
            lambda chunk, state, rows: Linear(net, parts, chunk, scales, state, rows), side.chunks, states, known
        )
        self.factors = side.spread(self._factors, range(len(parts)))

    def forward(self, change: Vector) -> list[list[np.ndarray]]:
        """Per chunk, what the outer layers give more."""
        return self.side.spread(lambda linear: linear.forward(change), self.maps)

    def backward(self, missing: Sequence[Sequence[np.ndarray]]) -> Vector:
        """The transpose of `forward`."""
        parts = self.side.spread(lambda linear, gap: linear.backward(gap), self.maps, missing)
        return [sum(each[1:], start=each[0]) for each in zip(*parts, strict=True)]

    def precondition(self, gradient: Vector) -> Vector:
        """The solution if every layer stood alone."""
        result = []
        for part, factors, g in zip(self.parts, self.factors, gradient, strict=True):
            step = np.zeros_like(g)
            for group, active, factor in factors:
                step[group, active] = cho_solve(factor, g[group, active], check_finite=False)
            result.append(step * part.free)
        return result

    def _factors(self, k: int) -> list[tuple[int, np.ndarray, tuple[np.ndarray, bool]]]:
        """Groups of a layer that may change: their number, the columns that may, the factor of their Gram matrix."""
        weight, chunks = self._weight(k), [linear.rows[k] for linear in self.maps]
        count, columns = sum(rows.shape[1] for rows in chunks), chunks[0].shape[2]
        factors = []
        step = max(count // (_ROWS_PER_COLUMN * columns), 1)
        for group, free in enumerate(self.parts[k].free):
            active = np.flatnonzero(free.any(axis=1))
            if not len(active):  # a group of a grouped convolution that went as a whole
                continue
            gram = np.zeros((len(active), len(active)))
            for rows in chunks:
                used = rows[group, ::step][:, active]
                gram += used.T @ used
            factors.append((group, active, _factor(step * weight * gram)))
        return factors

    def _weight(self, k: int) -> float:
        """What a change of a layer's output means for the loss, on average."""
        scales = self.side.scales
        if k >= self.inner:
            return scales[k - self.inner]
        outer = zip(scales, self.weights[self.inner :], strict=True)
        total = sum(s * float(np.square(w[:, :-1]).sum()) for s, w in outer)
        between = self.states[0].between
        share = between.read.size / between.joined.size  # of what is made that a pool takes
        return share * total / between.read.shape[self.side.net.block.axis] or 1.0


def _path(problem: _Problem) -> Iterator[Vector]:
    """The change after every step of preconditioned conjugate gradients."""
    change = [np.zeros_like(p.weights) for p in problem.parts]
    missing = [state.missing for state in problem.states]
    gradient = problem.backward(missing)
    step = direction = problem.precondition(gradient)
    power = _dot(gradient, step)
    for left in reversed(range(STEPS)):
        moved = problem.forward(direction)
        bend = sum(s * squared(m) for chunk in moved for s, m in zip(problem.side.scales, chunk, strict=True))
        if not power > 0.0 or not bend > 0.0:
            break
        length = power / bend
        change = [c + length * d for c, d in zip(change, direction, strict=True)]
        yield change
        if not left:
            break
        missing = [
            [r - r.dtype.type(length) * m for r, m in zip(gaps, chunk, strict=True)]
            for gaps, chunk in zip(missing, moved, strict=True)
        ]
        gradient = problem.backward(missing)
        step = problem.precondition(gradient)
        before, power = power, _dot(gradient, step)
        direction = [z + power / before * d for z, d in zip(step, direction, strict=True)]


def _factor(gram: np.ndarray) -> tuple[np.ndarray, bool]:
    """The Cholesky factor of a Gram matrix and some damping: more where columns of very different sizes need it.

    Raises:
        LinAlgError: no damping helps, as with what is no number.
    """
    mean = float(np.diag(gram).mean())
    damping = _DAMPING
    while True:
        damped = gram.copy()
        damped[np.diag_indices_from(gram)] += damping * mean + np.finfo(np.float32).tiny
        try:
            factor: tuple[np.ndarray, bool] = cho_factor(damped, lower=True, overwrite_a=True, check_finite=False)
            return factor
        except np.linalg.LinAlgError:
            damping *= 10.0
            if damping > 1.0:
                raise


def _sum(a: Vector, b: Vector) -> Vector:
    return [x + y for x, y in zip(a, b, strict=True)]


def _dot(a: Vector, b: Vector) -> float:
    return sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))
