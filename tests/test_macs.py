"""Multiply-accumulates operator by operator: counted by hand, on the file that is written, and by the budget."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from builder import Builder, analysed, pruned
from onnx import TensorProto

from onnxprune.api import prune
from onnxprune.costs import CostModel
from onnxprune.counting import count_model_macs

MS = "com.microsoft"
CASES: dict[str, tuple[Callable[[], onnx.ModelProto], int]] = {}  # one sample


def case(macs: int) -> Callable[[Callable[[], onnx.ModelProto]], Callable[[], onnx.ModelProto]]:
    def register(make: Callable[[], onnx.ModelProto]) -> Callable[[], onnx.ModelProto]:
        CASES[make.__name__] = make, macs
        return make

    return register


@case(6 * 6 * 8 * 3 * 9 + 6 * 6 * (8 // 2) * 10 * 4 + 12 * 12 * 10 * 4)
def convolutions() -> onnx.ModelProto:
    g = Builder()
    x = g.Relu(g.conv(g.input("x", [1, 3, 6, 6]), 8))
    x = g.Relu(g.ConvTranspose(x, g.weight(8, 5, 2, 2), group=2, strides=[2, 2]))
    return g.model(g.conv(x, 4, k=1))


@case(16 * 8 * 3 * 9 + 16 * 8 * 8 * 4 + 16 * 4 * 8)
def deformed() -> onnx.ModelProto:
    g = Builder(opset=19)
    x = g.Relu(g.conv(g.input("x", [1, 3, 4, 4]), 8))
    offset = g.const(g.rng.normal(size=(1, 8, 4, 4)))
    x = g.DeformConv(x, g.weight(8, 8, 2, 2), offset, g.weight(8), pads=[0, 0, 1, 1], kernel_shape=[2, 2])
    return g.model(g.conv(g.Relu(x), 4, k=1))


@case(36 * 8 * 3 * 9 + 36 * 8 * 8 + 36 * 8 * 4)
def fused_convolutions() -> onnx.ModelProto:
    g = Builder()
    x = g.input("x", [1, 3, 6, 6])
    x = g.FusedConv(x, g.weight(8, 3, 3, 3), g.weight(8), pads=[1] * 4, activation="Relu", domain=MS)
    x = g.FusedConv(x, g.weight(8, 8, 1, 1), g.weight(8), activation="Relu", domain=MS)
    return g.model(g.node("Conv", x, g.weight(4, 8, 1, 1), g.weight(4)))


@case(5 * 12 * 8 + 5 * 8 * 4)
def fused_products() -> onnx.ModelProto:
    g = Builder()
    x = g.input("x", [1, 5, 12])
    x = g.Relu(g.FusedMatMul(x, g.weight(8, 12), transB=1, alpha=0.5, domain=MS))
    return g.model(g.MatMul(x, g.weight(8, 4)))


@case(6 * 12 + 12 * 4)
def fused_gemm() -> onnx.ModelProto:
    g = Builder()
    x = g.FusedGemm(g.input("x", [1, 6]), g.weight(12, 6), g.weight(12), transB=1, activation="Relu", domain=MS)
    return g.model(g.node("Gemm", x, g.weight(4, 12), g.weight(4), transB=1))


def _heads(g: Builder, x: str, heads: int, size: int, *, keys: bool = False) -> str:
    y = g.linear(x, heads * size)
    return g.Transpose(g.Reshape(y, g.const([0, 0, heads, size])), perm=[0, 2, 3, 1] if keys else [0, 2, 1, 3])


@case(4 * 7 * 6 * 12 + 2 * 7 * 7 * 12)
def attention_written_out() -> onnx.ModelProto:
    g = Builder()
    x = g.input("x", [1, 7, 6])
    scores = g.Softmax(g.MatMul(_heads(g, x, 3, 4), _heads(g, x, 3, 4, keys=True)), axis=-1)
    y = g.Transpose(g.MatMul(scores, _heads(g, x, 3, 4)), perm=[0, 2, 1, 3])
    return g.model(g.MatMul(g.Reshape(y, g.const([0, 0, 12])), g.weight(12, 6)))


@case(2 * 7 * 6 * 12 + 7 * 6 * 15 + 7 * 7 * (12 + 15) + 7 * 15 * 6)
def attention_in_one() -> onnx.ModelProto:
    g = Builder(opset=23)
    x = g.input("x", [1, 7, 6])
    q, k, v = (g.MatMul(x, g.weight(6, width)) for width in (12, 12, 15))
    y = g.Attention(q, k, v, q_num_heads=3, kv_num_heads=3)
    return g.model(g.MatMul(y, g.weight(15, 6)))


@case(7 * 6 * (12 + 6 + 6) + 2 * 7 * 7 * 12 + 7 * 12 * 6)
def attention_with_four_axes() -> onnx.ModelProto:
    """Keys and values shared by two query heads each."""
    g = Builder(opset=23)
    x = g.input("x", [1, 7, 6])
    y = g.Attention(*(_heads(g, x, heads, 3) for heads in (4, 2, 2)))
    y = g.Reshape(g.Transpose(y, perm=[0, 2, 1, 3]), g.const([0, 0, 12]))
    return g.model(g.MatMul(y, g.weight(12, 6)))


@case(3 * 7 * 6 * 12 + 2 * 7 * 7 * 12 + 7 * 12 * 6)
def multi_head_attention() -> onnx.ModelProto:
    g = Builder()
    x = g.input("x", [1, 7, 6])
    y = g.MultiHeadAttention(*(g.linear(x, 12) for _ in range(3)), num_heads=3, domain=MS)
    return g.model(g.MatMul(y, g.weight(12, 6)))


@case(7 * 6 * 36 + 2 * 7 * 7 * 12 + 7 * 12 * 6)
def packed_attention() -> onnx.ModelProto:
    g = Builder()
    y = g.node(
        "Attention", g.input("x", [1, 7, 6]), g.weight(6, 36), g.weight(36), num_heads=3, domain=MS, name="attention"
    )
    return g.model(g.MatMul(y, g.weight(12, 6)))


@case(5 * 4 * 8 * (6 + 8) + 5 * 3 * 10 * (8 + 10) + 5 * 10 * 4)
def recurrent() -> onnx.ModelProto:
    g = Builder()
    y = g.LSTM(g.input("x", [5, 1, 6]), g.weight(1, 32, 6), g.weight(1, 32, 8), g.weight(1, 64), hidden_size=8)
    y = g.Squeeze(y, g.const([1]))
    y = g.Squeeze(g.GRU(y, g.weight(1, 30, 8), g.weight(1, 30, 10), g.weight(1, 60), hidden_size=10), g.const([1]))
    return g.model(g.linear(y, 4))


@case(5 * 2 * 8 * (6 + 8) + 5 * 16 * 4)
def recurrent_both_ways() -> onnx.ModelProto:
    g = Builder()
    x = g.input("x", [5, 1, 6])
    y = g.RNN(x, g.weight(2, 8, 6), g.weight(2, 8, 8), g.weight(2, 16), hidden_size=8, direction="bidirectional")
    y = g.Reshape(g.Transpose(y, perm=[0, 2, 1, 3]), g.const([0, 0, -1]))
    return g.model(g.linear(y, 4))


@case(7 * 6 * 12 * 2 + 3 * 7 * 7 * 4 + 3 * 7 * 4 * 6)
def einsum() -> onnx.ModelProto:
    """Heads and their sizes as letters; the last one contracts three operands' worth of them."""
    g = Builder()
    x = g.input("x", [1, 7, 6])
    q, k = (g.Einsum(x, g.weight(6, 3, 4), equation="btc,chd->bthd") for _ in range(2))
    scores = g.Softmax(g.Einsum(q, k, equation="bshd,bthd->bhst"), axis=-1)
    y = g.Einsum(g.ReduceMean(scores, axes=[3], keepdims=0), q, equation="bhs,bshd->bshd")  # no sum: not counted
    return g.model(g.Einsum(y, g.weight(3, 4, 6), equation="...hd,hdc->...c"))


def quantised(channels: int = 12) -> onnx.ModelProto:
    g = Builder()

    def weight(out: int, into: int) -> str:
        values = g.const(g.rng.integers(-127, 128, (out, into, 3, 3)), dtype=np.int8)
        scales = g.const(g.rng.uniform(1e-3, 3e-3, out))
        return g.DequantizeLinear(values, scales, g.const(np.zeros(out), dtype=np.int8), axis=0)

    def activation(x: str) -> str:
        pair = (g.const(0.02), g.const(3, dtype=np.uint8))
        return g.DequantizeLinear(g.QuantizeLinear(x, *pair), *pair)

    x = g.input("x", [1, 3, 6, 6])
    for into, out in ((3, channels), (channels, channels), (channels, 4)):
        x = g.Relu(activation(g.node("Conv", x, weight(out, into), g.weight(out, scale=0.1), pads=[1] * 4)))
    return g.model(x)


CASES["quantised"] = quantised, 36 * 9 * (3 * 12 + 12 * 12 + 12 * 4)


@pytest.mark.parametrize("name", CASES)
def test_counted_by_hand(name: str) -> None:
    make, macs = CASES[name]
    assert count_model_macs(make()) == macs


@pytest.mark.parametrize("name", CASES)
def test_the_budget_counts_what_the_file_holds(name: str) -> None:
    model = CASES[name][0]()
    for seed in range(3):
        new, analysis, plan, _ = pruned(model, seed, share=0.4)
        assert CostModel(analysis).total(plan.counts(analysis)) == pytest.approx(count_model_macs(new), rel=1e-9)
        assert count_model_macs(new) < CASES[name][1]


@pytest.mark.parametrize("name", CASES)
def test_half_of_it_from_end_to_end(name: str) -> None:
    model = CASES[name][0]()
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    data = np.random.default_rng(0).standard_normal((12, *shape)).astype(np.float32)
    result = prune(model, data=data[:, 0] if shape[0] == 1 else data, speedup=1.5, threads=1, best_effort=True)
    assert result.report.proof is not None and result.report.proof.max_relative_difference < 1e-5
    assert count_model_macs(result.model) == result.report.after.macs < result.report.before.macs == CASES[name][1]


def test_the_share_is_of_whole_layers() -> None:
    """The hidden size of a recurrent layer is an output here: only its input may shrink, in one of its two terms."""
    g = Builder()
    x = g.linear(g.input("x", [5, 1, 6]), 8)
    y, _ = g.node("GRU", x, g.weight(1, 12, 8), g.weight(1, 12, 4), hidden_size=4, outputs=2)
    analysis = analysed(g.model(y))[0]
    assert [group.units for group in analysis.groups] == [8]
    assert analysis.prunable_macs == 1.0


def test_tokens_are_no_channels_that_are_held_back() -> None:
    g = Builder()
    x = g.input("x", [1, 7, 6])
    x = g.Add(g.linear(x, 8), g.weight(7, 8))
    scores = g.Softmax(g.MatMul(_heads(g, x, 2, 4), _heads(g, x, 2, 4, keys=True)), axis=-1)
    y = g.Reshape(g.Transpose(g.MatMul(scores, _heads(g, x, 2, 4)), perm=[0, 2, 1, 3]), g.const([0, 0, 8]))
    analysis = analysed(g.model(g.linear(g.Relu(g.linear(y, 12)), 5)))[0]
    held = {(f.reason, f.channels, f.layers) for f in analysis.frozen}
    assert {(reason, channels) for reason, channels, _ in held} == {
        ("an input of the graph", 6),
        ("an output of the graph", 5),
    }


def test_keys_of_a_cache_are_counted() -> None:
    g = Builder()
    x, past = g.input("x", [1, 7, 6]), g.input("past", [2, 1, 3, 5, 4])
    inputs = (x, g.weight(6, 36), g.weight(36), "", past)
    y, _ = g.node("Attention", *inputs, outputs=2, num_heads=3, domain=MS)
    model = g.model(g.MatMul(y, g.weight(12, 6)))
    assert count_model_macs(model) == 7 * 6 * 36 + 2 * 7 * (7 + 5) * 12 + 7 * 12 * 6


def test_heads_that_share_keys_are_counted() -> None:
    """Four of queries and two of keys and values, of sixteen each; nine keys come from a cache."""
    g = Builder()
    x = g.input("x", [1, 7, 6])
    q, k, v = (g.MatMul(x, g.weight(6, width)) for width in (64, 32, 32))
    caches = [g.weight(1, 2, 9, 16) for _ in range(2)]
    lengths = g.const([15], dtype=np.int32), g.const(16, dtype=np.int32)
    inputs = (q, k, v, *caches, *lengths)
    y, *_ = g.node("GroupQueryAttention", *inputs, outputs=3, num_heads=4, kv_num_heads=2, domain=MS)
    model = g.model(g.MatMul(y, g.weight(64, 6)))
    assert count_model_macs(model) == 7 * 6 * (64 + 2 * 32) + 2 * 7 * (7 + 9) * 64 + 7 * 64 * 6


def test_what_works_on_integers_is_counted_and_held_back() -> None:
    g = Builder()
    x = g.Relu(g.linear(g.input("x", [1, 12]), 12))
    values, scale, point = g.node("DynamicQuantizeLinear", x, outputs=3)
    weight = g.const(g.rng.integers(-127, 128, (12, 9)), dtype=np.int8)
    y = g.Cast(g.MatMulInteger(values, weight, point), to=TensorProto.FLOAT)
    model = g.model(g.Mul(y, scale))
    analysis = analysed(model)[0]
    assert count_model_macs(model) == analysis.macs == 12 * 12 + 12 * 9
    assert not analysis.groups and analysis.prunable_macs == 0.0
    held = {f.node: f.reason for f in analysis.frozen if f.op == "MatMulInteger"}
    assert len(held) == 1 and "works on integers" in next(iter(held.values()))


def test_what_an_optimizer_laid_out_for_one_machine_is_counted_and_says_so() -> None:
    g = Builder()
    x = g.node("ReorderInput", g.input("x", [1, 32, 8, 8]), domain="com.microsoft.nchwc")
    y = g.node("Conv", x, g.weight(16, 32, 1, 1), domain="com.microsoft.nchwc", kernel_shape=[1, 1])
    y = g.node("ReorderOutput", y, domain="com.microsoft.nchwc", channels=16)
    analysis = analysed(g.model(y))[0]
    assert analysis.macs == 16 * 32 * 64
    assert any("prune the model that it was made from" in f.reason and f.op == "Conv" for f in analysis.frozen)
