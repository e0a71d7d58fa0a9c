"""Budgets in parameters and bytes, several limits at once, widths of a multiple: counted on rewritten models."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from builder import Builder, analysed
from test_budget import MODELS, convex, error, plan_of, prepared, units_of

from onnxprune.analysis import Analysis
from onnxprune.api import prune
from onnxprune.budget import allocate, allocate_within, every_count
from onnxprune.cost import params
from onnxprune.costs import Cost, CostModel, PeakMemory, Several, parameters
from onnxprune.counting import count_model_macs, count_peak_memory
from onnxprune.errors import InputError, UnreachableTarget
from onnxprune.rewrite import rewrite
from onnxprune.targets import Limit, Wanted, counted_costs, limits, rounded_down, widths

DIGITS = Path(__file__).parent.parent / "models" / "digits_resnet.onnx"


COUNTED = [
    (lambda analysis, _: CostModel(analysis), count_model_macs),
    (parameters, params),
    (lambda analysis, _: PeakMemory(analysis), count_peak_memory),
]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", range(4))
def test_any_kept_counts_cost_what_is_counted_on_the_rewritten_model(name: str, seed: int) -> None:
    analysis, copies = prepared(name)
    counts = np.random.default_rng(seed).integers(1, units_of(analysis) + 1)
    new = rewrite(analysis, plan_of(analysis, counts, seed), copies=copies)
    for make, counted in COUNTED:
        assert make(analysis, copies).total(counts) == counted(new)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("make", [CostModel, parameters, PeakMemory])
def test_along_a_group_is_one_by_one(name: str, make: Callable[[Analysis], Cost]) -> None:
    analysis = prepared(name)[0]
    cost, units = make(analysis), units_of(analysis)
    kept = np.random.default_rng(1).integers(1, units + 1)
    for group, size in enumerate(units):
        candidates = np.arange(1, size + 1)
        moved = [cost.total(np.where(np.arange(len(units)) == group, c, kept)) for c in candidates]
        np.testing.assert_allclose(cost.along(kept, group, candidates), moved, rtol=1e-12)
        assert (cost.pressure(kept, group, candidates) >= np.array(moved) * (1 - 1e-12)).all()


def test_a_known_peak() -> None:
    g = Builder()
    x = g.input("x", [1, 3, 8, 8])
    y = g.conv(x, 4)  # while it runs: 3 + 4 channels
    z = g.conv(y, 6)  # 4 + 6, and 3 of the input, which the sum still reads
    model = g.model(g.Add(g.conv(z, 3), x))
    analysis = analysed(model)[0]
    assert count_peak_memory(model) == (3 + 4 + 6) * 64 * 4
    assert PeakMemory(analysis).total(np.array([4, 2])) == (3 + 4 + 2) * 64 * 4


def test_half_floats_take_two_bytes() -> None:
    g = Builder()
    x = g.input("x", [1, 3, 8, 8], onnx.TensorProto.FLOAT16)
    assert count_peak_memory(g.model(g.Relu(x))) == 2 * 3 * 64 * 2


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("by", ["params", "memory"])
@pytest.mark.parametrize("share", [0.6, 0.8, 1.0])
def test_every_unit_of_the_budget_is_kept_to(name: str, by: str, share: float) -> None:
    analysis, copies = prepared(name)
    cost, units, rng = counted_costs(analysis, {by}, copies)[by], units_of(analysis), np.random.default_rng(2)
    limit = max(cost.total(units) * share, cost.total(np.ones(len(units))))
    kept = allocate([convex(n, rng) for n in units], cost, limit)
    assert cost.total(kept) <= limit
    if share == 1.0:
        assert kept.tolist() == units.tolist()
    wider = [cost.total(kept + np.eye(len(units), dtype=int)[g]) for g in np.flatnonzero(kept < units)]
    assert all(total > limit for total in wider)


def test_memory_is_taken_only_where_the_peak_is() -> None:
    g = Builder()
    x = g.Relu(g.conv(g.input("x", [1, 3, 16, 16]), 8))
    x = g.MaxPool(x, kernel_shape=[4, 4], strides=[4, 4])
    analysis = analysed(g.model(g.conv(g.Relu(g.conv(x, 8)), 8)))[0]
    cost = PeakMemory(analysis)
    curves = [np.linspace(1, 0, 9), np.linspace(1, 0, 9)]
    kept = allocate(curves, cost, cost.total(np.array([8, 8])) / 2)
    assert kept.tolist() == [4, 8]


@pytest.mark.parametrize("shares", list(itertools.product([0.5, 0.8, 1.0], repeat=2)))
def test_several_limits_are_all_met_at_little_more_than_the_least_error(shares: tuple[float, float]) -> None:
    analysis, copies = prepared("vgg")
    units, rng = units_of(analysis), np.random.default_rng(5)
    curves = [convex(n, rng) for n in units]
    costs = list(counted_costs(analysis, ["macs", "params"], copies).values())
    most = [cost.total(units) * share for cost, share in zip(costs, shares, strict=True)]
    kept = allocate_within(curves, costs, most)
    assert all(cost.total(kept) <= limit for cost, limit in zip(costs, most, strict=True))
    every = (np.array(k) for k in itertools.product(*every_count(units)))
    best = min(error(curves, k) for k in every if Several(costs, most, [1, 1]).total(k) <= 1)
    assert best <= error(curves, kept) <= best + 0.35 * max(float(c[0]) for c in curves)


def test_widths_of_a_multiple_or_the_whole_group() -> None:
    g = Builder()
    x = g.conv(g.input("x", [1, 3, 4, 4]), 20)
    x = g.conv(g.conv(g.Relu(x), 6), 16)
    analysis = analysed(g.model(g.gemm(g.Flatten(x), 4)))[0]
    assert [w.tolist() for w in widths(analysis, 8)] == [[8, 16, 20], [6], [8, 16]]
    assert [len(w) for w in widths(analysis)] == [20, 6, 16]


def test_widths_of_a_recurrence_in_both_directions() -> None:
    """Its own width counts, too, and not only that of both together."""
    g = Builder()
    y, _ = g.GRU(
        g.input("x", [5, 1, 6]),
        g.weight(2, 48, 6),
        g.weight(2, 48, 16),
        outputs=2,
        hidden_size=16,
        direction="bidirectional",
    )
    y = g.Reshape(g.Transpose(y, perm=[0, 2, 1, 3]), g.const([5, 1, 32]))
    assert [w.tolist() for w in widths(analysed(g.model(g.linear(y, 4)))[0], 8)] == [[8, 16]]


def test_widths_of_heads_with_quantised_weights() -> None:
    """Channels are counted, and not the units of four that stand or fall together."""
    g = Builder()

    def linear(x: str) -> str:
        weight = g.const(g.rng.integers(-90, 90, (32, 32)), dtype=np.int8)
        return g.MatMul(x, g.DequantizeLinear(weight, g.const(0.01), g.const(0, dtype=np.int8)))

    x = g.input("x", [1, 6, 32])
    q, k, v = (g.Reshape(linear(x), g.const([1, 6, 4, 8])) for _ in range(3))
    scores = g.MatMul(g.Transpose(q, perm=[0, 2, 1, 3]), g.Transpose(k, perm=[0, 2, 3, 1]))
    y = g.MatMul(g.Softmax(scores), g.Transpose(v, perm=[0, 2, 1, 3]))
    y = g.Reshape(g.Transpose(y, perm=[0, 2, 1, 3]), g.const([1, 6, 32]))
    assert [w.tolist() for w in widths(analysed(g.model(linear(y)))[0], 8)] == [[2, 4, 6, 8]] * 2


@pytest.mark.parametrize("number", [1.0, 1.0049, 2.0, 2.9, 9.9999, 75.896, 123456.7, 1 / 0.35])
def test_what_is_said_to_be_reachable_is(number: float) -> None:
    assert 0.99 * number < float(rounded_down(number)) <= number


def test_a_limit_that_cannot_be_met_says_the_least() -> None:
    analysis, copies = prepared("vgg")
    costs = counted_costs(analysis, ["macs", "params"], copies)
    before = {name: cost.total(units_of(analysis)) for name, cost in costs.items()}
    wanted = Wanted(1.5, "macs", {"params": 10})
    fewest = r"at most 10 parameters cannot be reached; the fewest for this model are (\d+)"
    with pytest.raises(UnreachableTarget, match=fewest) as caught:
        limits(analysis, wanted, costs, before, widths(analysis), False)
    said = re.findall(fewest, str(caught.value))
    limits(analysis, Wanted(1.5, "macs", {"params": float(said[0])}), costs, before, widths(analysis), False)
    found: list[Limit] = limits(analysis, wanted, costs, before, widths(analysis), True)
    assert [limit.name for limit in found] == ["macs", "params"]
    assert found[1].limit == costs["params"].total(np.ones(len(analysis.groups)))
    with pytest.raises(UnreachableTarget, match="a speed-up of 900 in parameters cannot be reached"):
        limits(analysis, Wanted(900, "params"), costs, before, widths(analysis), False)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"by": "watts"}, "unknown unit 'watts' of the budget; expected one of macs, params, memory"),
        ({"max_params": 0}, "expected a number above 0 for --max-params, found 0"),
        ({"speedup": 1}, "expected a speed-up above 1"),
    ],
)
def test_wrong_wishes(options: dict[str, object], text: str) -> None:
    with pytest.raises(InputError, match=text):
        prune(DIGITS, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("by", ["params", "memory"])
def test_the_ratio_is_counted_on_the_written_model(by: str) -> None:
    result = prune(DIGITS, speedup=1.8, by=by, samples=40, threads=1)
    before, after = (onnx.load(DIGITS), result.model)
    count = params if by == "params" else count_peak_memory
    assert 1.8 <= count(before) / count(after) <= 1.9
    assert result.report.achieved.of_unit(by) == count(before) / count(after)


def test_two_limits_on_the_written_model() -> None:
    most = params(onnx.load(DIGITS)) / 3
    report = prune(DIGITS, speedup=1.5, max_params=most, samples=40, threads=1).report
    assert report.after.params <= most
    assert report.achieved.macs >= 1.5
    assert report.limits == {"params": most}
    assert not [text for text in report.warnings if "asked for" in text]


def test_the_cost_model_is_linear_in_its_terms() -> None:
    analysis = prepared("dense")[0]
    counts, terms = units_of(analysis) - 1, [(t.coefficient, t.axes) for t in analysis.terms]
    halves = terms[::2], terms[1::2]
    assert CostModel(analysis).total(counts) == sum(CostModel(analysis, half).total(counts) for half in halves)
