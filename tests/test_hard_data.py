"""Data that make it hard: sizes that vary or were never given, and few samples."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from builder import Builder
from onnx import numpy_helper
from test_api import accuracy, pruned

from onnxprune.api import prune
from onnxprune.errors import InputError
from onnxprune.graph import Graph


def any_size() -> onnx.ModelProto:
    g = Builder()
    y = g.node("Conv", g.input("x", ["n", 3, "h", "w"]), g.weight(8, 3, 3, 3), g.weight(8), pads=[1] * 4)
    y = g.node("Conv", g.Relu(y), g.weight(8, 8, 3, 3), g.weight(8), pads=[1] * 4)
    y = g.Flatten(g.GlobalAveragePool(g.Relu(y)))
    return g.model(g.node("Gemm", y, g.weight(4, 8), g.weight(4), transB=1))


def test_random_data_for_a_model_with_dynamic_sizes() -> None:
    assert prune(any_size(), threads=1).report.achieved.macs >= 2


def test_images_of_several_sizes() -> None:
    rng = np.random.default_rng(0)
    data = [rng.standard_normal((1, 3, 8 + 2 * (k % 4), 8)).astype(np.float32) for k in range(24)]
    assert prune(any_size(), data=data, threads=1).report.achieved.macs >= 2


def test_sequences_of_several_lengths() -> None:
    rng = np.random.default_rng(0)
    g = Builder()
    model = g.model(g.linear(g.Relu(g.linear(g.input("x", ["n", "t", 6]), 12)), 5))
    data = [rng.standard_normal((1, 3 + k % 4, 6)).astype(np.float32) for k in range(24)]
    assert prune(model, data=data, threads=1).report.achieved.macs >= 2


@pytest.mark.parametrize("samples", [20, 40])
def test_few_samples_do_not_strip_the_layer_before_a_wide_one(samples: int) -> None:
    fitted = pruned("digits_cnn", select="l1", samples=samples)
    kept = {group.name: group.kept / group.units for group in fitted.report.groups}
    assert kept["/features/features.17/Conv"] > 0.1
    sliced = pruned("digits_cnn", select="l1", samples=samples, reconstruct=False)
    assert accuracy(fitted.model, "digits_cnn") >= accuracy(sliced.model, "digits_cnn")


def graph_network() -> onnx.ModelProto:
    """Nodes of a graph and its adjacency: there is no batch, and samples do not stack."""
    g = Builder()
    x, edges = g.input("x", ["n", 6]), g.input("edges", ["n", "n"])
    for out in (16, 12):
        x = g.Relu(g.MatMul(edges, g.linear(x, out)))
    return g.model(g.linear(x, 3))


def test_samples_that_do_not_stack() -> None:
    model = graph_network()
    assert [spec.stacks for spec in Graph(model).inputs] == [False, False]
    assert prune(model, speedup=1.5, samples=6, threads=1).report.achieved.macs >= 1.5
    rng = np.random.default_rng(0)
    graphs = {"x": rng.standard_normal((12, 5, 6)), "edges": rng.uniform(0, 0.3, (12, 5, 5))}
    stacked = {name: array.astype(np.float32) for name, array in graphs.items()}
    assert prune(model, speedup=1.5, data=stacked, threads=1).report.data.samples == 12
    one = {name: array[0] for name, array in stacked.items()}
    assert prune(model, speedup=1.5, data=one, threads=1).report.data.samples == 1


def test_a_size_that_anything_dynamic_is_called_by_is_no_size() -> None:
    g = Builder()
    x = g.MaxPool(g.Relu(g.conv(g.input("x", ["?", 3, "?", "?"]), 8)), kernel_shape=[5, 5])
    spec = Graph(g.model(g.GlobalAveragePool(g.node("Conv", x, g.weight(4, 8, 1, 1))))).inputs[0]
    assert spec.stacks and spec.shape == (None, 3, None, None)


def frames(stated: int) -> onnx.ModelProto:
    """A batch that a Reshape takes apart: as clips of so many frames."""
    g = Builder()
    x = g.Relu(g.conv(g.input("x", ["n", 3, 6, 6]), 12))
    clips = g.Reshape(x, g.const([-1, stated, 12, 6, 6]))
    return g.model(g.node("Conv", g.ReduceMax(clips, axes=[1], keepdims=0), g.weight(4, 12, 1, 1)))


def test_a_batch_of_clips() -> None:
    model, rng = frames(4), np.random.default_rng(0)
    assert prune(model, speedup=1.2, samples=4, threads=1).report.achieved.macs >= 1.2
    clips = rng.standard_normal((6, 4, 3, 6, 6)).astype(np.float32)
    assert prune(model, speedup=1.2, data={"x": clips}, threads=1).report.data.samples == 6
    with pytest.raises(InputError, match=r"fed with x as .1, 3, 6, 6.*give records of such"):
        prune(model, speedup=1.2, data={"x": clips[:, 0]}, threads=1)


def test_a_batch_that_is_dynamic_in_name_alone() -> None:
    g = Builder()
    x = g.Relu(g.conv(g.input("x", ["n", 3, 6, 6]), 12))
    first = g.Squeeze(g.Reshape(g.Conv(x, g.weight(4, 12, 1, 1)), g.const([1, 2, 2, 36])), g.const([0]))
    model, rng = g.model(first), np.random.default_rng(0)
    for data in (None, {"x": rng.standard_normal((9, 3, 6, 6)).astype(np.float32)}):
        assert prune(model, speedup=1.2, samples=9, data=data, threads=1).report.achieved.macs >= 1.2


@pytest.mark.parametrize(("weight", "scale"), [(np.nan, 1.0), (np.inf, 1.0), (1.0, 1e20)])
def test_what_cannot_be_summed_is_refused_with_a_sentence(weight: float, scale: float) -> None:
    model = any_size()
    changed = numpy_helper.to_array(model.graph.initializer[0]).copy()
    changed[0, 0] *= weight
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(changed, model.graph.initializer[0].name))
    data = np.random.default_rng(0).standard_normal((24, 3, 8, 8)).astype(np.float32) * np.float32(scale)
    with pytest.raises(InputError, match=r"NaN, infinite numbers, or some that are too large.* at layer 'conv\d"):
        prune(model, data=data, threads=1)
    by_weights = prune(model, data=data, threads=1, select="l1", reconstruct=False).report
    assert by_weights.achieved.macs >= 2
    assert any("how alike the two models are there cannot be said" in w for w in by_weights.warnings) == (scale == 1)


ADDED = {"a vector": (16,), "a row": (1, 16), "a number": (), "one element": (1,), "a column": (4, 1), "all": (4, 16)}


@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 0.5), (-0.5, 0.0)])
@pytest.mark.parametrize("added", ADDED)
def test_products_that_count_by_a_factor(alpha: float, beta: float, added: str) -> None:
    """Weights are fitted to what the layer gives with its factors; where they cannot be, it is cut alone."""
    g, rng = Builder(), np.random.default_rng(0)
    x = g.Relu(g.gemm(g.input("x", [4, 6]), 16))
    y = g.node("Gemm", x, g.weight(16, 16), g.weight(*ADDED[added]), alpha=alpha, beta=beta)
    model = g.model(g.gemm(g.Relu(y), 3))
    data = (rng.standard_normal((96, 3)) @ rng.standard_normal((3, 6))).astype(np.float32)
    reports = [prune(model, data=data, threads=1, reconstruct=fitted).report for fitted in (True, False)]
    fitted, cut = (next(iter(report.fidelity.relative_error.values())) for report in reports)
    assert fitted < cut


@pytest.mark.parametrize("select", ["greedy", "lasso", "wanda"])
@pytest.mark.parametrize("bias", [1, -30])
def test_targets_that_never_change(bias: int, select: str) -> None:
    """Of whole numbers, so that no rounding looks like a change; or of units that are all shut."""
    g = Builder()
    y = g.input("x", ["n", 4])
    for width, added in ((4, bias), (8, 1), (8, 1)):
        weight = g.const(g.rng.integers(-2, 3, (width, 8)).astype(np.float32))
        y = g.Relu(g.node("Gemm", y, weight, g.const(np.full(8, float(added)))))
    y = g.node("Gemm", y, g.const(g.rng.integers(-2, 3, (8, 3)).astype(np.float32)))
    report = prune(g.model(y), data=np.ones((16, 4), np.float32), threads=1, select=select).report
    assert report.achieved.macs >= 2
    assert max(report.fidelity.relative_error.values()) < 1e-4
