"""Normalised axes that may shrink where it is allowed: what stays exact, what is told, and what is still refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from builder import RUNTIME, Builder, analysed, random_plan, run
from law import Call, take

from onnxprune import InternalError
from onnxprune.api import analyze, prune
from onnxprune.cli import main
from onnxprune.plan import approximate_nodes
from onnxprune.report import Report
from onnxprune.rewrite import rewrite
from onnxprune.rules.base import Kept, row_for
from onnxprune.verify import prove, silence

WIDTH = 24
Norm = Callable[[Builder, str], str]


def fused(g: Builder, x: str) -> str:
    return g.LayerNormalization(x, g.weight(WIDTH), g.weight(WIDTH), axis=-1, epsilon=1e-4)


def by_parts(g: Builder, x: str) -> str:
    """As exporters decompose it."""
    centred = g.Sub(x, g.ReduceMean(x, axes=[-1], keepdims=1))
    variance = g.ReduceMean(g.Pow(centred, g.const(2.0)), axes=[-1], keepdims=1)
    unit = g.Div(centred, g.Sqrt(g.Add(variance, g.const(1e-5))))
    return g.Add(g.Mul(unit, g.weight(WIDTH)), g.weight(WIDTH))


def one_group(g: Builder, x: str) -> str:
    """GroupNormalization as it is exported."""
    flat = g.Reshape(x, g.const([0, 1, -1]))
    ones = g.Constant(value=onnx.numpy_helper.from_array(np.ones(1, np.float32)))
    unit = g.InstanceNormalization(flat, ones, g.const(np.zeros(1)), epsilon=1e-5)
    return g.Add(g.Mul(g.Reshape(unit, g.Shape(x)), g.weight(WIDTH)), g.weight(WIDTH))


def root_mean_square(g: Builder, x: str) -> str:
    return g.RMSNormalization(x, g.weight(WIDTH), axis=-1, epsilon=1e-5)


NORMS: dict[str, Norm] = {
    "fused": fused,
    "by parts": by_parts,
    "one group": one_group,
    "root mean square": root_mean_square,
}


def stream(norm: Norm, batch: int | str = 2) -> onnx.ModelProto:
    """A residual stream as wide as a transformer's hidden width, with a feed-forward block that reads its norm."""
    g = Builder(opset=23 if norm is root_mean_square else 17)
    x = g.linear(g.input("x", [batch, 5, 7]), WIDTH, "embed")
    wide = g.Relu(g.linear(norm(g, x), 32, "up"))
    x = g.Add(x, g.linear(wide, WIDTH, "down"))
    return g.model(g.linear(norm(g, x), 3, "head"))


@pytest.mark.parametrize("name", NORMS)
def test_it_stays_frozen_unless_it_is_allowed(name: str) -> None:
    model = stream(NORMS[name])
    exact = analysed(model)[0]
    assert [g.units for g in exact.groups] == [32]
    held = [f for f in exact.frozen if f.op.endswith("Normalization") or f.op == "ReduceMean"]
    assert held
    assert all("--approximate" in f.remedy for f in held)
    loose = analysed(model, approximate=True)[0]
    assert sorted(g.units for g in loose.groups) == [WIDTH, 32]
    assert loose.prunable_macs == 1
    assert analyze(model, approximate=True).reachable > analyze(model).reachable


@pytest.mark.parametrize("batch", [2, "batch"])
@pytest.mark.parametrize("name", NORMS)
def test_everything_but_the_statistics_is_exact(name: str, batch: int | str) -> None:
    analysis, copies = analysed(stream(NORMS[name], batch), approximate=True)
    plan = random_plan(analysis)
    cut = rewrite(analysis, plan, copies=copies)
    proof = prove(analysis, plan, cut, [p.feeds for p in analysis.shapes.probes], RUNTIME)
    assert proof.max_relative_difference < 1e-5
    assert "statistic of fewer channels" in proof.inputs
    assert len(approximate_nodes(analysis, plan)) >= 2
    # the channels that went are taken for zeros: the silenced original, but for what their mean adds to the variance
    feeds = analysis.shapes.probes[0].feeds
    (expected,), (got,) = run(silence(analysis, plan), feeds), run(cut, feeds)
    error = np.linalg.norm(expected - got) / np.linalg.norm(expected)
    assert error < (1e-5 if name == "root mean square" else 0.2)


def test_a_plan_that_leaves_the_width_alone_is_exact() -> None:
    analysis, _ = analysed(stream(fused), approximate=True)
    inner = next(g for g in analysis.groups if g.units == 32)
    plan = replace(random_plan(analysis), kept={inner.name: (0, 3, 5)})
    assert approximate_nodes(analysis, plan) == ()
    proof = prove(analysis, plan, rewrite(analysis, plan), [p.feeds for p in analysis.shapes.probes], RUNTIME)
    assert "statistic" not in proof.inputs


def test_a_fault_elsewhere_is_still_found() -> None:
    analysis, copies = analysed(stream(fused), approximate=True)
    plan = random_plan(analysis)
    feeds = [p.feeds for p in analysis.shapes.probes]
    wrong = rewrite(analysis, plan, copies=copies)
    head = next(n for n in wrong.graph.node if n.name == "head")
    weight = next(t for t in wrong.graph.initializer if t.name == head.input[1])
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0, 0] += 1
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    with pytest.raises(InternalError, match="the proof failed"):
        prove(analysis, plan, wrong, feeds, RUNTIME)


def test_statistics_that_are_not_finite_are_refused() -> None:
    analysis, copies = analysed(stream(fused), approximate=True)
    plan = random_plan(analysis)
    wrong = rewrite(analysis, plan, copies=copies)
    norm = next(n for n in wrong.graph.node if n.op_type == "LayerNormalization")
    scale = next(t for t in wrong.graph.initializer if t.name == norm.input[1])
    values = onnx.numpy_helper.to_array(scale) * np.float32(np.inf)
    scale.CopyFrom(onnx.numpy_helper.from_array(values, scale.name))
    with pytest.raises(InternalError, match="not finite"):
        prove(analysis, plan, wrong, [p.feeds for p in analysis.shapes.probes], RUNTIME)


@pytest.mark.parametrize("reconstruct", [False, True])
def test_the_report_names_the_nodes(reconstruct: bool) -> None:
    model = stream(fused)
    found = prune(model, speedup=6, samples=24, threads=1, approximate=True, reconstruct=reconstruct).report
    assert len(found.approximate) == 2
    assert all(name.startswith("layernormalization") for name in found.approximate)
    assert Report.from_json(found.to_json()).approximate == found.approximate
    exact = prune(model, speedup=1.5, samples=24, threads=1, reconstruct=reconstruct).report
    assert exact.approximate == ()


def test_fits_make_up_for_the_statistics() -> None:
    model = stream(fused)
    options = {"speedup": 4, "samples": 64, "threads": 1, "approximate": True}
    fitted, plain = (prune(model, reconstruct=r, **options).report for r in (True, False))
    assert fitted.approximate
    assert max(fitted.fidelity.relative_error.values()) < 0.7 * max(plain.fidelity.relative_error.values())


def test_the_command_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(stream(fused), path)
    assert main([str(path), "--speedup", "10", "--samples", "12"]) == 3
    assert not (tmp_path / "model.pruned.onnx").exists()
    assert main([str(path), "--speedup", "10", "--samples", "12", "--approximate"]) == 0
    assert "approximate: 2 nodes now take their statistics of fewer channels" in capsys.readouterr().out
    assert main(["inspect", str(path), "--approximate"]) == 0
    assert "100.0 % in layers that may shrink" in capsys.readouterr().out


def call(op: str, x: np.ndarray, rng: np.random.Generator) -> Call:
    """A normalisation over the last axis, or over the channels of every group."""
    vectors = [rng.standard_normal(x.shape[1] if op == "GroupNormalization" else x.shape[-1]).astype(np.float32)] * 2
    if op == "GroupNormalization":
        return Call(op, [x, *vectors], {"num_groups": 2, "epsilon": 0.1}, (1, 2), 1, 21)
    if op.startswith("Skip"):
        few = vectors if op == "SkipLayerNormalization" else vectors[:1]
        return Call(op, [x, x * 2, *few], {"epsilon": 0.1}, (2, 3), domain="com.microsoft")
    if op == "MeanVarianceNormalization":
        return Call(op, [x], {"axes": [len(x.shape) - 1]}, (), 1, 13)
    few = vectors if op == "LayerNormalization" else vectors[:1]
    opset = 23 if op == "RMSNormalization" else 17
    return Call(op, [x, *few], {"axis": -1, "epsilon": 0.1}, (1, 2), 1, opset)


@pytest.mark.parametrize(
    "op",
    [
        "LayerNormalization",
        "SimplifiedLayerNormalization",
        "RMSNormalization",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
        "GroupNormalization",
        "MeanVarianceNormalization",
    ],
)
def test_channels_that_went_count_as_zeros(op: str) -> None:
    """Exactly so where the mean is zero; the epsilons are large here so that they matter."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 8, 12)).astype(np.float32)
    axis = 1 if op == "GroupNormalization" else 2
    gone = np.array([0, 3, 5, 7]) if axis == 1 else np.array([1, 2, 6, 10, 11])  # as many of each group of four
    left = np.delete(np.arange(x.shape[axis]), gone)
    if axis == 1:
        for group in (left[left < 4], left[left >= 4]):
            x[:, group] -= x[:, group].mean((1, 2), keepdims=True)
        x[:, gone] = 0
    else:
        x[..., left] -= x[..., left].mean(-1, keepdims=True)
        x[..., gone] = 0
    whole = call(op, x, rng)
    outputs = whole.run()
    removed = {(False, k, a.ndim - 1 if a.ndim == 1 else axis): gone for k, a in enumerate(whole.inputs)}
    removed[True, 0, axis] = gone
    kept = Kept(
        tuple(
            tuple(left if (False, k, i) in removed else None for i in range(a.ndim)) for k, a in enumerate(whole.inputs)
        ),
        (tuple(left if i == axis else None for i in range(3)),),
    )
    row = row_for(whole.domain, op, whole.opset if not whole.domain else 1)
    assert row is not None
    assert row.repair is not None
    repair = row.repair(whole.view(outputs), kept)
    taken = [take(a, False, k, removed) for k, a in enumerate(whole.inputs)]
    got = whole.mended(repair, taken).run()[0] * np.float32(repair.factor)
    np.testing.assert_allclose(got, take(outputs[0], True, 0, removed), rtol=0, atol=2e-5)


@pytest.mark.parametrize("opset", [18, 21])
@pytest.mark.parametrize("groups", [2, 6])
def test_all_groups_of_channels_lose_the_same_ones(groups: int, opset: int) -> None:
    """Else what is left of one would be normalised with channels of another: all groups are of one size."""
    g = Builder(opset=opset)
    x = g.conv(g.input("x", [2, 3, 6, 6]), WIDTH, name="a")
    vectors = [g.weight(WIDTH if opset == 21 else groups) for _ in range(2)]
    wide = g.Relu(g.GroupNormalization(x, *vectors, num_groups=groups))
    analysis, _ = analysed(g.model(g.Conv(wide, g.weight(4, WIDTH, 1, 1))), approximate=True)
    each = WIDTH // groups
    whole, sliced = np.arange(WIDTH).reshape(groups, each), np.arange(WIDTH).reshape(groups, each).T
    every = [axis for info in analysis.groups for axis in info.group.axes]
    weight = next(n.inputs[1] for n in analysis.graph.nodes if n.label == "a")
    axes = [axis for axis in every if (axis.tensor, axis.axis) == (weight, 0)]
    assert len(axes) == 1
    assert any(np.array_equal(axes[0].positions, units) for units in (whole, sliced))
