"""Budgets in time, on times that are given: no test here looks at a clock to pass or fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builder import RUNTIME, Builder, analysed
from onnx import numpy_helper
from timed import DIGITS, US, Pretended, chain, conv_time, known, residual, staircase

from onnxprune.api import prune
from onnxprune.budget import allocate
from onnxprune.chains import COPIES, copies, signature
from onnxprune.cli import main
from onnxprune.cost import Ratio, measure_ratio
from onnxprune.data import InputSpec
from onnxprune.deployed import deployed_feeds
from onnxprune.errors import InputError
from onnxprune.latency import measure_parts, measure_widths, time_cost
from onnxprune.parts import parts_of
from onnxprune.plan import Plan
from onnxprune.progress import Progress
from onnxprune.rewrite import rewrite
from onnxprune.runtime import Runtime
from onnxprune.staircase import Line, Surface, Surfaces
from onnxprune.stopwatch import Stopwatch, at_even_pace, example, robust
from onnxprune.targets import Wanted

# ------------------------------------------------------------------------------------------------------- staircases


@pytest.mark.parametrize(
    ("share", "slow", "chosen"), [(0.65, 65, 64), (1.0, 127, 128), (0.54, 63, 64), (1.0, 120, 128), (0.68, 65, 80)]
)
def test_the_cliffs(share: float, slow: int, chosen: int) -> None:
    """What lies above a step, or takes as long as a wider one, is never chosen: of 65 and 127 channels 64 and 128."""
    analysis = analysed(chain(128, 8))[0]
    cost, choices = known(analysis, lambda out, _: staircase(out) * 100 * US if out > 8 else 0.0)
    assert slow not in choices[0]
    curves = [np.linspace(1, 0, 129), np.linspace(1000, 0, 9)]
    kept = allocate(curves, cost, cost.whole * share, choices)
    assert kept.tolist() == [chosen, 8]


@pytest.mark.parametrize("edges", [(16, 32, 48), (24, 40, 100), (5, 6, 7), (120,), ()])
def test_steps_are_found_wherever_they_lie(edges: tuple[int, ...]) -> None:
    line = Line(128)

    def of(width: int) -> float:
        return 1.0 + sum(width > edge for edge in edges)

    wanted = line.first(1)
    while wanted:
        line.times |= {width: of(width) for width in wanted}
        wanted = [width for _, width in line.gaps(0.0)]
    assert all(line.levels()[w] >= of(w) for w in range(1, 129))  # never promised too much
    for edge in edges:
        near = [w for w in line.corners() if edge - 4 <= w <= edge]  # as close as a thirty-second of the width
        assert near
        assert line.levels()[near[-1]] == of(near[-1])
    assert len(line.times) < 60


def test_widths_that_win_nothing_are_not_corners() -> None:
    line = Line(64, {1: 1.0, 16: 1.0, 32: 1.01, 48: 2.0, 60: 1.99, 63: 2.9, 64: 2.0})
    assert line.corners() == [32, 64]
    assert line.levels()[63] == 2.9
    assert line.levels()[60] == 2.0
    assert line.levels()[17] == 1.01


def test_noise_makes_no_steps() -> None:
    """A width that came out 6 % too fast is none that wins, where narrower ones say so; a step beyond the doubt is."""
    times = {64: 1.0, 56: 1.01, 48: 0.94, 40: 1.02, 36: 0.99, 32: 0.6, 24: 0.61}
    line = Line(64, times, errors=dict.fromkeys(times, 0.02))
    assert line.corners() == [32, 64]
    assert line.levels()[48] == pytest.approx(0.99, abs=0.011)
    sure = Line(64, times, errors=dict.fromkeys(times, 0.001))
    assert sure.corners() == [32, 48, 64]
    assert sure.levels()[40] == 1.02


def test_what_hardly_matters_is_told_by_its_neighbours() -> None:
    line = Line(64, {1: 0.1, 16: 0.5, 32: 0.52, 64: 1.0}, noise=0.0)
    assert np.flatnonzero(line.told(0.03)).tolist() == [1, *range(16, 33), 64]
    assert line.told(1.0)[1:].all()
    assert line.corners() == [1, 16, 32, 64]
    assert line.corners(0.03) == [1, 32, 64]


def test_times_between_two_widths_are_those_of_the_wider() -> None:
    levels = Line(64, {8: 1.0, 32: 2.0, 64: 4.0}).levels()
    assert levels.tolist() == [1.0] * 9 + [2.0] * 24 + [4.0] * 32


def test_a_product_of_two_widths() -> None:
    lines = tuple(Line(8, {w: w * 8.0 for w in range(1, 9)}, noise=0) for _ in range(2))
    surface = Surface.through(lines, {(4, 4): 16.0, (2, 4): 8.0})
    assert Surfaces([surface]).at(np.array([[[4, 2]], [[8, 3]], [[1, 1]]]))[:, 0] == pytest.approx([8, 24, 1], abs=0.5)


def test_a_sum_of_two_widths() -> None:
    lines = tuple(Line(8, {w: w + 8.0 for w in range(1, 9)}, noise=0) for _ in range(2))
    surface = Surface.through(lines, {(1, 1): 2.0, (2, 1): 3.0, (1, 2): 3.0, (4, 2): 6.0})
    assert Surfaces([surface]).at(np.array([[[2, 2]], [[4, 6]]]))[:, 0] == pytest.approx([4, 10], abs=0.6)


# ------------------------------------------------------------------------------------------------------------- parts


def test_a_residual_network_in_parts() -> None:
    analysis = analysed(residual())[0]
    nodes = analysis.graph.nodes
    parts = parts_of(analysis, analysis.nominal)
    ops = [tuple(nodes[i].op for i in part.nodes) for part in parts]
    assert ops == [
        ("Conv", "Relu"),
        *[("Conv", "Relu"), ("Conv", "Add", "Relu")] * 2,
        ("MaxPool",),
        ("Flatten",),
        ("Gemm",),
    ]
    seen = [i for part in parts for i in part.nodes]
    assert len(seen) == len(set(seen))
    assert [part.full for part in parts[:3]] == [(32,), (32, 64), (32, 64)]
    assert [len(part.sides) for part in parts[:3]] == [1, 2, 2]


@pytest.mark.parametrize("share", [1.0, 0.6, 0.3])
def test_parts_run_alone_and_have_the_shapes_of_the_whole(share: float) -> None:
    analysis, merged = analysed(residual())
    counts = {g: max(round(n * share), 1) for g, n in enumerate(i.units for i in analysis.groups)}
    plan = Plan("", {analysis.groups[g].name: tuple(range(n)) for g, n in counts.items()})
    whole = onnx.shape_inference.infer_shapes(rewrite(analysis, plan, copies=merged))
    inferred = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*whole.graph.value_info, *whole.graph.output)
    }
    for part in parts_of(analysis, analysis.nominal):
        model = part.model({g: counts[g] for side in part.sides for g in side})
        (found,) = RUNTIME.session(model).run(None, example(model))
        assert list(found.shape) == inferred[part.outputs[0]]
        for timed in part.timed({g: counts[g] for side in part.sides for g in side}):
            for each in (timed.model, timed.many or timed.model):
                RUNTIME.session(each).run(None, example(each))


@pytest.mark.parametrize("width", [1, 7, 32])
def test_counts_come_to_the_width(width: int) -> None:
    analysis = analysed(residual())[0]
    for part in parts_of(analysis, analysis.nominal):
        for side in range(len(part.sides)):
            kept = np.array([g.units for g in analysis.groups])
            for group, count in part.counts(side, width).items():
                kept[group] = count
            reached = part.widths(kept)[side]
            assert reached >= width
            assert part.name != "a0" or reached == width


def test_copies_are_all_used_and_have_weights_of_their_own() -> None:
    analysis = analysed(residual())[0]
    part = next(p for p in parts_of(analysis, analysis.nominal) if p.name == "b0")
    timed = part.timed({})
    assert [t.factor for t in timed] == [1.0, -1.0]
    many = timed[0].many
    assert many is not None
    session = onnx.load_from_string(many.SerializeToString())
    convs = [node for node in session.graph.node if node.op_type == "Conv" and node.name]
    assert len(convs) == COPIES
    arrays = {t.name: numpy_helper.to_array(t) for t in many.graph.initializer}
    weights = [arrays[node.input[1]] for node in convs]
    assert not any(np.array_equal(a, b) for k, a in enumerate(weights) for b in weights[:k])
    read = {name for node in many.graph.node for name in node.input}
    made = {name for node in many.graph.node for name in node.output}
    assert made - read == {many.graph.output[0].name}


def test_inputs_come_in_the_layout_that_they_have_in_the_network() -> None:
    """A residual sum with a padded shortcut is in the layout of the file; one of two convolutions need not be."""
    g = Builder()
    x = g.Relu(g.conv(g.input("x", [1, 3, 6, 6]), 32, name="stem"))
    x = g.Relu(g.Add(g.conv(g.Relu(g.conv(x, 64, name="a0")), 32, name="b0"), x))
    y = g.conv(g.Relu(g.conv(x, 64, name="a1")), 48, name="b1")
    x = g.Relu(g.Add(y, g.Pad(x, g.const(np.array([0, 8, 0, 0, 0, 8, 0, 0])))))
    x = g.Relu(g.conv(x, 64, name="a2"))
    analysis = analysed(g.model(g.gemm(g.Flatten(g.GlobalAveragePool(x)), 4)))[0]
    parts = {p.name: p for p in parts_of(analysis, analysis.nominal)}
    assert [parts[name].inputs[:1] == tuple(parts[name].blocked) for name in ("a0", "a1", "a2")] == [True, True, False]
    assert [len(parts[name].blocked) for name in ("b0", "b1", "stem")] == [2, 1, 0]
    many = parts["a2"].timed({})[0].many
    assert many is not None
    assert len(many.graph.input) == COPIES  # none is brought into another layout once for all copies


def test_what_a_further_copy_costs_is_the_part() -> None:
    analysis = analysed(residual())[0]
    for part in parts_of(analysis, analysis.nominal):
        if part.is_layer and part.name != "gemm":
            total = sum(
                t.seconds(*(1 * US + conv_time(m, lambda o, i: o * i * US) for m in (t.model, t.many or t.model)))
                for t in part.timed({})
                if t.many is not None
            )
            assert total == pytest.approx(conv_time(part.model({}), lambda o, i: o * i * US))


def small(scale: float = 1.0, prefix: str = "", width: int = 4, stride: int = 1) -> onnx.ModelProto:
    g = Builder()
    y = g.Conv(
        g.input(f"{prefix}x", [1, 3, 6, 6]),
        g.const(np.full((width, 3, 3, 3), scale), f"{prefix}w"),
        strides=[stride] * 2,
    )
    return g.model(g.Relu(y))


def test_a_signature_is_of_the_structure() -> None:
    same = {signature(small()), signature(small(2.0)), signature(small(prefix="other"))}
    other = {signature(small(width=5)), signature(small(stride=2)), signature(copies(small(), 2))}
    assert len(same) == 1
    assert len(other) == 3
    assert not same & other


# --------------------------------------------------------------------------------------------------------- stopwatch


def test_measured_once_and_remembered(tmp_path: Path) -> None:
    models = {signature(m): m for m in (small(), small(width=8))}
    cache = tmp_path / "deep" / "times.sqlite"
    first = Stopwatch(Runtime("cpu", 1), cache)
    times = first.times(models)
    assert (first.measured, first.remembered) == (2, 0)
    assert all(each.seconds > each.error > 0 for each in times.values())
    again = Stopwatch(Runtime("cpu", 1), cache)
    assert again.times(models) == times
    assert (again.measured, again.remembered) == (0, 2)
    other = Stopwatch(Runtime("cpu", 2), cache)  # another number of threads, another table
    other.times(models)
    assert other.measured == 2


def test_the_whole_is_measured_once(tmp_path: Path) -> None:
    """How exactly its parts have to be known follows from it: another time would ask for other parts."""
    watch = Stopwatch(Runtime("cpu", 1), tmp_path / "times.sqlite")
    assert [watch.once(key, lambda s=s: s) for key, s in (("a", 2.0), ("a", 3.0), ("b", 4.0))] == [2.0, 2.0, 4.0]
    assert Stopwatch(Runtime("cpu", 1), tmp_path / "times.sqlite").once("a", lambda: 5.0) == 2.0
    assert Stopwatch(Runtime("cpu", 2), tmp_path / "times.sqlite").once("a", lambda: 6.0) == 6.0


def test_what_was_measured_roughly_is_measured_again_where_it_matters(tmp_path: Path) -> None:
    models = {"a": small(), "b": small(width=8)}
    cache = tmp_path / "times.sqlite"
    for enough, measured in ((1.0, 2), (1.0, 0), (2.0, 0), (0.1, 2), (0.0, 2), (0.1, 0), (1.0, 0)):
        watch = Stopwatch(Runtime("cpu", 1), cache)
        watch.times(models, dict.fromkeys(models, enough))
        assert (watch.measured, watch.remembered) == (measured, 2 - measured)


def test_a_damaged_cache_costs_time_and_nothing_else(tmp_path: Path) -> None:
    cache = tmp_path / "times.sqlite"
    cache.write_bytes(b"not a database" * 100)
    watch = Stopwatch(Runtime("cpu", 1), cache)
    assert len(watch.times({"a": small()})) == 1
    assert cache.read_bytes().startswith(b"not a database")


def test_what_cannot_run_alone_has_no_time() -> None:
    broken = small()
    broken.graph.node[0].input[0] = "nowhere"
    assert list(Stopwatch(Runtime("cpu", 1)).times({"broken": broken, "sound": small()})) == ["sound"]


def test_outliers_are_dropped() -> None:
    quiet = [1.0, 1.01, 0.99, 1.0, 1.02, 0.98, 1.0]
    columns = np.log([[*quiet, 40.0, 30.0], [*quiet, np.nan, np.nan]]).T
    middle, error = robust(columns)
    assert middle == pytest.approx(0.0, abs=0.01)
    assert (error >= 0.01).all()
    assert (error < 0.02).all()


def test_a_pace_that_drifts_is_taken_out() -> None:
    """Models of 1 to 8 us in any order, while the machine becomes slower by half, by jumps and by drift."""
    rng = np.random.default_rng(0)
    which = np.concatenate([rng.permutation(8) for _ in range(9)])
    pace = np.exp(np.where(np.arange(len(which)) > 20, 0.3, 0.0) + np.linspace(0, 0.2, len(which)))
    even = at_even_pace((1 + which) * pace * np.exp(0.01 * rng.standard_normal(len(which))), which, 8)
    middle, error = robust(even)
    assert middle - middle[0] == pytest.approx(np.log(np.arange(1, 9)), abs=0.03)
    assert (error < 0.02).all()


def test_a_ratio_lies_in_its_interval() -> None:
    model = small()
    found = measure_ratio(model, model, example(model), RUNTIME, seconds=0.05)
    assert 0 < found.low <= found.ratio <= found.high
    assert found.rounds >= 20
    assert found.clock == ("thread" if RUNTIME.computes_alone else "wall")


def test_an_interval_is_of_the_starts() -> None:
    """Student's, on logarithms: of 1 and 4 the mean is 2, and two starts say little."""
    two = Ratio.of([1.0, 4.0], 1e-3, 10, "wall")
    assert two.ratio == pytest.approx(2)
    assert two.high == pytest.approx(2 * 2**12.7062, rel=1e-4)
    assert two.low * two.high == pytest.approx(4)
    both = Ratio.of([2.0, 2.1, 1.9], 1e-3, 30, "wall") + Ratio.of([2.0, 2.05, 1.95], 2e-3, 10, "wall")
    assert both.starts == (2.0, 2.1, 1.9, 2.0, 2.05, 1.95)
    assert (both.rounds, both.seconds) == (40, pytest.approx(1.25e-3))
    assert both.high - both.low < 0.2


def test_before_a_turn_workers_wake_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the model before go to sleep, and the model's own are woken; not where that makes no difference."""
    slept: list[float] = []
    monkeypatch.setattr("onnxprune.runtime.time.sleep", slept.append)
    runs: list[int] = []
    for threads, seconds, expected in ((1, 1e-4, False), (2, 1e-4, True), (2, np.nan, True), (2, 0.5, False)):
        slept.clear()
        runs.clear()
        Runtime("cpu", threads).take_turn(lambda: runs.append(1), seconds)
        assert (bool(slept), bool(runs)) == (threads > 1, expected)


# ---------------------------------------------------------------------------------------------------------- cost model


def test_every_unit_of_time_is_kept_to() -> None:
    analysis = analysed(residual())[0]
    cost, choices = known(analysis, lambda out, inner: -(-out // 16) * inner * US)
    units = np.array([g.units for g in analysis.groups])
    assert cost.total(units) == pytest.approx(cost.whole)
    for share in (0.8, 0.5, 0.3):
        kept = allocate([np.linspace(1, 0, n + 1) for n in units], cost, cost.whole * share, choices)
        assert cost.total(kept) <= cost.whole * share
        assert all(k in c for k, c in zip(kept, choices, strict=True))


def test_along_a_group_is_one_by_one() -> None:
    analysis = analysed(residual())[0]
    cost, _ = known(analysis, lambda out, inner: -(-out // 16) * inner * US)
    units = np.array([g.units for g in analysis.groups])
    kept = np.random.default_rng(1).integers(1, units + 1)
    for group, n in enumerate(units):
        moved = [cost.total(np.where(np.arange(len(units)) == group, c, kept)) for c in range(1, n + 1)]
        np.testing.assert_allclose(cost.along(kept, group, np.arange(1, n + 1)), moved, rtol=1e-12)


def test_alike_layers_are_measured_once() -> None:
    analysis = analysed(residual())[0]
    watch = Pretended(lambda out, inner: out * inner * US)
    kinds = measure_parts(analysis, analysis.nominal, watch, Progress(), 1e-3)  # type: ignore[arg-type]
    assert sorted(len(kind.parts) for kind in kinds) == [1, 1, 1, 1, 2, 2]


def test_sums_of_widths_are_measured_before_they_are_believed() -> None:
    """Two groups meet on a side; a width that only a sum of theirs gives, and that runs slowly, was not tried."""
    g = Builder()
    x = g.input("x", [1, 3, 6, 6])
    both = g.Concat(*(g.Relu(g.conv(x, 32, name=f"a{k}")) for k in range(2)), axis=1)
    analysis = analysed(g.model(g.gemm(g.Flatten(g.GlobalAveragePool(g.Relu(g.conv(both, 8, name="b")))), 4)))[0]
    watch: Any = Pretended(lambda out, inner: out * inner * US * (5 if inner % 2 and inner > 8 else 1))
    whole = 1000 * US
    kinds = measure_parts(analysis, analysis.nominal, watch, Progress(), whole)
    kept = np.array([9 if info.units == 32 else 8 for info in analysis.groups])
    kept[np.argmax(kept == 9)] = 28
    believed = time_cost(analysis, kinds, whole)
    assert measure_widths(kinds, kept, watch)
    assert not measure_widths(kinds, kept, watch)
    assert time_cost(analysis, kinds, whole).won(kept) < believed.won(kept) - 8 * 37 * US


def test_widths_between_the_steps_are_no_choice() -> None:
    analysis = analysed(chain(64, 64, 8))[0]
    _, choices = known(analysis, lambda out, _: -(-out // 16) * 100 * US)
    assert choices[0].tolist() == choices[1].tolist() == [16, 32, 48, 64]
    _, choices = known(analysis, lambda out, inner: inner * 1 * US)
    assert len(choices[0]) > 12


# ----------------------------------------------------------------------------------------------------- deployed sizes

SPECS = (InputSpec("x", (None, 3, None, None), np.dtype(np.float32)), InputSpec("n", (None,), np.dtype(np.int64)))
SAMPLE = {"x": np.ones((1, 3, 8, 8), np.float32), "n": np.array([7])}


def test_deployed_sizes() -> None:
    feeds = deployed_feeds(SPECS, SAMPLE, {"x": (2, 3, 4, 6)}, 5)
    assert feeds["x"].shape == (2, 3, 4, 6)
    assert feeds["n"].tolist() == [7] * 5
    assert (deployed_feeds(SPECS, SAMPLE, batch=4)["x"] == np.ones((4, 3, 8, 8))).all()
    assert deployed_feeds(SPECS, SAMPLE)["x"].shape == (1, 3, 8, 8)


@pytest.mark.parametrize(
    ("shapes", "batch", "text"),
    [
        ({"y": (1, 3, 4, 4)}, None, "--shape names an input 'y'; the model's inputs are n, x"),
        ({"x": (1, 4, 4, 4)}, None, r"--shape: input 'x' takes \[N, 3, \?, \?\], found \[1, 4, 4, 4\]"),
        ({"x": (1, 3, 4)}, None, "--shape: input 'x' takes"),
        (None, 0, "expected a batch of at least 1, found 0"),
    ],
)
def test_sizes_that_do_not_fit(shapes: dict[str, tuple[int, ...]] | None, batch: int | None, text: str) -> None:
    with pytest.raises(InputError, match=text):
        deployed_feeds(SPECS, SAMPLE, shapes, batch)


def test_a_fixed_batch_stays() -> None:
    with pytest.raises(InputError, match="no input of the model leaves its first axis open"):
        deployed_feeds([InputSpec("x", (1, 3), np.dtype(np.float32))], {"x": np.ones((1, 3), np.float32)}, batch=2)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--shape", "input"], "expected a name and sizes such as input:1,3,224,224"),
        (["--shape", "input:1,0"], "expected a name and sizes"),
        (["--round-to", "many"], "expected a number of at least 1 or auto"),
        (["--round-to", "auto"], "takes the number from --target"),
        (["--target", "abacus"], "unknown target 'abacus'; expected one of cpu-avx2, cpu-avx512"),
        (["--batch", "0"], "--batch"),
        (["--max-params", "few"], "expected a number above 0 such as 5M, found 'few'"),
        (["--by", "watts"], "--by"),
    ],
)
def test_options_that_make_no_sense(options: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(DIGITS), *options]) == 2
    assert text in capsys.readouterr().err


def test_widths_of_a_target() -> None:
    report = prune(DIGITS, speedup=1.5, target="cpu-avx2", samples=40, threads=1, reconstruct=False, select="l1").report
    assert report.options["multiple"] == 8
    assert all(g.kept % 8 == 0 or g.kept == g.units for g in report.groups)
    assert Wanted(1.5).by == "macs"
