"""Widths that are measured again in the network that was fitted to the first ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
import pytest
from builder import Builder, run

from onnxprune.divergence import deviation
from onnxprune.effort import BALANCED
from onnxprune.finish import Aim, aim
from onnxprune.narrowing import Narrowing, columns_gone, curve, near, silent_weights
from onnxprune.pipeline import Chooser
from onnxprune.prepare import Prepared, prepare
from onnxprune.progress import Progress
from onnxprune.settings import Settings
from onnxprune.targets import Wanted

X = np.random.default_rng(0).standard_normal((80, 3, 8, 8)).astype(np.float32)
EVERY = np.arange(1, 17)


@pytest.mark.parametrize(
    ("choices", "count", "expected"),
    [
        (EVERY, 8, range(6, 12)),
        (EVERY, 16, range(12, 17)),
        (EVERY, 1, range(1, 3)),
        (np.array([8, 16, 24, 32]), 16, [8, 16, 24]),
        (np.array([8, 16, 24, 32]), 8, [8, 16]),
        (np.array([4]), 4, [4]),
    ],
    ids=str,
)
def test_kept_counts_move_by_a_quarter_or_to_the_next_choice(
    choices: np.ndarray, count: int, expected: Sequence[int]
) -> None:
    assert near(choices, count).tolist() == list(expected)


def test_what_narrower_and_wider_groups_change_adds_up() -> None:
    errors = np.linspace(1.0, 0.0, 9)
    found = curve(8, [3, 6], 4, [0.5, 0.25], errors)
    assert found.shape == (9,)
    np.testing.assert_allclose(found[[3, 4, 6, 7, 8]], [0.75, 0.25, 0, 0, 0], atol=1e-9)
    assert (np.diff(found) <= 0).all()
    np.testing.assert_allclose(found[5], 0.125)  # between two of them as the group's own error does


@pytest.mark.parametrize(("counts", "moved", "zero"), [([], [], 4), ([6], [0.25], 6), ([3], [0.5], 4)], ids=str)
def test_a_group_need_not_move_both_ways(counts: list[int], moved: list[float], zero: int) -> None:
    found = curve(8, counts, 4, moved, np.full(9, np.nan))
    assert not found[zero:].any()
    assert (found[:zero] > 0).all() == bool(counts)


def network() -> onnx.ModelProto:
    """Residual blocks, one of them with a weight that two layers share, which no fit changes."""
    g = Builder(seed=3)
    x = g.Relu(g.conv(g.input("x", ["n", 3, 8, 8]), 12, name="stem"))
    for k in range(2):
        y = g.Relu(g.conv(x, 16, name=f"a{k}"))
        if k:
            shared = g.weight(12, 16, 1, 1)
            x = g.Relu(g.Sum(x, g.Conv(y, shared), g.Conv(g.Tanh(y), shared)))
        else:
            x = g.Relu(g.Add(x, g.conv(y, 12, name=f"b{k}")))
    return g.model(g.gemm(g.Flatten(g.GlobalAveragePool(x)), 4, name="head"))


@pytest.fixture
def at_work() -> Iterator[tuple[Prepared, Aim, np.ndarray]]:
    """Ready to sweep, with the first counts."""
    prepared = prepare(network(), Settings(data=X, threads=1, thorough=True), Progress())
    goal = aim(prepared, Wanted(2.0, "macs", {}))
    with prepared.chooser.at_work(sweeping=True):
        prepared.gather()
        yield prepared, goal, goal.counts(prepared.chooser)


def outputs(chooser: Chooser, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Of the network with these stored tensors."""
    model = onnx.ModelProto()
    model.CopyFrom(chooser.analysis.graph.model)
    for tensor in model.graph.initializer:
        if tensor.name in arrays:
            tensor.CopyFrom(onnx.numpy_helper.from_array(arrays[tensor.name].astype(np.float32), tensor.name))
    return run(model, {"x": X})[0]


def test_variants_of_a_fitted_network_change_one_group_alone(at_work: tuple[Prepared, Aim, np.ndarray]) -> None:
    chooser = at_work[0].chooser
    analysis, graph = chooser.analysis, chooser.analysis.graph
    counts = np.array([info.units // 2 for info in analysis.groups])
    fitting = chooser.sweep(counts)
    kept, arrays = fitting.kept, fitting.arrays
    narrowing = Narrowing(analysis, chooser.readers, chooser.statistics, chooser.rankings, kept, arrays)
    silenced = 0
    for number, info in enumerate(analysis.groups):
        group, ranking = info.group.index, chooser.rankings[number]
        around = [max(int(counts[number]) - 2, 1), min(int(counts[number]) + 2, info.units)]
        variants = narrowing.variants(number, around, int(counts[number]))
        given = [*zip(around, map(variants.made, range(2)), strict=True), (int(counts[number]), variants.reference())]
        for count, made in given:
            assert sorted(made) == list(variants.tensors)
            now = {**kept, group: ranking.kept(count)}
            masks = silent_weights(analysis.groups, analysis, chooser.readers, now)
            for name, mask in masks.items():
                assert name not in made or not made[name][mask].any()
            for reader in (r for r in chooser.readers if group in r.columns):
                gone = np.zeros(reader.width, bool)
                gone[columns_gone(reader, now)] = True
                zero = (made[reader.layer.weight].reshape(len(made[reader.layer.weight]), -1) == 0).all(axis=0)
                assert zero[: len(gone) - 1][gone[:-1]].all() and not zero[~gone[: len(zero)]].all()
            own = silent_weights([info], analysis, chooser.readers, {group: np.empty(0, np.int64)})
            before = silent_weights(analysis.groups, analysis, chooser.readers, kept)
            for name in own:  # what comes back has the original's values, and all else those of the fitted network
                silenced += 1
                was, here = before[name], ~masks[name]
                old, fitted = graph.array(name), arrays.get(name, graph.array(name))
                np.testing.assert_array_equal(made[name][was & here], old[was & here])
                np.testing.assert_array_equal(made[name][~was & here], fitted[~was & here])
    assert silenced


@pytest.mark.parametrize("better", [True, False])
def test_the_network_that_is_kept_is_whole(
    at_work: tuple[Prepared, Aim, np.ndarray], better: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, goal, counts = at_work
    chooser = prepared.chooser
    monkeypatch.setattr(Chooser, "_is_better", lambda *_: better)
    found = chooser.fit(counts, goal.limits, goal.choices)
    widths = np.array([len(found.kept[info.group.index]) for info in chooser.analysis.groups])
    assert np.array_equal(widths, counts) != better
    assert all(limit.cost.total(widths) <= limit.limit for limit in goal.limits)
    expected = chooser.sweep(widths)
    assert {g: k.tolist() for g, k in found.kept.items()} == {g: k.tolist() for g, k in expected.kept.items()}
    assert (found.errors, found.notes) == (expected.errors, expected.notes)
    assert found.arrays.keys() == expected.arrays.keys()
    assert all(np.array_equal(found.arrays[name], expected.arrays[name]) for name in found.arrays)


def test_of_both_networks_the_nearer_one_is_kept(at_work: tuple[Prepared, Aim, np.ndarray]) -> None:
    prepared, goal, counts = at_work
    chooser = prepared.chooser
    original = {"y": outputs(chooser, {})}
    first = chooser.sweep(counts)
    again = chooser.sweep(chooser._allocated_again(first, goal.limits, goal.choices))
    damage = [deviation(original, {"y": outputs(chooser, each.arrays)}) for each in (first, again)]
    assert damage[0] != damage[1]
    assert chooser._is_better(again.arrays, first.arrays) == (damage[1] < damage[0])
    assert chooser._is_better(first.arrays, again.arrays) == (damage[0] < damage[1])
    found = chooser.fit(counts, goal.limits, goal.choices)
    assert deviation(original, {"y": outputs(chooser, found.arrays)}) == pytest.approx(min(damage), rel=1e-6)


def test_widths_are_measured_once_unless_a_run_is_thorough(
    at_work: tuple[Prepared, Aim, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, goal, counts = at_work
    prepared.chooser.effort = BALANCED
    monkeypatch.delattr(Chooser, "_allocated_again")
    prepared.chooser.fit(counts, goal.limits, goal.choices)
