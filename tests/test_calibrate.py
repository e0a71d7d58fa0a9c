"""The sums that the sweep hands out, against both networks run as a whole; targets at residual sums written by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import pytest
from builder import RUNTIME, Builder, analysed, run
from cases import MODELS, RESIDUALS, SAMPLES, Case, case_of

from onnxprune import surroundings
from onnxprune.analysis import Analysis
from onnxprune.answers import Answers
from onnxprune.batches import Batches
from onnxprune.calibrate import Arrays, Sweep
from onnxprune.collecting import collect
from onnxprune.data import load_calibration
from onnxprune.joint import stored_tensors
from onnxprune.narrowing import removed_weights
from onnxprune.progress import Progress
from onnxprune.readers import Reader, find_readers
from onnxprune.reconstruct import fit, solve
from onnxprune.runtime import expose
from onnxprune.shelf import Shelf
from onnxprune.statistics import Gram, Statistics
from onnxprune.surroundings import look_behind


def sweep(case: Case, fitter: Callable[[Reader, list[list[Statistics]], Arrays], Arrays], start: Arrays) -> Arrays:
    """Run the sweep; the fitter is also given the stored tensors that hold when its reader's turn comes."""
    now = dict(start)

    def visited(reader: Reader, folds: list[list[Statistics]], *_: object) -> Arrays:
        new = fitter(reader, folds, dict(now))
        now.update(new)
        return new

    answers = asked(case.analysis, case.readers, case.batches)
    found = Sweep(case.analysis, case.readers, answers, RUNTIME, start).run(visited, never, Progress())
    assert set(found) == set(now)
    return found


def asked(analysis: Analysis, readers: Sequence[Reader], batches: Batches) -> Answers:
    """What the original gives, of no block."""
    answers = Answers(analysis, readers, (), batches, 0, Shelf(1 << 30))
    collect(analysis, (), batches, RUNTIME, Progress(), answers=answers)
    return answers


def never(*_: object) -> dict[str, np.ndarray]:
    raise AssertionError("no block was given")


def kept_columns(case: Case, reader: Reader) -> np.ndarray:
    """Half of every group's units, drawn once per group, and the bias where there is one."""
    gone = []
    for group, columns in reader.columns.items():
        units = np.random.default_rng(group).permutation(len(columns))
        gone.append(columns[units[: len(units) // 2]].ravel())
    kept = np.setdiff1d(np.arange(reader.width), np.concatenate([*gone, np.empty(0, np.int64)]))
    return kept if reader.layer.bias else kept[:-1]


def refitted(case: Case, reader: Reader, folds: list[list[Statistics]]) -> Arrays:
    """A reader's weights on half of its units."""
    kept = kept_columns(case, reader)
    fits = [fit(part, kept, w).weights for part, w in zip(folds, reader.weights, strict=True)]
    return stored_tensors(case.analysis.graph, reader.layer, np.stack(fits))


@pytest.mark.parametrize("name", MODELS)
def test_nothing_removed_gives_the_original_back(name: str) -> None:
    case = case_of(name)

    def fitted(reader: Reader, folds: list[list[Statistics]], _: Arrays) -> Arrays:
        left = np.arange(reader.width - (not reader.layer.bias))
        weights = [fit(part, left, w).weights for part, w in zip(folds, reader.weights, strict=True)]
        return stored_tensors(case.analysis.graph, reader.layer, np.stack(weights))

    def from_nothing(reader: Reader, folds: list[list[Statistics]], _: Arrays) -> Arrays:
        """Without the weights as they are to shrink to: the sums alone lead back to them."""
        left = np.arange(reader.width - (not reader.layer.bias))
        weights = [solve(a + b, left, np.zeros(w.shape), 1e-9) for (a, b), w in zip(folds, reader.weights, strict=True)]
        return stored_tensors(case.analysis.graph, reader.layer, np.stack(weights))

    expected = case.outputs({})
    for fitter, tolerance in ((fitted, 1e-5), (from_nothing, 1e-4)):
        found = case.outputs(sweep(case, fitter, {}))
        assert np.linalg.norm(found - expected) < tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("rows", [65536, 100])
@pytest.mark.parametrize("name", MODELS)
def test_the_sums_are_those_of_both_networks_run_as_a_whole(
    name: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxprune.batches.TARGET_ROWS", rows)
    monkeypatch.setattr("onnxprune.batches.ROWS_PER_COLUMN", 1)
    case = case_of(name)
    visits = []

    def fitter(reader: Reader, folds: list[list[Statistics]], now: Arrays) -> Arrays:
        visits.append((reader, folds, now))
        return refitted(case, reader, folds)

    sweep(case, fitter, {})
    assert sorted(r.index for r, _, _ in visits) == list(range(len(case.readers)))
    for reader, folds, now in visits:
        for parts, batches in zip(folds, case.explicit(reader, now), strict=True):
            for k, part in enumerate(parts):  # samples go to the folds in turn
                turns = [np.array(p) % 2 == k for p in case.batches.parts]
                mine = [np.repeat(turn, len(b[0]) // len(turn)) for turn, b in zip(turns, batches, strict=True)]
                x, y = (np.concatenate([b[j][m] for b, m in zip(batches, mine, strict=True)]) for j in (0, 1))
                assert part.rows == len(x)
                size = np.sqrt(np.abs(x.T @ x).max() * np.square(y).sum(axis=0).max())
                np.testing.assert_allclose(part.gram, x.T @ x, rtol=0, atol=1e-5 * np.abs(x.T @ x).max())
                np.testing.assert_allclose(part.cross, x.T @ y, rtol=0, atol=1e-5 * size)
                np.testing.assert_allclose(part.energy, np.square(y).sum(axis=0), rtol=1e-4)


@pytest.mark.parametrize("batch", [22, 64])
def test_both_folds_hold_samples_whatever_the_batch(batch: int) -> None:
    case = Case("chain", batch=batch)
    rows = []
    sweep(case, lambda reader, folds, now: rows.append([f.rows for f in folds[0]]) or {}, {})
    assert rows
    assert all(min(r) > 0.4 * sum(r) for r in rows)


@pytest.mark.parametrize("name", ["residual", "residual_norm", "projection", "late_shortcut", "tokens"])
def test_the_fit_behind_a_branch_is_least_squares_to_the_compensated_target(name: str) -> None:
    case = case_of(name)
    last = sorted(RESIDUALS[name])[-1]
    seen: dict[str, tuple[np.ndarray, Arrays]] = {}

    def fitter(reader: Reader, folds: list[list[Statistics]], now: Arrays) -> Arrays:
        if reader.layer.node.label == last:
            kept = kept_columns(case, reader)
            seen[last] = solve(folds[0][0] + folds[0][1], kept, np.zeros(reader.weights[0].shape), 1e-12), now
        return refitted(case, reader, folds)

    sweep(case, fitter, {})
    reader = next(r for r in case.readers if r.layer.node.label == last)
    found, now = seen[last]
    batches = case.explicit(reader, now)[0]
    x, y = (np.concatenate([b[j] for b in batches]) for j in (0, 1))
    kept = kept_columns(case, reader)
    expected = np.linalg.lstsq(x[:, kept], y, rcond=None)[0]
    np.testing.assert_allclose(found[kept], expected, rtol=0, atol=1e-4)
    # and that is another one than the fit to what the layer itself gave
    plain = np.concatenate([b[1] for b in case.explicit(reader, now, compensated=False)[0]])
    other = np.linalg.lstsq(x[:, kept], plain, rcond=None)[0]
    assert np.abs(other - expected).max() > 1e-2


def test_a_closed_scale_is_not_compensated_through() -> None:
    """Where BatchNormalization multiplies by nothing, the branch cannot pay for the shortcut."""
    case = Case("residual_norm")
    norm = next(n for n in case.graph.nodes if n.label == "n2")
    tensor = case.graph.initializers[norm.inputs[1]]
    gamma = onnx.numpy_helper.to_array(tensor).copy()
    gamma[1] = 0
    tensor.CopyFrom(onnx.numpy_helper.from_array(gamma, tensor.name))
    case.analysis = analysed(case.graph.model)[0]
    case.graph, case.readers = case.analysis.graph, find_readers(case.analysis)
    energies = {}

    def fitter(reader: Reader, folds: list[list[Statistics]], now: Arrays) -> Arrays:
        output = reader.layer.output
        if reader.layer.node.label == "b2":
            energies["found"] = (folds[0][0] + folds[0][1]).energy
            batches = [case.tensors({}, [output], k)[output] for k in range(len(case.batches))]
            energies["plain"] = np.square(np.concatenate(batches)).sum(axis=(0, 2, 3))
        return refitted(case, reader, folds)

    sweep(case, fitter, {})
    different = np.abs(energies["found"] / energies["plain"] - 1) > 1e-3
    assert different.tolist() == [True, False, True, True]


def test_what_is_changed_from_the_start_is_part_of_the_pruned_network() -> None:
    case = case_of("residual")
    info = next(i for i in case.analysis.groups if i.name == "stem")
    masks = removed_weights(info, case.analysis, np.array([0, 2]))
    start = {name: case.analysis.graph.silenced(name, gone) for name, gone in masks.items()}
    visits = []

    def fitter(reader: Reader, folds: list[list[Statistics]], now: Arrays) -> Arrays:
        visits.append((reader, folds, now))
        return {}

    assert set(sweep(case, fitter, start)) == set(start)
    for reader, folds, _ in visits:
        x = np.concatenate([b[0] for b in case.explicit(reader, start)[0]])
        gram = (folds[0][0] + folds[0][1]).gram
        np.testing.assert_allclose(gram, x.T @ x, rtol=0, atol=1e-5 * gram.max())


def test_a_head_that_reads_no_group_makes_up_for_what_comes_in() -> None:
    case = Case("open_features", samples=200)
    arrays = sweep(case, lambda reader, folds, _: refitted(case, reader, folds), {})
    head_weight = case.readers[-1].layer.weight
    assert case.readers[-1].columns == {}
    without = {k: v for k, v in arrays.items() if k != head_weight and k != case.readers[-1].layer.bias}
    expected = case.outputs({})
    errors = [np.linalg.norm(case.outputs(a) - expected) for a in (arrays, without)]
    assert errors[0] < errors[1]


def test_no_readers_and_no_change() -> None:
    case = case_of("chain")
    runner = Sweep(case.analysis, [], asked(case.analysis, [], case.batches), RUNTIME, {})
    assert runner.run(lambda *_: {}, never, Progress()) == {}


NO_SUM: dict[str, Callable[[Builder, str, str], str]] = {
    "read twice": lambda g, y, x: g.Mul(g.Add(y, x), y),
    "doubled": lambda g, y, x: g.Add(y, y),
    "through an activation": lambda g, y, x: g.Add(g.Relu(y), x),
    "a product": lambda g, y, x: g.Mul(y, x),
    "two normalisations": lambda g, y, x: g.Add(g.batch_norm(g.batch_norm(y)), x),
}


@pytest.mark.parametrize("kind", NO_SUM)
def test_targets_without_a_residual_sum_are_what_the_original_gave(kind: str) -> None:
    g = Builder()
    x = g.Relu(g.conv(g.input("x", ["n", 3, 4, 4]), 4, name="stem"), name="other")
    y = g.conv(g.Relu(g.conv(x, 5, name="a")), 4, name="b")
    analysis = analysed(g.model(g.conv(NO_SUM[kind](g, y, x), 2, name="last")))[0]
    x = np.random.default_rng(1).standard_normal((SAMPLES, 3, 4, 4)).astype(np.float32)
    data = load_calibration(x, analysis.graph.inputs)
    readers = find_readers(analysis)
    weight = next(n.inputs[1] for n in analysis.graph.nodes if n.label == "stem")
    energies = {}

    def visited(reader: Reader, folds: list[list[Statistics]], *_: object) -> Arrays:
        energies[reader.layer.node.label] = (folds[0][0] + folds[0][1]).energy
        return {}

    start = {weight: 0.3 * analysis.graph.array(weight)}  # so that the other operand has moved
    answers = asked(analysis, readers, Batches(data, 7, 0))
    Sweep(analysis, readers, answers, RUNTIME, start).run(visited, never, Progress())
    output = next(r.layer.output for r in readers if r.layer.node.label == "b")
    plain = run(expose(analysis.graph.model, [output]), data.feeds(range(SAMPLES)))[0]
    np.testing.assert_allclose(energies["b"], np.square(plain).sum(axis=(0, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize("width", [5, 7])
def test_a_normalisation_of_positions_is_none_of_outputs(width: int) -> None:
    g = Builder()
    y = g.Relu(g.linear(g.input("x", ["n", 5, 4]), 6, name="a"))
    y = g.Relu(g.batch_norm(g.linear(y, width, bias=False, name="b")))
    analysis = analysed(g.model(g.linear(y, 2)))[0]
    reader = next(r for r in find_readers(analysis) if r.layer.node.label == "b")
    behind = look_behind(analysis.graph, reader, set())
    assert (reader.output_scale == 1).all() and len(reader.output_scale) == width
    assert (behind.scale == 1).all() and not behind.shift.any() and behind.limits is None


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_a_part_without_rows_adds_nothing_and_nothing_is_printed(kind: type, capfd: pytest.CaptureFixture[str]) -> None:
    gram = Gram(3)
    gram.add(np.empty((0, 3), kind))
    np.testing.assert_array_equal(gram.value, np.zeros((3, 3)))
    assert capfd.readouterr() == ("", "")


def test_rows_that_find_no_room_are_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of("chain")
    reader = next(r for r in case.readers if r.layer.node.label == "b")
    behind = look_behind(case.graph, reader, set())
    rng, outputs = np.random.default_rng(0), reader.weights.shape[2]
    rows, wanted = (rng.standard_normal((16, n)).astype(np.float32) for n in (reader.width, outputs))
    for room, whole in ((1 << 20, True), (8 * 4 * (reader.width + 2 * outputs), False)):
        monkeypatch.setattr(surroundings, "_SAMPLE_BYTES", room)
        with Shelf(1 << 20) as shelf:
            samples = surroundings.Samples.of(behind, reader, 8, shelf)
            assert samples is not None
            samples.add(np.arange(16), 2, rows, wanted, None)
            samples.narrow(np.arange(reader.width))
            found = np.concatenate([part for part, _, _ in samples])
        assert samples.is_whole is whole
        assert (len(found) == len(rows)) is whole
