"""Data that make it hard: sizes that vary or were never given, and few samples."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from builder import Builder
from test_api import accuracy, pruned

from onnxprune.api import prune


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
