"""The sums that the sweep hands out, against both networks run as a whole; targets at residual sums written by hand."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import pytest
from builder import RUNTIME, Builder, analysed, run

from onnxprune.analysis import Analysis
from onnxprune.answers import Answers
from onnxprune.batches import LARGEST, ROWS_PER_COLUMN, Batches, batch_size, sample_bytes
from onnxprune.calibrate import Arrays, Sweep
from onnxprune.collecting import collect
from onnxprune.data import Calibration, load_calibration
from onnxprune.joint import stored_tensors
from onnxprune.memory import Room
from onnxprune.pipeline import removed_weights
from onnxprune.progress import Progress
from onnxprune.readers import Reader, find_readers
from onnxprune.reconstruct import fit, solve
from onnxprune.runtime import expose
from onnxprune.shelf import Shelf
from onnxprune.statistics import Gram, Statistics

SAMPLES = 24

# ------------------------------------------------------------------------------------------------------ the networks

# per network: who is added to what a reader gives, and the scale on the way (by the name of a BatchNormalization)
RESIDUALS: dict[str, dict[str, tuple[str, str]]] = {}
MODELS: dict[str, Callable[[], onnx.ModelProto]] = {}


def network(**residuals: tuple[str, str]) -> Callable[[Callable[[Builder], str | tuple[str, ...]]], None]:
    """Register a network with the residual sums that its readers end in."""

    def register(make: Callable[[Builder], str | tuple[str, ...]]) -> None:
        def model() -> onnx.ModelProto:
            g = Builder(seed=5)
            outputs = make(g)
            return g.model(*([outputs] if isinstance(outputs, str) else outputs))

        MODELS[make.__name__] = model
        RESIDUALS[make.__name__] = residuals

    return register


def image(g: Builder, size: int = 6) -> str:
    return g.input("x", ["n", 3, size, size])


def head(g: Builder, x: str, outputs: int = 3) -> str:
    return g.gemm(g.Flatten(g.GlobalAveragePool(x)), outputs, name="head")


@network()
def chain(g: Builder) -> str:
    x = g.Relu(g.conv(g.Relu(g.conv(image(g), 6, name="a")), 5, name="b"))
    return head(g, g.Relu(g.conv(x, 6, name="c")))


@network(b1=("stem_out", ""), b2=("block1", ""))
def residual(g: Builder) -> str:
    x = g.Relu(g.conv(image(g), 4, name="stem"), name="stem_out")
    for k in (1, 2):
        branch = g.conv(g.Relu(g.conv(x, 6, name=f"a{k}")), 4, name=f"b{k}")
        x = g.Relu(g.Add(branch, x), name=f"block{k}")
    return head(g, x)


@network(b1=("stem_out", "n1"), b2=("block1", "n2"))
def residual_norm(g: Builder) -> str:
    x = g.Relu(g.conv(image(g), 4, name="stem"), name="stem_out")
    for k in (1, 2):
        branch = g.batch_norm(g.conv(g.Relu(g.conv(x, 6, name=f"a{k}")), 4, name=f"b{k}"), name=f"n{k}")
        x = g.Relu(g.Add(x, branch), name=f"block{k}")  # the other way round
    return head(g, x)


@network(short=("b", ""))  # the shortcut comes second, and knows what the branch gives
def projection(g: Builder) -> str:
    x = g.Relu(g.conv(g.Relu(g.conv(image(g), 5, name="stem")), 4, name="next"))
    branch = g.conv(g.Relu(g.conv(x, 6, name="a")), 5, name="b")
    return head(g, g.Relu(g.Add(branch, g.conv(x, 5, k=1, name="short"))))


@network(b=("pooled", ""))  # the shortcut stands behind the branch in the file, and can be known before it all the same
def late_shortcut(g: Builder) -> str:
    x = g.Relu(g.conv(g.Relu(g.conv(image(g), 5, name="stem")), 4, name="next"))
    branch = g.conv(g.Relu(g.conv(x, 6, name="a")), 4, name="b")
    pooled = g.AveragePool(x, kernel_shape=[3, 3], pads=[1] * 4, name="pooled")
    return head(g, g.Relu(g.Add(branch, pooled)))


@network()
def grouped(g: Builder) -> str:
    x = g.Relu(g.conv(image(g), 6, name="a"))
    x = g.Relu(g.conv(x, 4, group=2, name="b"))
    return head(g, x)


@network()
def two_readers(g: Builder) -> str:
    x = g.Relu(g.conv(image(g), 6, name="a"))
    one, two = g.conv(x, 4, name="b"), g.conv(x, 3, k=1, name="c")
    return head(g, g.Relu(g.Concat(one, two, axis=1)))


@network(down2=("block", ""))  # the bias is added on the way
def tokens(g: Builder) -> str:
    x = g.linear(g.input("x", ["n", 5, 4]), 4, name="stem")
    x = g.Add(g.linear(g.Relu(g.linear(x, 7, name="up1")), 4, name="down1"), g.Relu(x), name="block")
    x = g.Add(g.linear(g.Relu(g.linear(x, 7, name="up2")), 4, name="down2"), x)
    return g.linear(x, 3, name="out")


@network()
def flat(g: Builder) -> str:
    x = g.ConvTranspose(
        g.Relu(g.conv(image(g, 4), 4, name="a")), g.weight(4, 5, 2, 2), g.weight(5), name="b", strides=[2, 2]
    )
    x = g.Flatten(g.MaxPool(g.Relu(x), kernel_shape=[4, 4], strides=[4, 4]))
    x = g.Relu(g.node("Gemm", x, g.weight(20, 8), g.weight(8), name="c"))
    return g.gemm(x, 3, name="head")


@network()
def open_features(g: Builder) -> tuple[str, str]:
    """The features are an output, so that the head reads no group."""
    x = g.conv(g.Relu(g.conv(image(g), 6, name="a")), 4, name="b")
    features = g.Flatten(g.GlobalAveragePool(x), name="features")
    return g.gemm(features, 3, name="head"), features


# --------------------------------------------------------------------------------------------------------- harness


class Case:
    """A network, its readers, its data, and runs of it as a whole."""

    def __init__(self, name: str, batch: int = 7, seed: int = 0) -> None:
        self.name = name
        self.analysis: Analysis = analysed(MODELS[name]())[0]
        self.graph = self.analysis.graph
        self.readers = find_readers(self.analysis)
        shape = [d or 1 for d in self.graph.inputs[0].shape][1:]
        x = np.random.default_rng(1).standard_normal((SAMPLES, *shape)).astype(np.float32)
        self.data: Calibration = load_calibration(x, self.graph.inputs)
        self.batches = Batches(self.data, batch, seed)

    def tensors(self, arrays: Mapping[str, np.ndarray], names: Sequence[str], batch: int) -> dict[str, np.ndarray]:
        """Tensors of the network with these stored tensors, run as a whole."""
        model = expose(self.graph.model, names)
        for tensor in model.graph.initializer:
            if tensor.name in arrays:
                tensor.CopyFrom(onnx.numpy_helper.from_array(arrays[tensor.name].astype(np.float32), tensor.name))
        return dict(zip(names, run(model, self.batches.feeds(batch)), strict=True))

    def outputs(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        name = self.graph.outputs[0]
        return np.concatenate([self.tensors(arrays, [name], k)[name] for k in range(len(self.batches))])

    def norm(self, name: str) -> np.ndarray:
        node = next(n for n in self.graph.nodes if n.label == name)
        gamma, variance = self.graph.array(node.inputs[1]), self.graph.array(node.inputs[4])
        return gamma / np.sqrt(variance + 1e-5)

    def explicit(
        self, reader: Reader, arrays: Mapping[str, np.ndarray], compensated: bool = True
    ) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        """Per group and batch: what the pruned network reads, and the target Y1 + Y2 - Y1'."""
        other, norm = RESIDUALS[self.name].get(reader.layer.node.label, ("", "")) if compensated else ("", "")
        names = [reader.layer.data, reader.layer.output, *([other] if other else [])]
        found: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in reader.weights]
        for batch in range(len(self.batches)):
            old, new = self.tensors({}, names, batch), self.tensors(arrays, names, batch)
            target = old[reader.layer.output]
            if other:
                scale = self.norm(norm)[:, None, None] if norm else 1.0
                target = target + (old[other] - new[other]) / scale
            channels_last = not reader.unfolding.kernel
            out = target.shape[1:-1] if channels_last else target.shape[2:]
            positions = self.batches.positions(reader, batch, int(np.prod(out, dtype=np.int64)))
            rows = reader.unfolding.rows(new[reader.layer.data], positions, out)
            for part, x, y in zip(found, rows, reader.unfolding.targets(target, positions), strict=True):
                part.append((x.astype(np.float64), y.astype(np.float64)))
        return found


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


@functools.cache
def case_of(name: str) -> Case:
    return Case(name)


# ------------------------------------------------------------------------------------------------------- the readers


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "chain": {"b": 1, "c": 1, "head": 1},
        "residual": {"a1": 1, "b1": 1, "a2": 1, "b2": 1, "head": 1},
        "two_readers": {"b": 1, "c": 1, "head": 2},  # the head reads both
        "grouped": {"b": 1, "head": 1},
        "tokens": {"up1": 1, "down1": 1, "up2": 1, "down2": 1, "out": 1},
        "open_features": {"b": 1, "head": 0},
    }.items(),
)
def test_readers_are_the_layers_that_read_a_group_or_come_last(name: str, expected: dict[str, int]) -> None:
    assert {r.layer.node.label: len(r.columns) for r in case_of(name).readers} == expected


@pytest.mark.parametrize("name", MODELS)
def test_readers_give_what_their_layers_give(name: str) -> None:
    case = case_of(name)
    for reader in case.readers:
        output = case.tensors({}, [reader.layer.output], 0)[reader.layer.output]
        x = case.tensors({}, [reader.layer.data], 0)[reader.layer.data]
        out = output.shape[2:] if reader.unfolding.kernel else output.shape[1:-1]
        positions = np.arange(int(np.prod(out, dtype=np.int64)))
        found = reader.unfolding.rows(x, positions, out) @ reader.weights
        np.testing.assert_allclose(found, reader.unfolding.targets(output, positions), rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- collect


@pytest.mark.parametrize("name", MODELS)
def test_collected_sums_are_those_of_the_original(name: str) -> None:
    case = case_of(name)
    found = collect(case.analysis, case.readers, case.batches, RUNTIME, Progress())
    for reader, parts in zip(case.readers, found, strict=True):
        for part, batches, weights in zip(parts, case.explicit(reader, {}), reader.weights, strict=True):
            x = np.concatenate([b[0] for b in batches])
            assert part.rows == len(x)
            scale = np.abs(part.gram).max()
            np.testing.assert_allclose(part.gram, x.T @ x, rtol=0, atol=1e-6 * scale)
            np.testing.assert_allclose(part.cross, x.T @ (x @ weights), rtol=0, atol=1e-5 * scale)
            # a quadratic form is as exact as its terms are, which cancel
            terms = np.einsum("po,pq,qo->o", np.abs(weights), np.abs(part.gram), np.abs(weights))
            assert (np.abs(part.energy - np.square(x @ weights).sum(axis=0)) <= 1e-6 * terms).all()


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_collected_sums_do_not_depend_on_the_batches(batch: int) -> None:
    one, two = case_of("residual"), Case("residual", batch)
    sums = [collect(c.analysis, c.readers, c.batches, RUNTIME, Progress()) for c in (one, two)]
    for a, b in zip(*sums, strict=True):
        np.testing.assert_allclose(a[0].gram, b[0].gram, rtol=0, atol=1e-6 * np.abs(a[0].gram).max())


@pytest.mark.parametrize("name", MODELS)
def test_pieces_give_what_the_whole_gives(name: str) -> None:
    """As many pieces as there are tensors to look at, and one."""
    case, runs = case_of(name), []
    for room in (Room(1 << 30, batch=1), Room(1 << 30, frontier=0)):
        answers = Answers(case.analysis, case.readers, (), case.batches, 0, Shelf(1 << 30))
        given = case.analysis, case.readers, case.batches, RUNTIME, Progress()
        runs.append((collect(*given, answers=answers, room=room), answers))
        assert answers.are_known
    for one, two in zip(runs[0][0], runs[1][0], strict=True):
        np.testing.assert_allclose(one[0].gram, two[0].gram, rtol=0, atol=1e-6 * np.abs(one[0].gram).max())
    for reader, batch in itertools.product(case.readers, range(len(case.batches))):
        parts = [answers.at_positions(reader, batch) for _, answers in runs]
        np.testing.assert_allclose(parts[0].output, parts[1].output, rtol=0, atol=1e-5)


def test_positions_are_drawn_where_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxprune.batches.TARGET_ROWS", 240)
    monkeypatch.setattr("onnxprune.batches.ROWS_PER_COLUMN", 1)
    case = case_of("chain")
    found = collect(case.analysis, case.readers, case.batches, RUNTIME, Progress())
    assert [s[0].rows for s in found] == [240, 240, SAMPLES]  # ten positions a sample; the head has one
    reader = case.readers[0]
    monkeypatch.setattr("onnxprune.batches.LARGEST", 14)
    parts = Batches(case.data, 7, 0)
    assert [len(p) for p in parts.parts] == [7, 7, 5, 5]
    draws = [parts.positions(reader, k, 36).tolist() for k in range(4)]
    assert draws[0] == draws[1] != draws[2] == draws[3]  # the size of the batches does not matter to them
    assert draws[0] != Batches(case.data, 7, 1).positions(reader, 0, 36).tolist()
    assert draws[0] != parts.positions(case.readers[1], 0, 36).tolist()


def test_wide_readers_get_rows_for_their_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxprune.batches.TARGET_ROWS", 1)
    case = case_of("chain")
    reader = case.readers[0]
    assert len(case.batches.positions(reader, 0, 10_000)) == -(-ROWS_PER_COLUMN * reader.width // SAMPLES)


def test_batches_hold_every_record_once() -> None:
    parts = case_of("chain").batches.parts
    assert [len(p) for p in parts] == [7, 5, 7, 5]
    assert sorted(record for part in parts for record in part) == list(range(SAMPLES))


def test_records_that_cannot_be_batched_come_one_by_one() -> None:
    g = Builder()
    model = g.model(g.conv(g.input("x", [2, 3, 4, 4]), 2))
    data = load_calibration([np.zeros((2, 3, 4, 4), np.float32)] * 3, analysed(model)[0].graph.inputs)
    assert sorted(Batches(data, 8, 0).parts) == [[0], [1], [2]]


@pytest.mark.parametrize(("room", "expected"), [(10_000, 10), (500, 1), (1 << 40, LARGEST)])
def test_the_batch_size_follows_the_memory(room: int, expected: int) -> None:
    assert batch_size(1000, room) == expected


def test_the_bytes_of_a_sample_are_those_of_its_tensors() -> None:
    case = case_of("chain")
    first = case.readers[0].layer.data
    shape = case.analysis.shapes.probes[0].shapes[first]
    assert sample_bytes(case.analysis, [first, first]) == 2 * 4 * int(np.prod(shape[1:]))


@pytest.mark.parametrize("size", [1, 5, 24, 64, 1000])
def test_no_batch_goes_across_two_draws_or_folds(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxprune.batches.LARGEST", 10)
    found = Batches(case_of("chain").data, size, 0)
    assert sorted(record for part in found.parts for record in part) == list(range(SAMPLES))
    for k, part in enumerate(found.parts):
        assert {record // 10 for record in part} == {found.draw(k)} and len(part) <= size
        assert len({record % 2 for record in part}) == 1


# ------------------------------------------------------------------------------------------------------------ sweep


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
    case = case_of("open_features")
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


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_a_part_without_rows_adds_nothing_and_nothing_is_printed(kind: type, capfd: pytest.CaptureFixture[str]) -> None:
    gram = Gram(3)
    gram.add(np.empty((0, 3), kind))
    np.testing.assert_array_equal(gram.value, np.zeros((3, 3)))
    assert capfd.readouterr() == ("", "")
