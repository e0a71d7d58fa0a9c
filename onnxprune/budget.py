"""Error curves + cost curves -> how many units every group keeps.

The cost of a layer depends on its input and its output width, so groups cannot be priced one by one. The Lagrangian
``sum of errors + price * cost`` is minimised group by group until nothing moves; the price is bisected until the budget
is met; what the discrete steps leave over is spent where it buys most.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxprune.costs import Cost, Several

ALLOCATIONS = ("auto", "uniform", "papers")  # ways to share out the cost, see `onnxprune.prune`
DEEPER = 1.5  # share kept in the last but one stage, relative to the earlier ones (He et al. 2017, section 4.1)
_SHARINGS = 6  # of a price among several limits
_SHARPNESS = 2.0  # with which price moves to the scarcest


def interpolate(
    units: int, levels: Sequence[int], measured: Sequence[float], errors: np.ndarray, *, steeply: bool = True
) -> np.ndarray:
    """An error for every number of kept units, from measurements at a few.

    Between two levels the measured damage grows as the group's own reconstruction error does, where that is known.

    Args:
        units: of the group.
        levels: kept counts that were measured.
        measured: damage at each.
        errors: (units + 1,) the group's own error curve; NaN where unknown.
        steeply: whether damage below all levels grows faster than that error, as it does; without, it is what it may
            be at best.

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
    falling[below] = damage[0] * np.maximum(growth[below], 1.0)
    if steeply:
        falling[below] *= 1.0 + (counts[0] - every[below]) / max(counts[0], 1)
    result: np.ndarray = np.maximum.accumulate(falling[::-1])[::-1]
    return result


def allocate(
    curves: Sequence[np.ndarray], cost: Cost, limit: float, choices: Sequence[np.ndarray] | None = None
) -> np.ndarray:
    """Kept counts with the least total error among those that cost at most ``limit``.

    Args:
        curves: per group, (units + 1,) the error for every kept count.
        cost: of kept counts.
        limit: of the cost, in its unit.
        choices: per group the kept counts to choose from, ascending; all of them from one on, unless given.

    Returns:
        (groups,) kept counts; those of least cost where even they cost more.
    """
    curves = [_finite(curve) for curve in curves]
    choices = choices or every_count([len(curve) - 1 for curve in curves])
    low, high = 0.0, 1.0
    best = np.array([c[0] for c in choices], dtype=np.int64)
    steepest = max((float(curve[c[0]]) for curve, c in zip(curves, choices, strict=True)), default=1.0)
    scale = max(steepest, 1e-12) / (limit if limit > 0 else 1.0)
    start = np.array([c[-1] for c in choices], dtype=np.int64)
    while high < 2.0**40:
        found = _descend(curves, cost, high * scale, choices, start)
        if cost.total(found) <= limit:
            best = found
            break
        best = found  # the least cost that any price reaches
        low, high = high, high * 4.0
    for _ in range(40):
        middle = (low + high) / 2.0
        found = _descend(curves, cost, middle * scale, choices, start)
        if cost.total(found) <= limit:
            high, best = middle, found
        else:
            low = middle
    return _fill(best, curves, cost, limit, choices)


def allocate_within(
    curves: Sequence[np.ndarray],
    costs: Sequence[Cost],
    limits: Sequence[float],
    choices: Sequence[np.ndarray] | None = None,
) -> np.ndarray:
    """`allocate` under several limits at once.

    The price is shared out among the costs, and moved from those that are met with room to spare to the scarcest; of
    all shares tried, the one with the least error counts.
    """
    if len(costs) == 1:
        return allocate(curves, costs[0], limits[0], choices)
    weights = np.ones(len(costs))
    best, least = np.empty(0, np.int64), (True, np.inf)
    for _ in range(_SHARINGS):
        several = Several(costs, limits, weights.tolist())
        kept = allocate(curves, several, 1.0, choices)
        shares = several.shares(kept)
        error = sum(float(_finite(curve)[k]) for curve, k in zip(curves, kept, strict=True))
        if not best.size or (bool(shares.max() > 1.0), error) < least:
            best, least = kept, (bool(shares.max() > 1.0), error)
        weights = weights * (shares / shares.max()) ** _SHARPNESS
    return best


def every_count(units: Sequence[int]) -> list[np.ndarray]:
    """All kept counts of every group, none of them empty."""
    return [np.arange(1, n + 1) for n in units]


def _finite(curve: np.ndarray) -> np.ndarray:
    """A curve whose infinities (the network gave no number there) are errors worse than any that was measured."""
    good = np.isfinite(curve)
    worst = float(curve[good].max(initial=0.0))
    result: np.ndarray = np.where(good, curve, 1e3 * (worst + 1.0))
    return result


def _descend(
    curves: Sequence[np.ndarray], cost: Cost, price: float, choices: Sequence[np.ndarray], start: np.ndarray
) -> np.ndarray:
    """Minimise error + price * cost one group at a time, until nothing moves."""
    kept = start.copy()
    for _ in range(20):
        before = kept.copy()
        for g, (curve, candidates) in enumerate(zip(curves, choices, strict=True)):
            total = curve[candidates] + price * cost.pressure(kept, g, candidates)
            # of equals the widest: what costs nothing is not cut
            kept[g] = candidates[len(total) - 1 - int(np.argmin(total[::-1]))]
        if (kept == before).all():
            break
    return kept


def _fill(
    kept: np.ndarray,
    curves: Sequence[np.ndarray],
    cost: Cost,
    limit: float,
    choices: Sequence[np.ndarray],
    steps: int | None = None,
) -> np.ndarray:
    """Give units back, the most useful per cost first, as long as they fit; at most ``steps`` choices per group."""
    kept = kept.copy()
    places = np.array([int(np.searchsorted(c, k)) for c, k in zip(choices, kept, strict=True)], dtype=np.int64)
    top = np.array([len(c) - 1 for c in choices], dtype=np.int64)
    top = top if steps is None else np.minimum(top, places + steps)
    while True:
        now, best, gain = cost.total(kept), -1, -1.0
        for g, curve in enumerate(curves):
            if places[g] < top[g]:
                wider = choices[g][places[g] + 1 : top[g] + 1]
                costs = cost.along(kept, g, wider)
                # as far as the next that costs more, for beyond a step the rest of it is free
                value = (curve[kept[g]] - curve[wider]) / np.maximum(costs - now, 1e-12 * max(abs(now), 1e-300))
                value[costs > limit] = -1.0
                k = len(value) - 1 - int(np.argmax(value[::-1]))
                if value[k] > gain and costs[k] <= limit:
                    best, gain, place = g, float(value[k]), int(places[g]) + 1 + k
        if best < 0:
            return kept
        places[best] = place
        kept[best] = choices[best][place]


def _snap(counts: np.ndarray, choices: Sequence[np.ndarray]) -> np.ndarray:
    """The largest choice at or below every count; the smallest where there is none."""
    places = [max(int(np.searchsorted(c, n, side="right")) - 1, 0) for c, n in zip(choices, counts, strict=True)]
    return np.array([c[k] for c, k in zip(choices, places, strict=True)], dtype=np.int64)


def uniform(
    units: Sequence[int],
    cost: Cost,
    limit: float,
    choices: Sequence[np.ndarray] | None = None,
    shares: Sequence[float] | None = None,
) -> np.ndarray:
    """The same share of every group, as large as the limit allows; or, with ``shares``, in these proportions."""
    choices = choices or every_count(units)
    sizes = np.asarray(units)
    weights = np.ones(len(sizes)) if shares is None else np.asarray(shares) / min(shares, default=1.0)

    def at(share: float) -> np.ndarray:
        return _snap(np.round(sizes * np.minimum(share * weights, 1.0)), choices)

    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2.0
        fits = cost.total(at(middle)) <= limit
        low, high = (middle, high) if fits else (low, middle)
    kept = at(low)
    # what rounding leaves over goes round, to each group once at a time, so that the shares stay as they are
    even = [np.linspace(w, 0.0, n + 1) for n, w in zip(units, weights, strict=True)]
    while True:
        more = _fill(kept, even, cost, limit, choices, 1)
        if (more == kept).all():
            return kept
        kept = more


def by_stage(
    units: Sequence[int],
    stages: Sequence[int],
    cost: Cost,
    limit: float,
    choices: Sequence[np.ndarray] | None = None,
) -> np.ndarray:
    """The rule of He et al. 2017 for VGG-16: of the last stage everything, of the one before 1.5 times the share of the
    others. Where the last stage cannot stay whole, its share is that of the one before; one stage alone is uniform.

    Args:
        units: of every group.
        stages: of every group, counted from the input.
        cost: of kept counts.
        limit: of the cost, in its unit.
        choices: per group the kept counts to choose from, ascending; all of them from one on, unless given.
    """
    choices = choices or every_count(units)
    order = sorted(set(stages))
    deep = set(order[-2:]) if len(order) > 1 else set()
    shares = [DEEPER if stage in deep else 1.0 for stage in stages]
    if len(order) > 1:
        whole = [c[-1:] if stage == order[-1] else c for c, stage in zip(choices, stages, strict=True)]
        kept = uniform(units, cost, limit, whole, shares)
        if cost.total(kept) <= limit:
            return kept
    return uniform(units, cost, limit, choices, shares)


def global_threshold(
    scores: Sequence[np.ndarray], cost: Cost, limit: float, choices: Sequence[np.ndarray] | None = None
) -> np.ndarray:
    """One threshold on the scores of all groups together (Liu et al. 2017), as low as the limit allows."""
    choices = choices or every_count([len(s) for s in scores])
    values = np.unique(np.concatenate(list(scores)))
    low, high = 0, len(values)

    def counts(step: int) -> np.ndarray:
        bar = values[step] if step < len(values) else np.inf
        return _snap(np.array([int((s >= bar).sum()) for s in scores]), choices)

    while low < high:
        middle = (low + high) // 2
        if cost.total(counts(middle)) <= limit:
            high = middle
        else:
            low = middle + 1
    return counts(low)
