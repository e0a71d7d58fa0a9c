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
    """Two layers behind the first one, and the second of them hardly matters."""
    g = Builder(seed=2)
    x = g.Relu(g.conv(g.input("x", ["n", 3, 8, 8]), UNITS, name="a"))
    small = g.Mul(g.Relu(g.conv(x, UNITS, name="b")), g.const(np.float32(1e-3)))
    y = g.Add(g.conv(x, 4, name="c"), g.conv(small, 4, name="d"))
    return g.model(g.Flatten(g.GlobalAveragePool(y)))


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
    kept = counts(4.0)
    first, *others = looks
    assert first == [[WIDE]] * len(kept)
    assert others
    asked = {g for look in others for g, each in enumerate(look) if each}
    assert all(each in ([], [NARROW]) for look in others for each in look)
    assert {g for g, count in enumerate(kept) if count < WIDE} <= asked
    assert len(looks) == 1 + len({str(look) for look in others})  # and none of them twice


def test_a_member_of_a_family_does_not_use_what_others_asked_for(looks: list[list[list[int]]]) -> None:
    given = {"data": X, "threads": 1, "samplers": False, "quick": True}
    alone, together = prune_family(network(), [1.2], **given), prune_family(network(), [6.0, 1.2], **given)
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
