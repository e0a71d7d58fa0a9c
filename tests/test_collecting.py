"""The readers, and the sums that are collected of the original, against the network run as a whole."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from builder import RUNTIME
from cases import MODELS, SAMPLES, Case, case_of

from onnxprune.answers import Answers
from onnxprune.batches import ROWS_PER_COLUMN, Batches
from onnxprune.collecting import collect
from onnxprune.memory import Room
from onnxprune.progress import Progress
from onnxprune.shelf import Shelf


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
