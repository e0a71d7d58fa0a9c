"""Costs as they are counted on rewritten models, and allocations against brute force."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import numpy as np
import onnx
import pytest
from builder import RUNTIME, Builder, analysed
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxprune.analysis import Analysis, analyse
from onnxprune.budget import DEEPER, allocate, by_stage, global_threshold, interpolate, uniform
from onnxprune.costs import CostModel
from onnxprune.counting import count_model_macs, nominal_shapes
from onnxprune.graph import Graph
from onnxprune.normalise import normalise
from onnxprune.pipeline import stages
from onnxprune.plan import Plan
from onnxprune.probe import probe
from onnxprune.rewrite import rewrite


def vgg(batch: int | str = 1) -> onnx.ModelProto:
    g = Builder()
    x = g.input("x", [batch, 3, 12, 12])
    x = g.Relu(g.conv(g.Relu(g.conv(x, 5)), 6))
    x = g.MaxPool(x, kernel_shape=[2, 2], strides=[2, 2])
    x = g.Relu(g.batch_norm(g.conv(x, 7, bias=False)))
    x = g.Flatten(g.MaxPool(x, kernel_shape=[2, 2], strides=[2, 2]))
    x = g.Relu(g.node("Gemm", x, g.weight(9, 63), g.weight(9), transB=1))
    return g.model(g.gemm(x, 4))


def residual() -> onnx.ModelProto:
    g = Builder()
    x = g.input("x", [1, 3, 8, 8])
    x = g.Relu(g.conv(x, 6))
    for width in (4, 5):
        x = g.Relu(g.Add(x, g.batch_norm(g.conv(g.Relu(g.batch_norm(g.conv(x, width))), 6))))
    y = g.conv(g.Relu(g.conv(x, 8, strides=[2, 2])), 8)
    x = g.Relu(g.Add(y, g.conv(x, 8, k=1, strides=[2, 2], pads=[0] * 4)))
    return g.model(g.gemm(g.Flatten(g.GlobalAveragePool(x)), 4))


def mobile() -> onnx.ModelProto:
    g = Builder()
    x = g.Relu(g.conv(g.input("x", [1, 3, 8, 8]), 6))
    x = g.Relu(g.conv(g.conv(g.Relu(g.conv(x, 8, k=1)), 8, group=8), 5, k=1))
    x = g.Concat(g.conv(x, 3), g.ConvTranspose(x, g.weight(5, 4, 1, 1)), axis=1)
    return g.model(g.conv(x, 2))


def dense() -> onnx.ModelProto:
    """Axes of which a part stays: the input's channels among those that are made."""
    g = Builder()
    x = g.input("x", [1, 3, 8, 8])
    for width in (4, 5):
        x = g.Concat(x, g.Relu(g.conv(x, width)), axis=1)
    return g.model(g.gemm(g.Flatten(g.MaxPool(g.conv(x, 6), kernel_shape=[4, 4], strides=[4, 4])), 4))


def transformer() -> onnx.ModelProto:
    g = Builder()
    x = g.input("x", [1, 6, 8])
    return g.model(g.Add(x, g.linear(g.Relu(g.linear(x, 12)), 8)))


MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "vgg": vgg,
    "residual": residual,
    "mobile": mobile,
    "dense": dense,
    "transformer": transformer,
}


@functools.cache
def prepared(name: str) -> tuple[Analysis, dict[str, str]]:
    return analysed(MODELS[name]())


def units_of(analysis: Analysis) -> np.ndarray:
    return np.array([g.units for g in analysis.groups])


def plan_of(analysis: Analysis, counts: np.ndarray, seed: int = 0) -> Plan:
    rng = np.random.default_rng(seed)
    kept = {g.name: rng.permutation(g.units)[:n] for g, n in zip(analysis.groups, counts, strict=True)}
    return Plan("", {name: tuple(sorted(units.tolist())) for name, units in kept.items()})


# ------------------------------------------------------------------------------------------------------ cost model


@pytest.mark.parametrize("name", MODELS)
def test_the_original_costs_what_is_counted_on_it(name: str) -> None:
    analysis = prepared(name)[0]
    assert CostModel(analysis).total(units_of(analysis)) == count_model_macs(MODELS[name]()) == analysis.macs


def test_a_dynamic_batch_is_counted_as_one_sample() -> None:
    model = vgg("n")
    plain, _ = normalise(Graph(model), RUNTIME)
    graph = Graph(plain)
    analysis = analyse(graph, probe(graph, RUNTIME), nominal_shapes(graph, RUNTIME, None))
    counts = units_of(analysis) // 2
    assert CostModel(analysis).total(units_of(analysis)) == count_model_macs(vgg(1))
    assert CostModel(analysis).total(counts) == count_model_macs(rewrite(analysis, plan_of(analysis, counts)))


def test_a_known_cost() -> None:
    g = Builder()
    x = g.conv(g.input("x", [1, 3, 8, 8]), 4)
    analysis = analysed(g.model(g.conv(x, 5, k=1)))[0]
    cost = CostModel(analysis)
    assert cost.total(np.array([4])) == 64 * (4 * 3 * 9 + 5 * 4)
    assert cost.per_term(np.array([1])).tolist() == [64 * 3 * 9, 64 * 5]


# ------------------------------------------------------------------------------------------------------ allocation


@functools.cache
def branches(kernels: tuple[int, ...]) -> CostModel:
    """Parallel branches of 3 to 5 units into one sum: every unit of a branch costs the same, whatever the others do."""
    g = Builder()
    x = g.input("x", [1, 2, 4, 4])
    ends = [g.conv(g.Relu(g.conv(x, 3 + i, k=k)), 2, k=k) for i, k in enumerate(kernels)]
    analysis = analysed(g.model(functools.reduce(lambda a, b: g.Add(a, b), ends)))[0]
    assert units_of(analysis).tolist() == [3 + i for i in range(len(kernels))]
    return CostModel(analysis)


def convex(units: int, rng: np.random.Generator) -> np.ndarray:
    """An error curve that falls to zero, ever more slowly."""
    steps = np.sort(rng.uniform(0.1, 1.0, units))
    return np.concatenate([np.cumsum(steps)[::-1], [0.0]])


def at_least(floors: Sequence[int], units: Sequence[int]) -> list[np.ndarray]:
    """Kept counts to choose from: from the floor on."""
    return [np.arange(f, n + 1) for f, n in zip(floors, units, strict=True)]


def error(curves: list[np.ndarray], kept: np.ndarray) -> float:
    return float(sum(c[k] for c, k in zip(curves, kept, strict=True)))


def least_error(curves: list[np.ndarray], cost: CostModel, limit: float, floors: list[int]) -> float:
    ranges = [range(f, len(c)) for c, f in zip(curves, floors, strict=True)]
    return min(error(curves, np.array(k)) for k in itertools.product(*ranges) if cost.total(np.array(k)) <= limit)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_allocation_is_brute_force_where_all_units_cost_the_same(seed: int, share: float) -> None:
    cost, rng = branches((3, 3, 3)), np.random.default_rng(seed)
    curves = [convex(n, rng) * rng.uniform(0.2, 5) for n in (3, 4, 5)]
    floors = [1, 2, 1]
    limit = cost.total(np.array([3, 4, 5])) * share
    kept = allocate(curves, cost, max(limit, cost.total(np.array(floors))), at_least(floors, (3, 4, 5)))
    assert error(curves, kept) == pytest.approx(least_error(curves, cost, max(limit, cost.total(floors)), floors))


@given(st.integers(0, 10_000), st.floats(0.35, 1.0))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_allocation_wastes_less_than_a_unit(seed: int, share: float) -> None:
    """With units of unlike cost (a knapsack) the error is below the least one of a budget without the dearest unit."""
    cost, rng = branches((1, 3, 5)), np.random.default_rng(seed)
    curves = [convex(n, rng) * rng.uniform(0.2, 5) for n in (3, 4, 5)]
    dearest = cost.total(np.array([1, 1, 2])) - cost.total(np.array([1, 1, 1]))
    limit = cost.total(np.array([3, 4, 5])) * share
    if limit - dearest >= cost.total(np.ones(3)):
        kept = allocate(curves, cost, limit)
        assert error(curves, kept) <= least_error(curves, cost, limit - dearest, [1, 1, 1]) + 1e-9


Allocator = Callable[[Analysis, CostModel, float, list[int]], np.ndarray]


def by_curves(analysis: Analysis, cost: CostModel, limit: float, floors: list[int]) -> np.ndarray:
    rng = np.random.default_rng(3)
    curves = [convex(g.units, rng) for g in analysis.groups]
    return allocate(curves, cost, limit, at_least(floors, units_of(analysis)))


def by_share(analysis: Analysis, cost: CostModel, limit: float, floors: list[int]) -> np.ndarray:
    units = units_of(analysis)
    return uniform(units.tolist(), cost, limit, at_least(floors, units))


def by_threshold(analysis: Analysis, cost: CostModel, limit: float, floors: list[int]) -> np.ndarray:
    rng = np.random.default_rng(3)
    scores = [rng.uniform(0, 1, g.units) for g in analysis.groups]
    return global_threshold(scores, cost, limit, at_least(floors, units_of(analysis)))


ALLOCATORS: dict[str, Allocator] = {"curves": by_curves, "share": by_share, "threshold": by_threshold}


@pytest.mark.parametrize("floor", [1, 2])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("by", ALLOCATORS)
def test_allocations_keep_to_the_limit_and_the_floors(by: str, name: str, share: float, floor: int) -> None:
    analysis = prepared(name)[0]
    cost, units = CostModel(analysis), units_of(analysis)
    floors = [floor] * len(units)
    limit = max(analysis.macs * share, cost.total(np.array(floors)))
    kept = ALLOCATORS[by](analysis, cost, limit, floors)
    assert (kept >= floor).all()
    assert (kept <= units).all()
    assert cost.total(kept) <= limit
    if share == 1.0:
        assert kept.tolist() == units.tolist()
    if by != "threshold":  # nothing more fits in
        more = [cost.total(kept + np.eye(len(units), dtype=int)[g]) for g in np.flatnonzero(kept < units)]
        assert all(macs > limit for macs in more)


@pytest.mark.parametrize("by", ALLOCATORS)
def test_the_floors_are_kept_where_even_they_cost_too_much(by: str) -> None:
    analysis = prepared("residual")[0]
    floors = [2] * len(analysis.groups)
    assert ALLOCATORS[by](analysis, CostModel(analysis), 1.0, floors).tolist() == floors


def hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Corners of the lower convex hull, while it falls."""
    corners: list[tuple[float, float]] = []
    for cost, value in sorted(set(points)):
        if corners and (cost == corners[-1][0] or value >= corners[-1][1]):
            continue
        while len(corners) > 1:
            (c0, v0), (c1, v1) = corners[-2:]
            if (value - v0) * (c1 - c0) > (v1 - v0) * (cost - c0) + 1e-9:
                break
            corners.pop()
        corners.append((cost, value))
    return corners


@pytest.mark.parametrize("kernels", [(3, 3, 3), (1, 3, 5)])
@pytest.mark.parametrize("seed", range(4))
def test_what_any_price_can_reach_is_found(seed: int, kernels: tuple[int, ...]) -> None:
    """Curves that are not convex: at the corners of the hull of all (cost, error) the Lagrangian is exact."""
    cost, rng = branches(kernels), np.random.default_rng(seed)
    curves = [np.sort(rng.uniform(0, 1, n + 1) ** 2)[::-1] * rng.uniform(0.2, 5) for n in (3, 4, 5)]
    every = [np.array(k) for k in itertools.product(range(1, 4), range(1, 5), range(1, 6))]
    corners = hull([(cost.total(k), error(curves, k)) for k in every])
    assert len(corners) > 3
    for limit, least in corners:
        assert error(curves, allocate(curves, cost, limit)) == pytest.approx(least, rel=1e-9)


def test_units_that_cost_no_error_are_kept_where_they_fit() -> None:
    cost = branches((3, 3, 3))
    curves = [np.array([9.0, 0, 0, 0]), np.array([9.0, 0, 0, 0, 0]), np.array([9.0, 5, 4, 3, 2, 0])]
    assert allocate(curves, cost, cost.total(np.array([3, 4, 5]))).tolist() == [3, 4, 5]
    assert allocate(curves, cost, cost.total(np.array([1, 1, 5]))).tolist() == [1, 1, 5]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_uniform_keeps_of_every_group_at_least_the_largest_share_that_fits(name: str, share: float) -> None:
    analysis = prepared(name)[0]
    cost, units = CostModel(analysis), units_of(analysis)
    kept = uniform(units.tolist(), cost, analysis.macs * share)
    shares = [np.maximum(np.round(units * s), 1) for s in np.linspace(0, 1, 2001)]
    fitting = [counts for counts in shares if cost.total(counts) <= analysis.macs * share]
    assert (kept >= fitting[-1]).all()


@given(st.integers(0, 10_000), st.floats(0.2, 1.0))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_global_threshold_is_one_and_the_lowest(seed: int, share: float) -> None:
    analysis, rng = prepared("residual")[0], np.random.default_rng(seed)
    cost = CostModel(analysis)
    scores = [rng.integers(0, 12, g.units) / 10 for g in analysis.groups]  # with ties
    limit = analysis.macs * share
    kept = global_threshold(scores, cost, limit)

    def above(bar: float) -> np.ndarray:
        return np.array([max(int((s >= bar).sum()), 1) for s in scores])

    bars = [*np.unique(np.concatenate(scores)), np.inf]
    fitting = [bar for bar in bars if cost.total(above(bar)) <= limit]
    assert kept.tolist() == (above(min(fitting)) if fitting else above(np.inf)).tolist()


# --------------------------------------------------------------------------------------------------- interpolation

UNKNOWN = np.full(21, np.nan)
FALLING = np.concatenate([np.geomspace(10, 1e-3, 20), [0.0]])


@pytest.mark.parametrize("errors", [UNKNOWN, FALLING, FALLING + 3.0], ids=["unknown", "falling", "never zero"])
@pytest.mark.parametrize(
    ("levels", "measured"),
    [
        ([2, 5, 8, 12, 17], [4.0, 1.5, 0.7, 0.2, 0.01]),
        ([17, 2, 8], [0.01, 4.0, 0.7]),  # in any order
        ([10], [1.0]),
        ([1, 19], [3.0, 0.0]),
    ],
)
def test_interpolation_hits_the_measurements_and_falls(
    levels: list[int], measured: list[float], errors: np.ndarray
) -> None:
    found = interpolate(20, levels, measured, errors)
    assert found.shape == (21,)
    np.testing.assert_allclose(found[levels], measured, rtol=1e-6, atol=1e-9)
    assert found[20] == 0
    assert (np.diff(found) <= 0).all()
    assert found[0] > max(measured)  # emptier than measured is worse than measured


def test_measurements_that_rise_with_the_width_are_made_to_fall() -> None:
    found = interpolate(20, [5, 10, 15], [1.0, 2.0, 0.5], FALLING)
    assert (np.diff(found) <= 0).all()
    np.testing.assert_allclose(found[[5, 10, 15]], [2.0, 2.0, 0.5], rtol=1e-6)


def test_negative_measurements_count_as_none() -> None:
    found = interpolate(20, [5, 15], [1.0, -1e-9], UNKNOWN)
    assert (found >= 0).all()
    assert (found[15:] == 0).all()


def test_between_measurements_the_damage_grows_as_the_error_does() -> None:
    errors = np.linspace(1, 0, 21) ** 2
    found = interpolate(20, [10], [1.0], errors)
    np.testing.assert_allclose(found[10:], errors[10:] / errors[10], rtol=1e-9, atol=1e-9)
    straight = interpolate(20, [10], [1.0], UNKNOWN)
    np.testing.assert_allclose(straight[10:], np.linspace(1, 0, 11), rtol=1e-9, atol=1e-9)


def test_below_all_measurements_the_damage_grows_faster_or_at_best_as_the_error_does() -> None:
    errors = np.linspace(1, 0, 21) ** 2
    steep, best = (interpolate(20, [10], [1.0], errors, steeply=steeply) for steeply in (True, False))
    np.testing.assert_allclose(best, errors / errors[10], rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(steep[10:], best[10:])
    np.testing.assert_allclose(steep[:10] / best[:10], np.linspace(2, 1, 11)[:10], rtol=1e-9)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_interpolation_never_rises(data: st.DataObject) -> None:
    units = data.draw(st.integers(2, 30))
    levels = data.draw(st.lists(st.integers(1, units - 1), min_size=1, max_size=5, unique=True))
    measured = [data.draw(st.floats(-0.1, 10)) for _ in levels]
    errors = np.array([data.draw(st.floats(0, 5)) for _ in range(units + 1)])
    found = interpolate(units, levels, measured, np.sort(errors)[::-1])
    assert np.isfinite(found).all()
    assert (np.diff(found) <= 0).all()
    assert found[units] == 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_allocation_avoids_widths_at_which_the_network_gives_no_number() -> None:
    cost, rng = branches((3, 3, 3)), np.random.default_rng(0)
    curves = [convex(3, rng), convex(4, rng), np.array([np.inf, np.inf, np.inf, 0.5, 0.1, 0.0])]
    limit = cost.total(np.array([2, 2, 3]))
    kept = allocate(curves, cost, limit)
    assert np.isfinite(error(curves, kept))
    assert error(curves, kept) == pytest.approx(least_error(curves, cost, limit, [1, 1, 1]))


def test_interpolation_knows_the_rest_where_the_errors_end_early() -> None:
    errors = np.linspace(3, 0, 11)
    errors[:2] = np.nan
    assert np.isfinite(interpolate(10, [2, 5], [2.0, 1.0], errors)).all()


@pytest.mark.parametrize("share", [0.4, 0.6, 0.8])
def test_by_stage_keeps_the_last_whole_and_more_of_the_one_before(share: float) -> None:
    analysis = prepared("vgg")[0]
    cost, units = CostModel(analysis), units_of(analysis)
    places = list(range(len(units)))
    kept = by_stage(units.tolist(), places, cost, analysis.macs * share)
    assert cost.total(kept) <= analysis.macs * share
    rest = units.copy()
    rest[:-1] = 1
    kept_shares = kept / units
    if cost.total(rest) <= analysis.macs * share:
        assert kept[-1] == units[-1]
        assert kept_shares[-2] == pytest.approx(min(DEEPER * kept_shares[:-2].mean(), 1.0), abs=1.5 / units.min())
    one = by_stage(units.tolist(), [0] * len(units), cost, analysis.macs * share)
    assert (one == uniform(units.tolist(), cost, analysis.macs * share)).all()


def test_by_stage_narrows_the_last_where_it_must() -> None:
    analysis = prepared("vgg")[0]
    cost, units = CostModel(analysis), units_of(analysis)
    tight = units.copy()
    tight[:-1] = 1
    limit = (cost.total(tight) + cost.total(np.ones_like(units))) / 2
    kept = by_stage(units.tolist(), list(range(len(units))), cost, limit)
    assert kept[-1] < units[-1]
    assert cost.total(kept) <= limit


def test_stages_are_told_by_the_number_of_positions() -> None:
    g = Builder()
    x = g.Relu(g.conv(g.input("x", [1, 3, 8, 8]), 4, name="a"))
    x = g.Relu(g.conv(x, 5, name="b", strides=[2, 2]))
    x = g.Relu(g.conv(x, 6, name="c"))
    analysis = analysed(g.model(g.gemm(g.Flatten(g.GlobalAveragePool(x)), 3, name="d")))[0]
    assert dict(zip([i.name for i in analysis.groups], stages(analysis), strict=True)) == {"a": 0, "b": 1, "c": 1}
