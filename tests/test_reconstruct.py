"""Reconstruction against explicit least squares on samples, and on samples that it has not seen."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxprune.parallel import workers
from onnxprune.reconstruct import RIDGES, Saturation, fit, refine, solve
from onnxprune.statistics import Statistics, Sums

COLUMNS, OUTPUTS = 8, 3  # the last column is the bias


def rows(count: int, rng: np.random.Generator, columns: int = COLUMNS) -> np.ndarray:
    x = rng.standard_normal((count, columns))
    x[:, :-1] += rng.uniform(-1, 1, columns - 1)
    x[:, -1] = 1.0
    return x


def summed(x: np.ndarray, y: np.ndarray) -> Statistics:
    sums = Sums(x.shape[1], y.shape[1])
    sums.add(x, y)
    return sums.statistics


def halves(x: np.ndarray, y: np.ndarray) -> list[Statistics]:
    return [summed(x[k::2], y[k::2]) for k in range(2)]


def sliced(weights: np.ndarray, kept: np.ndarray) -> np.ndarray:
    found = np.zeros_like(weights)
    found[kept] = weights[kept]
    return found


def residual(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    return float(np.square(y - x @ weights).sum())


@given(st.integers(0, 10_000), st.sampled_from([1e-6, 1e-3, 1.0]))
@settings(max_examples=25, deadline=None)
def test_solve_minimises_the_objective_that_it_states(seed: int, ridge: float) -> None:
    """|Y - X_S W|^2 + r |W - V_S|^2, r relative to the mean diagonal; the bias all but free."""
    rng = np.random.default_rng(seed)
    x, prior = rows(40, rng), rng.standard_normal((COLUMNS, OUTPUTS))
    y = rng.standard_normal((40, OUTPUTS))
    kept = np.sort(np.append(rng.choice(COLUMNS - 1, 4, replace=False), COLUMNS - 1))
    diagonal = np.square(x[:, kept]).sum(axis=0)
    penalty = np.full(len(kept), ridge * diagonal.mean())
    penalty[-1] = 1e-9 * diagonal[-1]
    root = np.diag(np.sqrt(penalty))
    explicit = np.linalg.lstsq(np.concatenate([x[:, kept], root]), np.concatenate([y, root @ prior[kept]]), rcond=None)[
        0
    ]
    found = solve(summed(x, y), kept, prior, ridge)
    np.testing.assert_allclose(found[kept], explicit, rtol=1e-9, atol=1e-9)
    assert (np.delete(found, kept, axis=0) == 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_a_combination_of_kept_channels_is_made_up_for(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, weights = rows(200, rng), rng.standard_normal((COLUMNS, OUTPUTS))
    mix = rng.standard_normal(COLUMNS)
    mix[[2, 5]] = 0
    x[:, 2] = x @ mix  # bias among what it is made of
    y = x @ weights
    kept = np.array([0, 1, 3, 4, 5, 6, 7])
    found = fit(halves(x, y), kept, weights)
    assert found.ridge == min(RIDGES)
    assert found.error < 1e-10
    np.testing.assert_allclose(found.weights[kept], (weights + np.outer(mix, weights[2]))[kept], atol=1e-4)
    assert residual(x, y, sliced(weights, kept)) > 1e-2 * np.square(y).sum()  # it was worth it


@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_never_worse_than_leaving_the_weights_alone(seed: int, count: int, left: int) -> None:
    rng = np.random.default_rng(seed)
    x, weights = rows(count, rng), rng.standard_normal((COLUMNS, OUTPUTS))
    y = x @ weights + rng.uniform(0, 2) * rng.standard_normal((count, OUTPUTS))
    kept = np.sort(np.append(rng.choice(COLUMNS - 1, left, replace=False), COLUMNS - 1))
    found = fit(halves(x, y), kept, weights)
    energy = np.square(y).sum()
    assert residual(x, y, found.weights) <= residual(x, y, sliced(weights, kept)) + 1e-9 * energy
    assert found.error == pytest.approx(residual(x, y, found.weights) / energy, rel=1e-6, abs=1e-9)
    assert (np.delete(found.weights, kept, axis=0) == 0).all()


def test_nothing_is_removed_and_nothing_changes() -> None:
    rng = np.random.default_rng(0)
    x, weights = rows(100, rng), rng.standard_normal((COLUMNS, OUTPUTS))
    found = fit(halves(x, x @ weights), np.arange(COLUMNS), weights)
    np.testing.assert_allclose(found.weights, weights, rtol=0, atol=1e-12)


def test_few_noisy_rows_are_trusted_less_than_unregularised() -> None:
    """Twelve rows for eleven weights: the ridge that the other half likes does better on new rows, on every draw."""
    better = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        weights = rng.standard_normal((12, OUTPUTS))
        x, new = rows(24, rng, 12), rows(2000, rng, 12)
        y = x @ weights + 3.0 * rng.standard_normal((24, OUTPUTS))
        kept = np.delete(np.arange(12), 3)
        found = fit(halves(x, y), kept, weights)
        plain = sliced(np.zeros_like(weights), kept)
        plain[kept] = np.linalg.lstsq(x[:, kept], y, rcond=None)[0]
        assert found.ridge > min(RIDGES)
        better.append(residual(new, new @ weights, found.weights) / residual(new, new @ weights, plain))
    assert max(better) < 1
    assert np.median(better) < 0.7


def test_weights_that_held_out_rows_find_no_fault_with_stay_as_they_are() -> None:
    """What a fit gains on its own rows it loses on others."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((40, OUTPUTS))
    x = rows(30, rng, 40)
    y = x @ weights + 0.1 * rng.standard_normal((30, OUTPUTS))
    found = fit(halves(x, y), np.arange(40), weights)
    assert found.ridge == np.inf
    np.testing.assert_array_equal(found.weights, weights)
    with workers(1) as spread:
        assert refine(found, [], 1.0, np.arange(40), weights, spread) is found


def test_errors_below_those_of_the_sums_are_none() -> None:
    """Outputs that hardly vary about a large mean: sums of float32 cannot say how far from it they are."""
    rng = np.random.default_rng(0)
    x = (100.0 + 0.01 * rows(30, rng, 40)).astype(np.float32)
    x[:, -1] = 1.0
    weights = rng.uniform(0.5, 1.5, (40, OUTPUTS))
    y = (x @ weights).astype(np.float32)
    found = fit(halves(x, y), np.arange(40), weights)
    np.testing.assert_array_equal(found.weights, weights)


def test_many_clean_rows_are_trusted() -> None:
    rng = np.random.default_rng(1)
    x, weights = rows(4000, rng), rng.standard_normal((COLUMNS, OUTPUTS))
    y = x @ rng.standard_normal((COLUMNS, OUTPUTS))  # far from the weights as they are
    assert fit(halves(x, y), np.arange(COLUMNS), weights).ridge == min(RIDGES)


def singular(kind: str, rng: np.random.Generator) -> np.ndarray:
    x = rows(50, rng)
    if kind == "dead channel":
        x[:, 1] = 0
    elif kind == "equal channels":
        x[:, 2] = x[:, 1]
    elif kind == "channel as constant as the bias":
        x[:, 3] = 4.0
    elif kind == "one row":
        x = x[:1]
    elif kind == "all dead":
        x[:, :-1] = 0
    elif kind == "huge and tiny":
        x[:, 0] *= 1e6
        x[:, 1] *= 1e-6
    return x


@pytest.mark.parametrize(
    "kind",
    ["dead channel", "equal channels", "channel as constant as the bias", "one row", "all dead", "huge and tiny"],
)
def test_a_singular_gram_matrix_does_no_harm(kind: str) -> None:
    rng = np.random.default_rng(2)
    x, weights = singular(kind, rng), rng.standard_normal((COLUMNS, OUTPUTS))
    y = x @ weights
    kept = np.delete(np.arange(COLUMNS), 4)
    found = fit(halves(x, y), kept, weights)
    assert np.isfinite(found.weights).all()
    assert np.abs(found.weights).max() < 10 * np.abs(weights).max()
    assert residual(x, y, found.weights) <= residual(x, y, sliced(weights, kept)) * (1 + 1e-9) + 1e-9


def test_a_dead_channel_keeps_its_weights() -> None:
    rng = np.random.default_rng(3)
    x, weights = singular("dead channel", rng), rng.standard_normal((COLUMNS, OUTPUTS))
    found = solve(summed(x, x @ weights), np.arange(COLUMNS), weights, 1e-3)
    np.testing.assert_allclose(found[1], weights[1], rtol=1e-9)


@pytest.mark.parametrize("empty", [0, 1])
def test_where_a_half_is_empty_the_strongest_ridge_is_taken(empty: int) -> None:
    rng = np.random.default_rng(4)
    x, weights = rows(30, rng), rng.standard_normal((COLUMNS, OUTPUTS))
    folds = [summed(x, x @ weights), Sums(COLUMNS, OUTPUTS).statistics]
    found = fit(folds[::-1] if empty == 0 else folds, np.arange(COLUMNS), weights)
    assert found.ridge == max(RIDGES)
    np.testing.assert_allclose(found.weights, weights, atol=1e-9)


def test_without_any_rows_the_weights_are_sliced() -> None:
    weights = np.random.default_rng(5).standard_normal((COLUMNS, OUTPUTS))
    kept = np.array([0, 2, 7])
    found = fit([Sums(COLUMNS, OUTPUTS).statistics] * 2, kept, weights)
    np.testing.assert_array_equal(found.weights, sliced(weights, kept))


def test_a_layer_without_a_bias_gets_none() -> None:
    rng = np.random.default_rng(6)
    x, weights = rows(60, rng), rng.standard_normal((COLUMNS, OUTPUTS))
    weights[-1] = 0
    kept = np.arange(COLUMNS - 1)[1:]
    found = fit(halves(x, x @ weights + 5.0), kept, weights)
    assert (found.weights[[0, -1]] == 0).all()


@given(
    st.integers(0, 10_000),
    st.sampled_from([(0.0, np.inf), (0.0, 0.7), (-1.0, 0.5)]),
    st.sampled_from([0.0, 1.0, -2.0]),
)
@settings(max_examples=60, deadline=None)
def test_what_is_as_good_behind_a_limiter_comes_out_of_it_alike(
    seed: int, limits: tuple[float, float], sign: float
) -> None:
    rng = np.random.default_rng(seed)
    scale = np.concatenate([np.abs(rng.standard_normal(OUTPUTS - 1)) + 0.1, [sign]])
    wanted, offset, now = rng.standard_normal((3, 50, OUTPUTS))

    def behind(z: np.ndarray) -> np.ndarray:
        return np.clip(scale * z + offset, *limits)

    least, most = Saturation(scale, *limits).interval(wanted, offset)
    good = np.clip(now, least, most)
    np.testing.assert_allclose(behind(good), behind(wanted), atol=1e-12)
    # and nothing is nearer to what there is now than that
    same = np.isclose(behind(now), behind(wanted), rtol=0.0, atol=1e-12) & (scale != 0)
    np.testing.assert_allclose(good[same], now[same], atol=1e-9)
    cut_off = (behind(wanted) == limits[0]) | (behind(wanted) == limits[1])
    assert (least[~cut_off] == wanted[~cut_off]).all()
    assert (most[~cut_off] == wanted[~cut_off]).all()
    assert (least <= wanted + 1e-12).all()
    assert (wanted <= most + 1e-12).all()


def test_a_layer_is_refined_for_what_comes_out_of_the_limiter() -> None:
    """Where the original is cut off its output says nothing, which least squares do not know."""
    rng = np.random.default_rng(0)
    x, prior = rows(400, rng), rng.standard_normal((COLUMNS, OUTPUTS))
    wanted, kept = x @ prior, np.array([0, 2, 3, 5, 7])
    least, most = Saturation(np.ones(OUTPUTS), 0.0, np.inf).interval(wanted, np.zeros_like(wanted))
    start = fit(halves(x, wanted), kept, prior)
    sides = [[(x[k::2, kept], least[k::2], most[k::2])] for k in range(2)]

    def error(weights: np.ndarray) -> float:
        return float(np.square(x @ weights - np.clip(x @ weights, least, most)).sum())

    energy = float(np.square(wanted).sum())
    with workers(1) as spread:
        found = refine(start, sides, energy, kept, prior, spread)
    assert error(found.weights) == pytest.approx(found.error * energy)
    assert error(found.weights) < 0.8 * error(start.weights)
    assert (np.delete(found.weights, kept, axis=0) == 0).all()
    # what is known of the rows need not be found again
    with workers(1) as spread:
        known = refine(start, sides, energy, kept, prior, spread, x[:, kept].T @ x[:, kept])
    np.testing.assert_allclose(known.weights, found.weights, rtol=1e-9, atol=1e-12)
    # it helps on either side what is refined on the other
    alone = [fit([half], kept, prior, [start.ridge]) for half in halves(x, wanted)]
    with workers(1) as spread:
        judged = refine(start, sides, energy, kept, prior, spread, halves=alone)
    np.testing.assert_array_equal(judged.weights, found.weights)


def test_few_rows_are_not_refined_where_that_helps_no_others() -> None:
    rng = np.random.default_rng(2)
    prior, kept = rng.standard_normal((40, OUTPUTS)), np.arange(1, 40)
    x, new = rows(80, rng, 40), rows(2000, rng, 40)
    y = x @ prior + rng.standard_normal((len(x), OUTPUTS))
    limiter = Saturation(np.ones(OUTPUTS), 0.0, np.inf)
    least, most = limiter.interval(y, np.zeros_like(y))
    start = fit([summed(x, y)], kept, prior, [1.0])
    sides = [[(x[k::2, kept], least[k::2], most[k::2])] for k in range(2)]
    alone = [fit([half], kept, prior, [start.ridge]) for half in halves(x, y)]
    with workers(1) as spread:
        found, judged = (refine(start, sides, 1.0, kept, prior, spread, halves=given) for given in ((), alone))
    least, most = limiter.interval(new @ prior, np.zeros((len(new), OUTPUTS)))

    def error(weights: np.ndarray) -> float:
        return float(np.square(new @ weights - np.clip(new @ weights, least, most)).sum())

    assert judged is start
    assert error(found.weights) > 1.1 * error(start.weights)


def test_solve_takes_more_ridge_where_rounding_leaves_no_positive_matrix() -> None:
    rng = np.random.default_rng(0)
    x, weights = rng.standard_normal((6, COLUMNS)), rng.standard_normal((COLUMNS, 2))
    statistics = summed(x, x @ weights)
    statistics.gram[np.diag_indices(COLUMNS)] -= 1e-3 * np.diag(statistics.gram).mean()
    found = solve(statistics, np.arange(COLUMNS), weights, 1e-4)
    assert np.isfinite(found).all()
    statistics.gram[:] = -np.eye(COLUMNS)
    assert (solve(statistics, np.arange(COLUMNS), weights, 1e-4) == weights).all()
