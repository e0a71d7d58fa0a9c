"""The weights of a block, brought down by small steps for as long as samples held out gain by it.

A step looks at a part of the samples: what flows at the weights as they are, what is missing behind, and which way the
weights would bring it (`joint`). It is taken in the metric of the layers' Gram matrices, in which one length suits all
directions, and with momentum (Polyak 1964, *Some methods of speeding up the convergence of iteration methods*). Steps
on parts are noisy, and there are many of them for the price of one on all samples; the mean of the weights over half a
pass, by which samples held out judge, has little of the noise (Polyak and Juditsky 1992, *Acceleration of stochastic
approximation by averaging*).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from onnxprune.blocks import BlockData
from onnxprune.joint import CHUNKS, Linear, Network, Part, State, Vector, look
from onnxprune.memory import give_back
from onnxprune.parallel import Map, workers

PASSES = 6  # over the samples, at most
_STEPS = 16  # of a pass: as many parts
_SOUNDED = 4, 8  # of so many samples one, at least and at most, tells the metric and the length of the steps
_SOUNDINGS = 16  # positions per column that are to be left for that
_MOMENTUM = 0.8
_POWER = 4  # rounds of power iteration, at most
_SAFETY = 1.2  # how much larger the largest eigenvalue may be than those rounds say
_DOUBT = 3.0  # and than fewer of them say
_NOISE = 0.05  # of a part, that steps may take over: times rows for a column it bounds their length
_WORTH = 2e-2  # of the error at the start: what a pass has to gain for another one to be made
_ROWS_PER_COLUMN = 64  # of those that the metric is made of, at most: what is seldom active must not be overlooked
_DAMPING = 1e-3  # of the Gram matrices, relative to the mean of the diagonal


@np.errstate(over="ignore", invalid="ignore", divide="ignore")  # what is no number never counts as better
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
        loss, weights = _Loss(net, parts, scales, spread), [p.weights for p in parts]
        judging = _chunks(held_out, np.arange(len(held_out)))
        first = least = loss.value(weights, judging)
        give_back()
        columns = max(*(int(part.free.any(axis=2).sum(axis=1).max()) for part in parts), 1)
        rows = data.least[0].size / data.least[0].shape[net.block.axis]
        sounded = int(np.clip(rows / (_SOUNDINGS * columns), *_SOUNDED))
        steps = min(_STEPS, len(data))
        noise = _NOISE * (1.0 - _MOMENTUM) * rows / steps / columns
        try:
            metric = _Metric(loss, weights, _chunks(data, np.arange(0, len(data), sounded)), noise)
        except np.linalg.LinAlgError:  # activations so large that their squares are no numbers
            return None
        length = min(1.0 / (_SAFETY * metric.steepest), noise)
        best = None
        for _ in range(PASSES):
            before, weights = least, _pass(loss, metric, weights, data, steps, length)
            seen = loss.value(weights, judging)
            if seen < least:
                best, least = weights, seen
            if not before - seen > _WORTH * first:
                break
    return best


def _parts(samples: np.ndarray) -> list[np.ndarray]:
    """Some samples in parts that are worked on side by side."""
    return [part for part in np.array_split(samples, CHUNKS) if len(part)]


def _chunks(data: BlockData, samples: np.ndarray) -> list[BlockData]:
    """The data of these parts."""
    return [data.take(part) for part in _parts(samples)]


def _pass(loss: _Loss, metric: _Metric, weights: Vector, data: BlockData, steps: int, length: float) -> Vector:
    """The mean of the weights over the second half of a pass over the data, in so many steps of that length."""
    speed, total, count = [np.zeros_like(w) for w in weights], [np.zeros_like(w) for w in weights], 0
    for step in range(steps):
        samples = np.arange(step, len(data), steps)
        ahead = metric.solve(loss.gradient(weights, data, samples))
        share = length * metric.count / len(samples)
        speed = [_MOMENTUM * old + share * new for old, new in zip(speed, ahead, strict=True)]
        weights = _sum(weights, speed)
        if 2 * step >= steps - 1:
            total, count = _sum(total, weights), count + 1
    return [each / count for each in total]


class _Loss:
    """How far a block is from what it should give, as a function of its weights.

    Args:
        net: the block.
        parts: its layers.
        scales: what the squared error of each outer layer counts.
        spread: works on several chunks at a time.
    """

    def __init__(self, net: Network, parts: Sequence[Part], scales: Sequence[float], spread: Map) -> None:
        self.net, self.parts, self.scales, self.spread = net, parts, scales, spread

    def look(self, weights: Vector, chunk: BlockData) -> State:
        """What flows in the block."""
        return look(self.net, weights, chunk, self.scales)

    def linear(self, chunk: BlockData, state: State) -> Linear:
        """The block as a linear map around a state."""
        return Linear(self.net, self.parts, chunk, self.scales, state)

    def value(self, weights: Vector, chunks: Sequence[BlockData]) -> float:
        """The loss on some samples."""
        return float(sum(self.spread(lambda chunk: self.look(weights, chunk).loss, chunks)))

    def gradient(self, weights: Vector, data: BlockData, samples: np.ndarray) -> Vector:
        """Half of the direction in which it falls."""

        def of(part: np.ndarray) -> Vector:
            chunk = data.take(part)
            state = self.look(weights, chunk)
            return self.linear(chunk, state).backward(state.missing)

        return _total(self.spread(of, _parts(samples)))


class _Metric:
    """How much a change of every weight matters, layer by layer, and how steep the loss is in that metric.

    Args:
        loss: of the block.
        weights: where it is looked at.
        chunks: some of the samples.
        longest: no step will be longer, so that less need be known of what is not steep.

    Attributes:
        count: of these samples.
        steepest: half of the second derivative in the steepest direction, by power iteration that begins at the
            gradient; 1 if the layers were alone and their outputs mattered alike.
    """

    def __init__(self, loss: _Loss, weights: Vector, chunks: Sequence[BlockData], longest: float) -> None:
        self.parts, self.count, spread = loss.parts, sum(map(len, chunks)), loss.spread
        states: list[State] = spread(lambda chunk: loss.look(weights, chunk), chunks)
        maps: list[Linear] = spread(loss.linear, chunks, states)
        numbers = range(len(self.parts))
        self._factors = spread(lambda k: _factors(loss, k, weights, states[0], [m.rows[k] for m in maps]), numbers)
        gradient = _total(spread(lambda linear, state: linear.backward(state.missing), maps, states))
        ahead = self.solve(gradient)
        for _ in range(_POWER):
            ahead = [a / np.sqrt(_dot(gradient, ahead)) for a in ahead]
            turn = functools.partial(_turned, ahead)
            gradient, before = _total(spread(turn, maps)), ahead
            ahead = self.solve(gradient)
            self.steepest = _dot(gradient, ahead) / _dot(gradient, before)
            if _DOUBT * _SAFETY * self.steepest * longest < 1.0:
                break

    def solve(self, gradient: Vector) -> Vector:
        """The step that would do if every layer stood alone."""
        result = []
        for part, factors, g in zip(self.parts, self._factors, gradient, strict=True):
            step = np.zeros_like(g)
            for group, active, factor in factors:
                step[group, active] = cho_solve(factor, g[group, active], check_finite=False)
            result.append(step * part.free)
        return result


def _turned(change: Vector, linear: Linear) -> Vector:
    """What half of the second derivative makes of a change."""
    return linear.backward(linear.forward(change))


Factor = tuple[np.ndarray, bool]


def _factors(
    loss: _Loss, k: int, weights: Vector, state: State, chunks: Sequence[np.ndarray]
) -> list[tuple[int, np.ndarray, Factor]]:
    """Groups of a layer that may change: their number, the columns that may, the factor of their Gram matrix.

    Args:
        loss: of the block.
        k: number of the layer.
        weights: of all layers.
        state: at these, of some of the samples.
        chunks: what the layer reads, unfolded.
    """
    count, columns = sum(rows.shape[1] for rows in chunks), chunks[0].shape[2]
    steps, factors = [_step(rows.shape[1], count // (_ROWS_PER_COLUMN * columns)) for rows in chunks], []
    for group, free in enumerate(loss.parts[k].free):
        active = np.flatnonzero(free.any(axis=1))
        if not len(active):  # a group of a grouped convolution that went as a whole
            continue
        gram = np.zeros((len(active), len(active)))
        for rows, step in zip(chunks, steps, strict=True):
            used = rows[group, ::step][:, active]
            gram += step * (used.T @ used)
        factors.append((group, active, _factor(_worth(loss, k, weights, state) * gram)))
    return factors


def _step(rows: int, wanted: int) -> int:
    """About so far apart that neither the same samples nor the same positions are met again and again."""
    step = max(wanted, 1)
    while math.gcd(step, max(rows, 1)) > 1:
        step += 1
    return step


def _worth(loss: _Loss, k: int, weights: Vector, state: State) -> float:
    """What a change of a layer's output means for the loss, on average."""
    block, inner = loss.net.block, len(loss.net.block.inner)
    if k >= inner:
        return loss.scales[k - inner]
    outer = zip(loss.scales, weights[inner:], strict=True)
    total = sum(s * float(np.square(w[:, :-1]).sum()) for s, w in outer)
    between = state.between
    share = between.read.size / between.joined.size  # of what is made that a pool takes
    return share * total / between.read.shape[block.axis] or 1.0


def _factor(gram: np.ndarray) -> Factor:
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
            factor: Factor = cho_factor(damped, lower=True, overwrite_a=True, check_finite=False)
            return factor
        except np.linalg.LinAlgError:
            damping *= 10.0
            if damping > 1.0:
                raise


def _total(parts: Sequence[Vector]) -> Vector:
    return functools.reduce(_sum, parts)


def _sum(a: Vector, b: Vector) -> Vector:
    return [x + y for x, y in zip(a, b, strict=True)]


def _dot(a: Vector, b: Vector) -> float:
    return sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))
