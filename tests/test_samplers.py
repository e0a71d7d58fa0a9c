"""Channel samplers: convolutions that choose among the channels of a residual stream."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from builder import RUNTIME, Builder, analysed, random_plan, run

from onnxprune import Result, UnreachableTarget, prune
from onnxprune.costs import CostModel
from onnxprune.counting import count_model_macs
from onnxprune.plan import removed_positions
from onnxprune.rewrite import rewrite
from onnxprune.samplers import samplable
from onnxprune.verify import prove


def residual() -> onnx.ModelProto:
    g = Builder(seed=5)
    x = g.Relu(g.conv(g.input("x", ["n", 3, 8, 8]), 8, name="stem"))
    for k in (1, 2):
        x = g.Relu(g.Add(g.conv(g.Relu(g.conv(x, 6, name=f"a{k}")), 8, name=f"b{k}"), x))
    x = g.Relu(g.conv(x, 9, group=1, name="last"))
    return g.model(g.gemm(g.Flatten(g.GlobalAveragePool(x)), 4, name="head"))


def chain() -> onnx.ModelProto:
    g = Builder(seed=5)
    x = g.Relu(g.conv(g.Relu(g.conv(g.input("x", ["n", 3, 8, 8]), 8, name="a")), 6, name="b"))
    return g.model(g.gemm(g.Flatten(g.GlobalAveragePool(x)), 4, name="head"))


X = np.random.default_rng(1).standard_normal((60, 3, 8, 8)).astype(np.float32)


def small(model: onnx.ModelProto, **options: Any) -> Result:
    return prune(model, threads=1, **{"data": X, "speedup": 2.0, **options})


def gathers(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [n for n in model.graph.node if n.op_type == "Gather"]


def labels(model: onnx.ModelProto) -> set[str]:
    analysis, _ = analysed(model)
    return {analysis.graph.nodes[k].label for k in samplable(analysis)}


def test_readers_of_a_stream_may_sample_and_others_not() -> None:
    assert labels(residual()) == {"a1", "a2", "last"}
    assert labels(chain()) == set()


def fire() -> onnx.ModelProto:
    g = Builder(seed=5)
    x = g.Relu(g.conv(g.input("x", ["n", 3, 8, 8]), 12, name="stem"))
    x = g.Relu(g.conv(x, 6, k=1, name="squeeze"))
    x = g.Relu(g.Concat(g.conv(x, 8, k=1, name="one"), g.conv(x, 8, name="three"), axis=1))
    return g.model(g.gemm(g.Flatten(g.GlobalAveragePool(x)), 4, name="head"))


def test_what_is_made_cheaply_for_several_readers_may_be_sampled() -> None:
    assert labels(fire()) == {"one", "three"}


def test_what_costs_as_much_to_make_as_to_read_is_cut_for_all() -> None:
    g = Builder(seed=5)
    x = g.Relu(g.conv(g.input("x", ["n", 3, 8, 8]), 12, name="stem"))
    x = g.Relu(g.conv(x, 12, name="made"))
    x = g.Relu(g.Concat(g.conv(x, 4, k=1, name="one"), g.conv(x, 4, k=1, name="two"), axis=1))
    assert labels(g.model(g.gemm(g.Flatten(g.GlobalAveragePool(x)), 4, name="head"))) == set()


def test_a_sampled_stream_keeps_its_width_and_its_readers_choose() -> None:
    model = residual()
    plain, _ = analysed(model)
    analysis, _ = analysed(model, sampled=samplable(plain))
    assert {g.name for g in analysis.groups if g.producers} == {"a1", "a2", "last"}
    inputs = [g for g in analysis.groups if not g.producers]
    assert sorted(g.consumers for g in inputs) == [("a1",), ("a2",), ("last",)]
    assert [g.units for g in inputs] == [8, 8, 8]
    assert any("samplers" in f.reason and "--no-samplers" in f.remedy for f in analysis.frozen)


@pytest.mark.parametrize("seed", range(4))
def test_sampled_plans_are_exact(seed: int) -> None:
    model = residual()
    analysis, copies = analysed(model, sampled=samplable(analysed(model)[0]))
    plan = random_plan(analysis, seed)
    new = rewrite(analysis, plan, copies=copies)
    onnx.checker.check_model(new, full_check=True)
    prove(analysis, plan, new, [p.feeds for p in analysis.shapes.probes], RUNTIME)
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in new.graph.initializer}
    assert [len(tensors[node.input[1]]) for node in gathers(new)] == [4, 4, 4]
    cost = CostModel(analysis)
    whole, left = np.array([(g.units, len(plan.kept[g.name])) for g in analysis.groups]).T
    assert cost.total(left) / cost.total(whole) == count_model_macs(new) / count_model_macs(model)
    assert all(x.shape == y.shape for x, y in zip(run(new, {"x": X[:2]}), run(model, {"x": X[:2]}), strict=True))
    assert not [place for place in removed_positions(analysis, plan) if place[0] == "stem"]


def test_pruning_with_and_without_samplers() -> None:
    model = residual()
    with_them, without = small(model), small(model, samplers=False)
    assert gathers(with_them.model) and not gathers(without.model)
    assert with_them.report.achieved.macs >= 2.0 <= without.report.achieved.macs
    for result in (with_them, without):
        assert result.report.options["samplers"] is bool(gathers(result.model))


@pytest.mark.parametrize("options", [{"select": "l1"}, {"by": "memory", "speedup": 1.2}, {"exclude": "a1|a2|last"}])
def test_no_sampler_is_set_where_it_may_not_pay(options: dict[str, Any]) -> None:
    assert not gathers(small(residual(), best_effort=True, **options).model)


def test_a_sampler_that_drops_nothing_is_not_written() -> None:
    result = small(residual(), speedup=1.02)
    whole = [g for g in result.report.groups if not g.producers and g.kept == g.units]
    cut = [g for g in result.report.groups if not g.producers and g.kept < g.units]
    assert whole
    assert len(gathers(result.model)) == len(cut)


def test_what_a_gate_multiplies_is_no_stream() -> None:
    """Squeeze and excitation, and a gated unit: several layers make the channels, and nothing is added to them."""
    g = Builder(seed=5)
    x = g.Relu(g.conv(g.input("x", ["n", 3, 8, 8]), 12, name="wide"))
    gate = g.conv(g.Relu(g.conv(g.GlobalAveragePool(x), 4, k=1, name="squeeze")), 12, k=1, name="excite")
    x = g.Relu(g.conv(g.Mul(x, g.Sigmoid(gate)), 6, name="project"))
    x = g.Mul(g.conv(x, 10, name="linear"), g.Sigmoid(g.conv(x, 10, name="gate")))
    model = g.model(g.conv(x, 4, name="last"))
    analysis, _ = analysed(model)
    assert {frozenset(info.producers) for info in analysis.groups} >= {
        frozenset({"wide", "excite"}),
        frozenset({"linear", "gate"}),
    }
    assert labels(model) == set()


def test_what_one_layer_alone_reads_is_no_stream() -> None:
    """A gate of fully connected layers costs nothing beside the convolution; a sum that one convolution reads."""
    g = Builder(seed=5)
    x = g.input("x", ["n", 3, 8, 8])
    wide = g.Relu(g.conv(x, 12, name="wide"))
    gate = g.gemm(g.Flatten(g.GlobalAveragePool(wide)), 12, name="gate")
    x = g.conv(g.Mul(wide, g.Reshape(g.Sigmoid(gate), g.const([-1, 12, 1, 1]))), 24, name="project")
    left, right = g.conv(g.Relu(x), 8, name="left"), g.conv(x, 8, group=2, name="right")
    model = g.model(g.conv(g.Add(left, right), 4, name="last"))
    assert labels(model) == set()


def test_a_stream_is_cut_where_sampling_does_not_go_far_enough() -> None:
    """Layers that write to the stream keep their width while others sample it."""
    g = Builder(seed=5)
    x = g.Relu(g.conv(g.input("x", ["n", 3, 8, 8]), 24, name="stem"))
    for k in (1, 2):
        x = g.Relu(g.Add(g.conv(x, 24, group=24, name=f"depthwise{k}"), x))
        x = g.Relu(g.Add(g.conv(x, 24, k=1, name=f"point{k}"), x))
    model = g.model(g.gemm(g.Flatten(g.GlobalAveragePool(x)), 4, name="head"))
    assert gathers(small(model, speedup=1.1).model)
    for options in ({}, {"best_effort": True}):
        result = small(model, speedup=6, **options)
        assert not gathers(result.model) and result.report.achieved.macs >= 6
        assert any("no convolution samples" in warning for warning in result.report.warnings)
    once = (np.random.default_rng(k).standard_normal((3, 8, 8)).astype(np.float32) for k in range(40))
    assert small(model, speedup=6, data=once).report.achieved.macs >= 6
    with pytest.raises(UnreachableTarget, match=r"the largest for this model is [2-9]\d"):
        small(model, speedup=1000)
