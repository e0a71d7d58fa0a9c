"""Error curves + cost curves -> how many units every group keeps.

The cost of a layer depends on its input and its output width, so groups cannot be priced one by one. The Lagrangian
``sum of errors + price * cost`` is minimised group by group until nothing moves; the price is bisected until the budget
is met; what the discrete steps leave over is spent where it buys most.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxprune.analysis import CostModel


def interpolate(units: int, levels: Sequence[int], measured: Sequence[float], errors: np.ndarray) -> np.ndarray:
    """An error for every number of kept units, from measurements at a few.

    Between two levels the measured damage grows as the group's own reconstruction error does, where that is known.

    Args:
        units: of the group.
        levels: kept counts that were measured.
        measured: damage at each.
        errors: (units + 1,) the group's own error curve; NaN where unknown.

    Returns:
        (units + 1,) damage, not increasing in the kept count, zero where everything is kept.
    """
    order = np.argsort(levels)
    counts = np.array([*np.asarray(levels)[order], units])
    damage = np.array([*np.maximum(np.asarray(measured, dtype=np.float64)[order], 0.0), 0.0])
    every = np.arange(units + 1)
    known = not np.isnan(errors).any()
    base = np.maximum.accumulate((errors - errors[units])[::-1])[::-1] if known else (units - every).astype(float)
    at = base[counts]
    # interpolation runs over the error, which falls with the kept count
    falling = np.interp(base, at[::-1] + np.arange(len(at)) * 1e-12, damage[::-1])
    below = every < counts[0]  # beyond the last measurement: in proportion to the error, or steeply
    growth = base / max(at[0], 1e-12) if known and at[0] > 0 else (units - every) / max(units - counts[0], 1)
    falling[below] = damage[0] * np.maximum(growth[below], 1.0) * (1.0 + (counts[0] - every[below]) / max(counts[0], 1))
    result: np.ndarray = np.maximum.accumulate(falling[::-1])[::-1]
    return result


def allocate(curves: Sequence[np.ndarray], cost: CostModel, limit: float, floors: Sequence[int]) -> np.ndarray:
    """Kept counts with the least total error among those that cost at most ``limit``.

    Args:
        curves: per group, (units + 1,) the error for every kept count.
        cost: multiply-accumulates of kept counts.
        limit: of the cost.
        floors: the fewest units that every group may keep.

    Returns:
        (groups,) kept counts; the floors where even they cost more.
    """
    curves = [_finite(curve) for curve in curves]
    low, high = 0.0, 1.0
    best = np.asarray(floors, dtype=np.int64).copy()
    scale = max(max((float(c[f]) for c, f in zip(curves, floors, strict=True)), default=1.0), 1e-12) / max(limit, 1.0)
    start = np.array([len(c) - 1 for c in curves], dtype=np.int64)
    while high < 2.0**40:
        found = _descend(curves, cost, high * scale, floors, start)
        if cost.macs(found) <= limit:
            best = found
            break
        low, high = high, high * 4.0
    for _ in range(40):
        middle = (low + high) / 2.0
        found = _descend(curves, cost, middle * scale, floors, start)
        if cost.macs(found) <= limit:
            high, best = middle, found
        else:
            low = middle
    return _fill(best, curves, cost, limit)


def _finite(curve: np.ndarray) -> np.ndarray:
    """A curve whose infinities (the network gave no number there) are errors worse than any that was measured."""
    good = np.isfinite(curve)
    worst = float(curve[good].max(initial=0.0))
    result: np.ndarray = np.where(good, curve, 1e3 * (worst + 1.0))
    return result


def _descend(
    curves: Sequence[np.ndarray], cost: CostModel, price: float, floors: Sequence[int], start: np.ndarray
) -> np.ndarray:
    """Minimise error + price * cost one group at a time, until nothing moves."""
    kept = start.copy()
    for _ in range(20):
        before = kept.copy()
        for g, curve in enumerate(curves):
            candidates = np.arange(floors[g], len(curve))
            total = curve[candidates] + price * cost.along(kept, g, candidates)
            # of equals the widest: what costs nothing is not cut
            kept[g] = candidates[len(total) - 1 - int(np.argmin(total[::-1]))]
        if (kept == before).all():
            break
    return kept


def _fill(
    kept: np.ndarray, curves: Sequence[np.ndarray], cost: CostModel, limit: float, most: np.ndarray | None = None
) -> np.ndarray:
    """Give units back, the most useful per cost first, as long as they fit and no group gets more than ``most``."""
    kept = kept.copy()
    top = np.array([len(curve) - 1 for curve in curves]) if most is None else most
    while True:
        now, best, gain = cost.macs(kept), -1, -1.0
        for g, curve in enumerate(curves):
            if kept[g] < min(top[g], len(curve) - 1):
                price = float(cost.along(kept, g, np.array([kept[g] + 1]))[0]) - now
                if now + price <= limit:
                    value = float(curve[kept[g]] - curve[kept[g] + 1]) / max(price, 1e-9)
                    if value > gain:
                        best, gain = g, value
        if best < 0:
            return kept
        kept[best] += 1


def uniform(units: Sequence[int], cost: CostModel, limit: float, floors: Sequence[int]) -> np.ndarray:
    """The same share of every group, as large as the limit allows."""
    sizes, least = np.asarray(units), np.asarray(floors)
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2.0
        fits = cost.macs(np.maximum(np.round(sizes * middle), least)) <= limit
        low, high = (middle, high) if fits else (low, middle)
    kept: np.ndarray = np.maximum(np.round(sizes * low), least).astype(np.int64)
    # what rounding leaves over goes round, to each group once at a time, so that the shares stay alike
    even = [np.linspace(1.0, 0.0, n + 1) for n in units]
    while True:
        more = _fill(kept, even, cost, limit, kept + 1)
        if (more == kept).all():
            return kept
        kept = more


def global_threshold(scores: Sequence[np.ndarray], cost: CostModel, limit: float, floors: Sequence[int]) -> np.ndarray:
    """One threshold on the scores of all groups together (Liu et al. 2017), as low as the limit allows."""
    values = np.unique(np.concatenate(list(scores)))
    low, high = 0, len(values)

    def counts(step: int) -> np.ndarray:
        bar = values[step] if step < len(values) else np.inf
        return np.array([max(int((s >= bar).sum()), f) for s, f in zip(scores, floors, strict=True)])

    while low < high:
        middle = (low + high) // 2
        if cost.macs(counts(middle)) <= limit:
            high = middle
        else:
            low = middle + 1
    return counts(low)
