"""Selection against explicit least squares, brute force and scikit-learn, on problems small enough to enumerate."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx
import pytest
from builder import Builder, analysed
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Lasso, lars_path

from onnxprune.analysis import Analysis, GroupInfo
from onnxprune.errors import InputError
from onnxprune.reconstruct import solve
from onnxprune.select import DAMPING, Problem, Ranking, greedy, lasso, ordered, swapped, wanda
from onnxprune.select.swaps import _Kept
from onnxprune.selection import FROM_ACTIVATIONS, METHODS, rank, with_errors
from onnxprune.statistics import Statistics, Sums

UNITS, TAPS, OUTPUTS, ROWS = 5, 2, 3, 60


class Samples:
    """A problem together with the samples that its statistics are the sums of."""

    def __init__(
        self,
        seed: int,
        units: int = UNITS,
        taps: int = TAPS,
        outputs: int = OUTPUTS,
        scale: float = 1.0,
        rows: int = ROWS,
    ) -> None:
        rng = np.random.default_rng(seed)
        mixed = rng.standard_normal((rows, units * taps)) @ rng.standard_normal((units * taps, units * taps))
        self.x = np.concatenate([mixed, np.ones((rows, 1))], axis=1)
        self.weights = rng.standard_normal((units * taps + 1, outputs))
        self.y = self.x @ self.weights + 0.3 * rng.standard_normal((rows, outputs))
        self.columns = rng.permutation(units * taps).reshape(units, taps)
        self.active = np.ones(units * taps + 1, bool)
        self.scale = scale

    @property
    def problem(self) -> Problem:
        sums = Sums(self.x.shape[1], self.y.shape[1])
        sums.add(self.x, self.y)
        statistics = sums.statistics
        return Problem(statistics, self.weights, self.columns, self.active, self.scale)

    def best(self, kept: Sequence[int], ridge: float) -> np.ndarray:
        """The weights that `onnxprune.reconstruct.solve` finds for these units."""
        use = self.active.copy()
        use[np.delete(self.columns, kept, axis=0).ravel()] = False
        return solve(self.problem.statistics, np.flatnonzero(use), self.weights, ridge)

    @property
    def energy(self) -> float:
        return self.scale * float(np.square(self.y).sum())

    def fit(self, kept: np.ndarray, damping: float = 0.0) -> tuple[float, float]:
        """Scaled least squares on these units' columns and those of no unit: (damped objective, squared error).

        With damping r the objective is |Y - XW|^2 + r |W - V|^2, V the weights as they are.
        """
        use = self.active.copy()
        use[np.delete(self.columns, kept, axis=0).ravel()] = False
        mean = np.diag(self.x.T @ self.x)[self.active].mean()
        root = np.sqrt(damping * mean) * np.eye(len(use))
        rows, wanted = np.concatenate([self.x, root]), np.concatenate([self.y, root @ self.weights])
        wanted[len(self.x) :][~self.active] = 0  # nothing pulls at columns that are gone
        found = np.zeros_like(self.weights)
        found[use] = np.linalg.lstsq(rows[:, use], wanted, rcond=None)[0]
        objective = np.square(wanted - rows @ found).sum()
        return self.scale * objective, self.scale * np.square(self.y - self.x @ found).sum()


def damped(samples: list[Samples], kept: np.ndarray) -> float:
    """What a kept set costs more than keeping all, on top of the error that keeping all leaves."""
    everything = np.arange(len(samples[0].columns))
    return sum(s.fit(kept, DAMPING)[0] - s.fit(everything, DAMPING)[0] + s.fit(everything, DAMPING)[1] for s in samples)


def without(kept: np.ndarray, unit: int) -> np.ndarray:
    return kept[kept != unit]


def exchanged(kept: np.ndarray, out: int, back: int) -> np.ndarray:
    """With one unit in another's place."""
    return np.sort(np.append(without(kept, out), back))


# ---------------------------------------------------------------------------------------------------------- greedy

PROBLEMS = {
    "one reader": [Samples(0)],
    "one tap": [Samples(1, units=7, taps=1)],
    "one output": [Samples(2, outputs=1)],
    "two readers": [Samples(3), Samples(4, outputs=2, scale=0.2)],
    "a reader that weighs nothing": [Samples(5), Samples(6, scale=0.0)],
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_greedy_errors_are_those_of_explicit_least_squares(name: str) -> None:
    samples = PROBLEMS[name]
    ranking = greedy([s.problem for s in samples])
    energy = sum(s.energy for s in samples)
    for count in range(len(samples[0].columns) + 1):
        kept = ranking.kept(count)
        assert ranking.errors[count] == pytest.approx(damped(samples, kept), rel=1e-9, abs=1e-9 * energy)
        plain = sum(s.fit(kept)[1] for s in samples)
        assert ranking.errors[count] == pytest.approx(plain, abs=3e-3 * energy)  # the damping is small


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_elimination_is_the_cheapest(name: str) -> None:
    samples = PROBLEMS[name]
    ranking = greedy([s.problem for s in samples])
    for count in range(len(samples[0].columns), 0, -1):
        kept = ranking.kept(count)
        cheapest = min(kept, key=lambda u: damped(samples, without(kept, u)))
        np.testing.assert_array_equal(ranking.kept(count - 1), without(kept, cheapest))


def test_greedy_with_two_readers_is_neither_alone() -> None:
    one, two = Samples(3), Samples(4)
    alone = [greedy([s.problem]).sets for s in (one, two)]
    assert not np.array_equal(*alone)
    for weights, expected in (((1.0, 1e-9), alone[0]), ((1e-9, 1.0), alone[1])):
        one.scale, two.scale = weights
        np.testing.assert_array_equal(greedy([one.problem, two.problem]).sets, expected)


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_greedy_sets_are_nested_and_errors_fall_with_the_width(seed: int, units: int, taps: int) -> None:
    ranking = greedy([Samples(seed, units, taps).problem])
    assert ranking.sets.sum(axis=1).tolist() == list(range(units + 1))
    assert (ranking.sets[1:] | ~ranking.sets[:-1]).all()
    assert (np.diff(ranking.errors) <= 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_exact_duplicates_go_first_and_cost_nothing(seed: int) -> None:
    samples = Samples(seed, units=6)
    for copy, original in ((4, 1), (5, 2)):
        samples.x[:, samples.columns[copy]] = samples.x[:, samples.columns[original]]
    samples.y = samples.x @ samples.weights  # as in the original network
    ranking = greedy([samples.problem])
    gone = sorted(set(range(6)) - set(ranking.kept(4).tolist()))
    assert gone in ([1, 2], [1, 5], [2, 4], [4, 5])  # one of each pair
    # the damping alone: the other of the pair takes over weights that it is drawn away from by
    lost = np.square(samples.weights[samples.columns[gone]]).sum()
    damping = DAMPING * np.square(samples.x).sum(axis=0).mean()
    assert ranking.errors[4] <= 2 * damping * lost
    assert ranking.errors[3] > 100 * ranking.errors[4]


@pytest.mark.parametrize("names", [("one reader",), ("one reader", "one tap"), ("one output",)])
def test_several_eliminations_at_once_are_those_made_one_by_one(
    names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"one reader": (2, 3), "one tap": (1, 3), "one output": (1, 1)}
    problems = [
        Samples(k, units=40, taps=sizes[name][0], outputs=sizes[name][1], rows=400).problem
        for k, name in enumerate(names)
    ]
    monkeypatch.setattr(sys.modules["onnxprune.select.greedy"], "_AT_ONCE", 4)
    several = greedy(problems)
    monkeypatch.setattr(sys.modules["onnxprune.select.greedy"], "_AT_ONCE", 1000)
    alone = greedy(problems)
    np.testing.assert_array_equal(several.sets[24:], alone.sets[24:])
    np.testing.assert_allclose(several.errors[24:], alone.errors[24:], rtol=1e-9)


def test_of_two_that_stand_in_for_one_another_one_stays_though_both_could_go_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.modules["onnxprune.select.greedy"], "_AT_ONCE", 4)
    samples = Samples(3, units=16, rows=200)
    for copied in range(8):
        samples.x[:, samples.columns[copied + 8]] = samples.x[:, samples.columns[copied]]
    samples.y = samples.x @ samples.weights
    kept = greedy([samples.problem]).kept(8)
    assert sorted(kept % 8) == list(range(8))


def test_greedy_leaves_columns_alone_that_are_gone() -> None:
    samples = Samples(7, units=4)
    rest = Samples(7, units=4)
    samples.x = np.insert(samples.x, 0, 100 * samples.y[:, 0], axis=1)  # would explain everything
    samples.weights = np.insert(samples.weights, 0, 5.0, axis=0)
    samples.columns = samples.columns + 1
    samples.active = np.insert(samples.active, 0, False)
    found, expected = greedy([samples.problem]), greedy([rest.problem])
    np.testing.assert_array_equal(found.sets, expected.sets)
    np.testing.assert_allclose(found.errors, expected.errors, rtol=1e-9)


@pytest.mark.parametrize("floor", [1, 3, 5])
def test_greedy_down_to_a_floor_is_the_beginning_of_the_whole(floor: int) -> None:
    problem = Samples(8).problem
    whole, part = greedy([problem]), greedy([problem], floor)
    np.testing.assert_array_equal(part.sets[floor:], whole.sets[floor:])
    np.testing.assert_allclose(part.errors[floor:], whole.errors[floor:], rtol=1e-12)
    assert np.isnan(part.errors[:floor]).all()
    assert part.sets.sum(axis=1).tolist() == list(range(UNITS + 1))


def test_greedy_with_fewer_rows_than_columns_stays_finite() -> None:
    samples = Samples(9, units=20, taps=3, rows=10)
    ranking = greedy([samples.problem])
    assert np.isfinite(ranking.errors).all()
    assert ranking.sets.sum(axis=1).tolist() == list(range(21))


# ----------------------------------------------------------------------------------------------------------- swaps


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_what_an_exchange_saves_is_exact(name: str, count: int) -> None:
    samples = PROBLEMS[name]
    units = np.arange(len(samples[0].columns))
    kept, gone = units[:count], units[count:]
    gains = np.sum([_Kept(s.problem, kept).gains(gone) for s in samples], axis=0)
    saved = [[damped(samples, kept) - damped(samples, exchanged(kept, out, back)) for out in kept] for back in gone]
    np.testing.assert_allclose(gains, saved, rtol=1e-7, atol=1e-9 * sum(s.energy for s in samples))


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_swaps_end_where_none_gains(name: str, count: int) -> None:
    samples = PROBLEMS[name]
    units = np.arange(len(samples[0].columns))
    worst = max(itertools.combinations(units, count), key=lambda kept: damped(samples, np.array(kept)))
    kept = swapped([s.problem for s in samples], np.array(worst))
    assert sorted(set(kept.tolist())) == kept.tolist() and len(kept) == count
    left = damped(samples, kept)
    assert left < damped(samples, np.array(worst))
    others = [exchanged(kept, out, back) for out in kept for back in np.setdiff1d(units, kept)]
    assert all(damped(samples, other) > 0.998 * left for other in others)


@pytest.mark.parametrize("kept", [np.arange(UNITS), np.empty(0, np.int64)], ids=["all", "none"])
def test_nothing_is_exchanged_where_nothing_can_be(kept: np.ndarray) -> None:
    np.testing.assert_array_equal(swapped([Samples(0).problem], kept), kept)


def test_units_whose_columns_are_gone_are_the_first_to_be_exchanged() -> None:
    samples = Samples(8)
    samples.active[samples.columns[[0, 1]].ravel()] = False
    assert swapped([samples.problem], np.array([0, 1, 2])).tolist() == [2, 3, 4]


# ----------------------------------------------------------------------------------------------------------- lasso


def contributions(samples: Samples, weights: np.ndarray, units: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The Z_i of some units side by side, outputs stacked, and what they have to explain.

    Of both is left what columns of no unit cannot make up for.
    """
    rest = samples.active.copy()
    rest[samples.columns.ravel()] = False
    own = samples.x[:, rest]
    z = [samples.x[:, samples.columns[u]] @ weights[samples.columns[u]] for u in units]
    left = [each - own @ np.linalg.lstsq(own, each, rcond=None)[0] for each in (*z, samples.y)]
    return np.stack([each.ravel() for each in left[:-1]], axis=1), left[-1].ravel()


def planted(seed: int, support: list[int]) -> Samples:
    """A target that is made of some units only, whose weights say that all take part."""
    samples = Samples(seed, units=8, rows=300)
    samples.x[:, :-1] = np.random.default_rng(seed).standard_normal((300, 16))
    z = np.stack([samples.x[:, c] @ samples.weights[c] for c in samples.columns], axis=2)
    noise = np.random.default_rng(seed).standard_normal((300, OUTPUTS))
    samples.y = z[:, :, support].sum(axis=2) + samples.weights[-1] + 0.05 * noise
    return samples


@pytest.mark.parametrize("support", [[0], [2, 5], [1, 3, 4, 7], [0, 1, 2, 4, 5, 6, 7]])
def test_lasso_recovers_a_planted_selection(support: list[int]) -> None:
    assert lasso([planted(0, support).problem]).kept(len(support)).tolist() == support


@pytest.mark.parametrize("seed", range(3))
def test_lasso_selects_what_scikit_learn_selects_from_samples(seed: int) -> None:
    both = Samples(seed, units=9), Samples(seed + 50, units=9, outputs=2, scale=0.5)
    ranking = lasso([s.problem for s in both])
    left, seen = list(range(9)), set()
    for fewest in (6, 4, 3, 2, 1):  # a quarter goes at a time, and then weights are fitted again
        parts = [contributions(s, s.best(left, DAMPING), left) for s in both]
        z, target = (
            np.concatenate([np.sqrt(s.scale) * part[k] for s, part in zip(both, parts, strict=True)]) for k in range(2)
        )
        alphas = lars_path(z, target, method="lasso")[0]
        reached = set()
        for alpha in (alphas[:-1] + alphas[1:]) / 2:
            solver = Lasso(alpha, fit_intercept=False, tol=1e-12, max_iter=200_000).fit(z, target)
            support = np.flatnonzero(np.abs(solver.coef_) > 1e-9)
            width = len(support)
            if fewest <= width < len(left) and width not in reached:  # where a unit is dropped, the first set counts
                np.testing.assert_array_equal(ranking.kept(width), np.array(left)[support])
            reached.add(width)
        seen |= {width for width in reached if fewest <= width < len(left)}
        left = ranking.kept(fewest).tolist()
    assert seen == set(range(1, 9))


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_lasso_needs_no_unit_that_never_changes_however_large_what_stays_is(scale: float) -> None:
    """The bias makes up for it, which large columns that are not up for selection must not hold back."""
    samples = Samples(4, units=6, taps=1)
    samples.x[:, :-1] = np.random.default_rng(4).standard_normal((ROWS, 6))
    constant, large = samples.columns[2].item(), samples.columns[4:].ravel()
    samples.x[:, constant] = 5.0
    samples.x[:, large] *= scale
    samples.weights[large] /= scale
    samples.y = samples.x @ samples.weights
    assert lasso([replace(samples.problem, columns=samples.columns[:4])]).kept(3).tolist() == [0, 1, 3]


def test_lasso_takes_off_the_target_what_always_stays() -> None:
    support = [1, 3, 6]
    samples = planted(1, support)
    samples.weights[-1] += 50.0  # a large bias, which no unit is to explain
    samples.y += 50.0
    assert lasso([samples.problem]).kept(3).tolist() == support


DEGENERATE = {
    "nothing is read": lambda p: replace(p, statistics=Sums(*p.weights.shape).statistics),
    "no weights": lambda p: replace(p, weights=np.zeros_like(p.weights)),
    "no target": lambda p: replace(
        p, statistics=Statistics(p.statistics.gram, 0 * p.statistics.cross, 0 * p.statistics.energy)
    ),
    "all units alike": lambda p: replace(p, columns=np.repeat(p.columns[:1], UNITS, axis=0)),
    "as in the original": lambda p: replace(
        p, statistics=Statistics.of_linear(p.statistics.gram, p.weights, p.statistics.rows)
    ),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_lasso_keeps_as_many_as_asked_for_even_if_degenerate(name: str) -> None:
    ranking = lasso([DEGENERATE[name](Samples(10).problem)])
    assert [len(ranking.kept(k)) for k in range(UNITS + 1)] == list(range(UNITS + 1))


@given(st.integers(0, 10_000), st.integers(1, 8))
@settings(max_examples=25, deadline=None)
def test_lasso_keeps_as_many_as_asked_for(seed: int, units: int) -> None:
    ranking = lasso([Samples(seed, units).problem, Samples(seed + 1, units, outputs=1).problem])
    assert [len(ranking.kept(k)) for k in range(units + 1)] == list(range(units + 1))
    assert np.isnan(ranking.errors).all()


@pytest.mark.parametrize("units", [3, 7, 40])
def test_errors_that_a_method_does_not_give_are_those_of_the_best_weights(units: int) -> None:
    problems = [Samples(1, units).problem, Samples(2, units, outputs=1).problem]
    known = greedy(problems)
    found = with_errors(replace(known, errors=np.full(units + 1, np.nan)), problems)
    there = np.unique(np.linspace(0, units, 17).round().astype(int))
    np.testing.assert_allclose(found.errors[there], known.errors[there], rtol=1e-3, atol=1e-3 * known.errors[0])
    assert with_errors(known, problems) is known
    assert np.isnan(with_errors(lasso(problems), []).errors).all()


# ------------------------------------------------------------------------------------------------------- rankings


@given(st.permutations(range(6)))
@settings(max_examples=20, deadline=None)
def test_an_order_gives_nested_sets(order: list[int]) -> None:
    ranking = ordered(np.array(order), {6: 0.0, 2: 4.0})
    assert [ranking.kept(k).tolist() for k in range(7)] == [sorted(order[:k]) for k in range(7)]
    np.testing.assert_array_equal(ranking.errors, [np.nan, np.nan, 4.0, np.nan, np.nan, np.nan, 0.0])


def test_kept_indices_are_sorted() -> None:
    sets = np.array([[False, False, False], [False, True, False], [True, False, True], [True, True, True]])
    assert Ranking(sets, np.zeros(4)).kept(2).tolist() == [0, 2]


# ------------------------------------------------------------------------------------------- methods on real groups


def network(norm: bool = True) -> onnx.ModelProto:
    """Two convolutions into one sum (one group of 6), and a chain behind it (a group of 4)."""
    g = Builder(seed=3)
    x = g.input("x", [1, 3, 6, 6])
    one, two = g.conv(x, 6, name="one"), g.conv(x, 6, k=1, name="two")
    if norm:
        one, two = g.batch_norm(one, name="norm1"), g.batch_norm(two, name="norm2")
    y = g.conv(g.Relu(g.Add(one, two)), 4, name="three")
    y = g.batch_norm(y, name="norm3") if norm else y
    return g.model(g.conv(g.Relu(y), 2, name="last"))


def group_of(analysis: Analysis, producer: str) -> GroupInfo:
    return next(info for info in analysis.groups if producer in info.producers)


def order_of(ranking: Ranking) -> list[int]:
    """The units in the order in which they come in."""
    return [int(np.flatnonzero(b & ~a)[0]) for a, b in itertools.pairwise(ranking.sets)]


def stored(analysis: Analysis, node: str, operand: int) -> np.ndarray:
    found = next(n for n in analysis.graph.nodes if n.label == node)
    return analysis.graph.array(found.inputs[operand])


def test_wanda_weighs_the_weights_by_what_they_meet() -> None:
    one, two = Samples(0), Samples(1, scale=0.25)
    total = np.zeros(UNITS)
    for s in (one, two):
        each = np.abs(s.weights).sum(axis=1) * np.linalg.norm(s.x, axis=0)
        total += [np.sqrt(s.scale) * each[columns].sum() for columns in s.columns]
    assert order_of(wanda([one.problem, two.problem])) == np.argsort(-total).tolist()


def test_l1_adds_up_the_filters_of_all_producers() -> None:
    analysis = analysed(network())[0]
    for producers in (("one", "two"), ("three",)):
        info = group_of(analysis, producers[0])
        norms = sum(np.abs(stored(analysis, name, 1)).sum(axis=(1, 2, 3)) for name in producers)
        assert order_of(rank("l1", info, [], analysis, 0)) == np.argsort(-norms).tolist()


def test_slimming_averages_the_scales_of_all_normalisations() -> None:
    analysis = analysed(network())[0]
    for norms in (("norm1", "norm2"), ("norm3",)):
        info = group_of(analysis, {"norm1": "one", "norm3": "three"}[norms[0]])
        gamma = np.mean([np.abs(stored(analysis, name, 1)) for name in norms], axis=0)
        assert order_of(rank("slimming", info, [], analysis, 0)) == np.argsort(-gamma).tolist()


def test_slimming_without_normalisation_is_refused() -> None:
    analysis = analysed(network(norm=False))[0]
    with pytest.raises(InputError, match="needs BatchNormalization nodes; group 'one' passes none"):
        rank("slimming", group_of(analysis, "one"), [], analysis, 0)


def test_random_depends_on_the_seed_and_the_group() -> None:
    analysis = analysed(network())[0]
    info = group_of(analysis, "one")
    orders = [order_of(rank("random", info, [], analysis, seed)) for seed in (0, 0, 1, 2)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2] or orders[0] != orders[3]
    assert sorted(orders[0]) == list(range(6))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_as_many_as_asked_for(method: str) -> None:
    analysis = analysed(network())[0]
    for info in analysis.groups:
        ranking = rank(method, info, [Samples(0, info.units).problem], analysis, 0)
        assert ranking.sets.sum(axis=1).tolist() == list(range(info.units + 1))


@pytest.mark.parametrize("method", FROM_ACTIVATIONS)
def test_a_group_that_no_layer_reads_is_ranked_by_its_filters(method: str) -> None:
    analysis = analysed(network())[0]
    info = group_of(analysis, "one")
    np.testing.assert_array_equal(rank(method, info, [], analysis, 0).sets, rank("l1", info, [], analysis, 0).sets)
