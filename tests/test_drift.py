"""Which layers are fitted, and by what: those behind a cut, and with doubt where rows are few."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from builder import Builder, run
from onnx import numpy_helper

from onnxprune import fitting, pipeline
from onnxprune.api import Result, prune
from onnxprune.prepare import prepare
from onnxprune.progress import Progress
from onnxprune.reconstruct import Fit
from onnxprune.select import Problem
from onnxprune.settings import Settings

SAMPLES = 400


def network() -> onnx.ModelProto:
    """Layers a, b and c of 8 channels in front of a head, and one that reads what a gives."""
    g = Builder()
    a = g.Relu(g.conv(g.input("x", ["n", 3, 6, 6]), 8, name="a"))
    c = g.Relu(g.conv(g.Relu(g.conv(a, 8, name="b")), 8, name="c"))
    return g.model(g.conv(c, 4, name="head"), g.conv(a, 4, name="aside"))


def images(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((SAMPLES, 3, 6, 6)).astype(np.float32)


def stored(model: onnx.ModelProto, layer: str) -> dict[str, np.ndarray]:
    """Weight and bias of a layer, by their names."""
    node = next(n for n in model.graph.node if n.name == layer)
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.name in node.input}


def halved(**options: bool) -> Result:
    """The network with a part of b's channels."""
    given = {"only": "^b$", "speedup": 1.2, "best_effort": True, "threads": 1}
    return prune(network(), data=images(0), **given, **options)


@pytest.mark.parametrize("quick", [False, True], ids=["default", "quick"])
def test_what_follows_a_cut_is_fitted_and_what_does_not_is_left_alone(quick: bool) -> None:
    before, after = network(), halved(quick=quick).model
    pairs = {name: (stored(before, name), stored(after, name)) for name in ("a", "c", "head", "aside")}
    changed = {name: not all(np.array_equal(a[k], b[k]) for k in a) for name, (a, b) in pairs.items()}
    assert changed == {"a": False, "c": True, "head": True, "aside": False}


@pytest.mark.parametrize(("thorough", "method"), [(True, "greedy"), (True, "lasso"), (False, "greedy")])
def test_units_are_exchanged_wherever_they_are_chosen(
    thorough: bool, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of b on the way, as one layer reads it; of a, which two read, by what they read in the original."""
    asked = []

    def noted(problems: Sequence[Problem], kept: np.ndarray) -> np.ndarray:
        asked.append(len(problems))
        return np.arange(len(problems[0].columns))[-len(kept) :]

    monkeypatch.setattr(fitting, "swapped", noted)
    given = Settings(data=images(0), threads=1, only="^a$|^b$", samplers=False, thorough=thorough, select=method)
    prepared = prepare(network(), given, Progress())
    chooser = prepared.chooser
    with chooser.at_work(sweeping=True):
        prepared.gather()
        kept = chooser.sweep(np.array([5, 6])).kept
    swaps = thorough and method == "greedy"
    assert sorted(asked) == ([1, 2] if swaps else [])
    assert [units.tolist() == list(range(8))[-len(units) :] for units in kept.values()] == [swaps, swaps]


def test_the_fit_behind_makes_up_for_what_is_missing_in_front() -> None:
    before, after = network(), halved(quick=True).model
    unfitted = onnx.ModelProto()
    unfitted.CopyFrom(after)
    tensors = {t.name: t for t in unfitted.graph.initializer}
    for name, array in stored(before, "head").items():
        tensors[name].CopyFrom(numpy_helper.from_array(array, name))
    x = {"x": images(1)}  # that nothing was fitted to
    wanted = run(before, x)[0]
    errors = [float(np.square(run(model, x)[0] - wanted).mean()) for model in (after, unfitted)]
    assert 0.0 < errors[0] < 0.98 * errors[1]


def test_a_layer_is_not_changed_where_one_of_its_readers_is_not_fitted() -> None:
    """b reads fewer of a's channels, and aside all of them."""
    prepared = prepare(network(), Settings(data=images(0), threads=1, only="^a$|^b$"), Progress())
    chooser, aside = prepared.chooser, stored(network(), "aside")
    with chooser.at_work(sweeping=True):
        prepared.gather()
        counts = {"b": 8, "b:input": 6}
        arrays = chooser.sweep(np.array([counts[info.name] for info in prepared.analysis.groups])).arrays
    assert set(stored(network(), "b")) <= set(arrays)
    assert not {*aside, *stored(network(), "a")} & set(arrays)


def test_errors_are_reported_of_groups_that_lost_something() -> None:
    assert {g.name for g in halved(quick=True).report.groups if g.error is not None} == {"b"}


@pytest.mark.parametrize(("samples", "doubted"), [(10, True), (SAMPLES, False)])
@pytest.mark.parametrize(("in_blocks", "few"), [(False, True), (False, False), (True, True), (True, False)])
def test_a_limiter_is_fitted_to_with_doubt_where_rows_are_few(
    samples: int, doubted: bool, in_blocks: bool, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But of many samples not where the fit of a block follows, which minds it as well."""
    given = []

    def noted(start: Fit, *rest: Any) -> Fit:
        given.append(len(rest[-1]))
        return start

    monkeypatch.setattr(fitting, "refine", noted)
    monkeypatch.setattr(pipeline, "_FEW", 1000 if few else 0)
    if not in_blocks:
        monkeypatch.setattr(pipeline, "find_blocks", lambda *_: ())
    prune(network(), data=images(0)[:samples], only="^a$|^b$", speedup=1.5, best_effort=True, threads=1)
    assert bool(given) == (few or not in_blocks)
    assert all(count == (2 if doubted else 0) for count in given)


@pytest.mark.parametrize("op", ["MatMul", "Einsum"])
def test_layers_that_are_cut_and_cannot_be_fitted_are_named(op: str) -> None:
    g = Builder()
    x = g.Relu(g.MatMul(g.input("x", ["n", 5, 12]), g.weight(12, 16)))
    given = {} if op == "MatMul" else {"equation": "nti,io->nto"}
    y = g.node(op, x, g.weight(16, 4), name="last", **given)
    data = np.random.default_rng(0).standard_normal((40, 5, 12)).astype(np.float32)
    report = prune(g.model(y), data=data, speedup=1.5, threads=1).report
    said = [w for w in report.warnings if "not fitted" in w]
    assert [w.startswith("1 layer of other kinds") and w.endswith("not fitted (last)") for w in said] == [True] * (
        op == "Einsum"
    )
    assert [group.error is None for group in report.groups] == [op == "Einsum"]
