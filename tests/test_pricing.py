"""Which widths damage is measured at: few at first, and the narrowest where a group gets that narrow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from builder import Builder

from onnxprune.api import collect, prune_family
from onnxprune.finish import aim
from onnxprune.journal import Journal
from onnxprune.pipeline import Chooser
from onnxprune.prepare import prepare
from onnxprune.progress import Progress
from onnxprune.settings import Settings
from onnxprune.targets import Wanted

X = np.random.default_rng(0).standard_normal((40, 3, 8, 8)).astype(np.float32)
UNITS = 20
WIDE, NARROW = 8, 2  # of these, at the levels of a run that is neither quick nor thorough


def network() -> onnx.ModelProto:
    """A chain of layers."""
    g = Builder(seed=3)
    x = g.Relu(g.conv(g.input("x", ["n", 3, 8, 8]), UNITS, name="a"))
    for k in range(4):
        x = g.Relu(g.conv(x, UNITS, name=f"b{k}"))
    return g.model(g.Flatten(g.GlobalAveragePool(g.conv(x, 4, name="c"))))


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """Of every measurement the kept counts by group."""
    found: list[list[list[int]]] = []
    measured = Chooser.measured_damage

    def noted(chooser: Chooser, counts: Sequence[Sequence[int]]) -> list[list[float]]:
        found.append([list(each) for each in counts])
        return measured(chooser, counts)

    monkeypatch.setattr(Chooser, "measured_damage", noted)
    return found


def counts(speedup: float) -> np.ndarray:
    """Kept counts, as they are shared out."""
    prepared = prepare(network(), Settings(data=X, threads=1, samplers=False), Progress())
    goal, chooser = aim(prepared, Wanted(speedup, "macs", {})), prepared.chooser
    with chooser.at_work(sweeping=False):
        prepared.gather()
        return goal.counts(chooser)


def test_narrow_widths_are_looked_at_where_groups_get_that_narrow(looks: list[list[list[int]]]) -> None:
    kept = counts(1.2)
    assert kept.min() >= WIDE
    assert looks == [[[WIDE]] * len(kept)]
    looks.clear()
    kept = counts(5.0)
    first, *others = looks
    assert first == [[WIDE]] * len(kept)
    times = [sum(each[g] == [NARROW] for each in others) for g in range(len(kept))]
    assert sum(map(len, (each for look in others for each in look))) == sum(times)  # nothing else
    assert all(many == 1 for many, count in zip(times, kept, strict=True) if count < WIDE)
    assert 0 in times and 1 in times


def test_a_member_of_a_family_does_not_use_what_others_asked_for(looks: list[list[list[int]]]) -> None:
    given = {"data": X, "threads": 1, "samplers": False, "quick": True}
    alone, together = prune_family(network(), [3.5], **given), prune_family(network(), [12.0, 3.5], **given)
    assert any(NARROW in each for look in looks for each in look)
    assert together[1].plan == alone[0].plan


def test_those_who_keep_statistics_look_at_every_width(looks: list[list[list[int]]]) -> None:
    found = collect(network(), data=X, threads=1, samplers=False)
    assert looks == [[[NARROW, WIDE]] * len(found.damage)]
    assert all(each.levels == (NARROW, WIDE) for each in found.damage.values())


def test_what_was_measured_is_in_the_journal(
    looks: list[list[list[int]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"data": X, "threads": 1, "samplers": False, "quick": True}
    first = prune_family(network(), [4.0, 6.0], journal=Journal(tmp_path), **given)
    assert len(looks) > 1
    monkeypatch.delattr(Chooser, "measured_damage")
    again = prune_family(network(), [4.0, 6.0], journal=Journal(tmp_path, resume=True), **given)
    assert [each.plan for each in again] == [each.plan for each in first]
