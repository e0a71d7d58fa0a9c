"""What goes together: batches, draws and folds."""

from __future__ import annotations

import numpy as np
import pytest
from builder import Builder, analysed
from cases import SAMPLES, case_of

from onnxprune.batches import LARGEST, Batches, batch_size, sample_bytes
from onnxprune.data import load_calibration


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
