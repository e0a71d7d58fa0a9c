"""A block without the channels that are gone gives what the whole block gives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from builder import Builder
from test_joint import CASES, Case, grouped, plain

from onnxprune.compact import Compact, _used, compact
from onnxprune.descent import fit_block
from onnxprune.joint import Linear, Part, look


def silenced(case: Case, every: int = 3) -> list[Part]:
    """The block's layers, every third channel in between and in front gone."""
    block, parts = case.block, list(case.parts)
    for k, part in enumerate(parts):
        channels = len(_used(part))
        if k < len(block.inner) and not all(a.layer.data == block.inner[0].layer.data for a in block.inner):
            continue
        gone = np.arange(channels) % every == 1
        rows = part.unfolding.columns(np.flatnonzero(gone)[:, None]).ravel()
        weights, free = part.weights.copy(), part.free.copy()
        weights[:, rows], free[:, rows] = 0.0, False
        if k < len(block.inner):
            place = block.inner[k].start + np.arange(block.inner[k].channels)
            free[:, :, place % every == 1] = False
        parts[k] = Part(part.layer, part.unfolding, weights, free)
    return parts


def made(case: Case, parts: list[Part]) -> Compact:
    found = compact(case.net, parts, case.data)
    assert found is not None
    return found


def mapped(small: Compact, case: Case, parts: list[Part]) -> tuple[Linear, Linear]:
    scales = [1.0 + k for k in range(len(case.block.outer))]
    whole = look(case.net, [p.weights for p in parts], case.data, scales)
    cut_data = small.data(case.data)
    cut = look(small.net, [p.weights for p in small.parts], cut_data, scales)
    assert cut.loss == pytest.approx(whole.loss, rel=1e-5)
    return (
        Linear(case.net, parts, case.data, scales, whole),
        Linear(small.net, small.parts, cut_data, scales, cut),
    )


UNGROUPED = [(make, k) for make, k in CASES if make is not grouped]


@pytest.mark.parametrize(("make", "k"), UNGROUPED, ids=lambda v: getattr(v, "__name__", str(v)))
def test_the_small_block_gives_what_the_whole_gives(make: Callable[[Builder], str], k: int) -> None:
    case = Case(make, k)
    parts = silenced(case)
    small = made(case, parts)
    assert sum(p.weights.size for p in small.parts) < 0.9 * sum(p.weights.size for p in parts)
    one = case.net.run(case.data, [p.weights for p in parts])[2]
    two = small.net.run(small.data(case.data), [p.weights for p in small.parts])[2]
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("make", "k"), UNGROUPED, ids=lambda v: getattr(v, "__name__", str(v)))
def test_the_small_map_is_the_whole_one_on_what_is_left(make: Callable[[Builder], str], k: int) -> None:
    case = Case(make, k)
    parts = silenced(case)
    small = made(case, parts)
    whole, cut = mapped(small, case, parts)
    # near a kink the slope depends on the step, and that on all channels
    cut.slopes = [np.take(s, c, axis=case.block.axis) for s, (_, c) in zip(whole.slopes, small.places, strict=False)]
    rng = np.random.default_rng(1)
    change = [rng.standard_normal(p.weights.shape) * p.free for p in small.parts]
    spread = small.whole([Part(p.layer, p.unfolding, 0 * p.weights, p.free) for p in parts], change)
    for a, b in zip(whole.forward(spread), cut.forward(change), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-3 * np.abs(a).max())
    missing = [rng.standard_normal(m.shape).astype(np.float32) for m in whole.state.missing]
    for a, b, (rows, columns) in zip(whole.backward(missing), cut.backward(missing), small.places, strict=True):
        wanted = a[0][np.ix_(rows, columns)]
        np.testing.assert_allclose(b[0], wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())


def test_what_is_gone_stays_as_it_was() -> None:
    case = Case(plain, 1, 40)
    parts = silenced(case)
    small = made(case, parts)
    cut_data = small.data(case.data)
    found = fit_block(small.net, small.parts, cut_data.take(np.arange(30)), cut_data.take(np.arange(30, 40)))
    assert found is not None
    for part, new in zip(parts, small.whole(parts, found), strict=True):
        assert new.shape == part.weights.shape
        assert (new[~part.free] == part.weights[~part.free]).all()
        assert (new[part.free] != part.weights[part.free]).any()


@pytest.mark.parametrize(("make", "k"), CASES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_nothing_is_taken_out_where_nothing_is_gone(make: Callable[[Builder], str], k: int) -> None:
    case = Case(make, k)
    assert compact(case.net, case.parts, case.data) is None
