"""Models in float16, bfloat16 and float64, and quantised ones: pruned in their own types, proven without rounding."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from builder import RUNTIME, Builder, analysed, pruned, run
from onnx import TensorProto, helper, numpy_helper

from onnxprune.api import prune
from onnxprune.cli import main
from onnxprune.precision import float32_copy, types, without_rounding
from onnxprune.runtime import Runtime

KINDS = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16, "float64": TensorProto.DOUBLE}


def typed(model: onnx.ModelProto, kind: int) -> onnx.ModelProto:
    """The model with another type in place of float32."""
    new = onnx.ModelProto()
    new.CopyFrom(model)
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    tensors = [*new.graph.initializer, *(a.t for n in new.graph.node for a in n.attribute if a.HasField("t"))]
    for tensor in tensors:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), tensor.name))
    for attribute in (a for n in new.graph.node for a in n.attribute if a.name == "to" and a.i == TensorProto.FLOAT):
        attribute.i = kind
    for value in (*new.graph.input, *new.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = kind
    return new


def convolutions() -> onnx.ModelProto:
    g = Builder(opset=22)
    x = g.Relu(g.batch_norm(g.conv(g.input("x", ["n", 3, 8, 8]), 16)))
    x = g.Add(g.conv(g.Relu(g.conv(x, 16, bias=False)), 16), x)
    x = g.Relu(g.gemm(g.Flatten(g.GlobalAveragePool(x)), 24))
    return g.model(g.linear(x, 5))


def two_layers() -> onnx.ModelProto:
    """Which are fitted together, to what the model is fed with."""
    g = Builder(opset=20)
    x = g.Relu(g.conv(g.input("x", ["n", 3, 8, 8]), 16))
    return g.model(g.Flatten(g.GlobalAveragePool(g.Relu(g.conv(x, 4)))))


def attention() -> onnx.ModelProto:
    """With the root of a size in the model's type, and weights behind a Transpose."""
    g = Builder(opset=22)
    x = g.input("x", ["n", "t", 12])

    def heads(perm: list[int]) -> str:
        y = g.Add(g.MatMul(x, g.Transpose(g.weight(12, 12), perm=[1, 0])), g.weight(12))
        return g.Transpose(g.Reshape(y, g.const([0, 0, 3, 4])), perm=perm)

    q, k, v = heads([0, 2, 1, 3]), heads([0, 2, 3, 1]), heads([0, 2, 1, 3])
    size = g.Slice(g.node("Shape", q), g.const([3]), g.const([4]))
    scores = g.Softmax(g.MatMul(g.Div(q, g.Sqrt(g.Cast(size, to=TensorProto.FLOAT))), k), axis=-1)
    y = g.Reshape(g.Transpose(g.MatMul(scores, v), perm=[0, 2, 1, 3]), g.const([0, 0, 12]))
    y = g.LayerNormalization(g.Add(x, g.linear(y, 12)), g.const(np.ones(12)), g.const(np.zeros(12)))
    return g.model(g.linear(g.Gelu(g.linear(y, 32)), 12))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [convolutions, two_layers, attention], ids=lambda make: make.__name__)
def test_a_model_is_pruned_in_its_own_type(make: Callable[[], onnx.ModelProto], kind: str) -> None:
    model = typed(make(), KINDS[kind])
    shape = (64, 7, 12) if make is attention else (64, 3, 8, 8)
    data = np.random.default_rng(0).standard_normal(shape).astype(np.float64 if kind == "float64" else np.float32)
    fitted, sliced = (prune(model, speedup=1.5, data=data, threads=1, reconstruct=r) for r in (True, False))
    wide = prune(make(), speedup=1.5, data=data.astype(np.float32), threads=1)
    for result in (fitted, sliced):
        assert types(result.model) - {TensorProto.INT64} == {KINDS[kind]}
        assert [o.type.tensor_type.elem_type for o in result.model.graph.output] == [KINDS[kind]]
        assert all(np.isfinite(numpy_helper.to_array(t).astype(float)).all() for t in result.model.graph.initializer)
        proof = result.report.proof
        assert proof is not None and proof.max_relative_difference < 1e-5 and proof.compared > 5
    errors = [next(iter(r.report.fidelity.relative_error.values())) for r in (fitted, sliced, wide)]
    assert errors[0] < errors[1]
    assert errors[0] < errors[2] + (0.02 if kind == "bfloat16" else 0.002)  # what the type itself costs


@pytest.mark.parametrize("kind", ["bfloat16", "float64"])
def test_what_the_runtime_cannot_compute_in_is_said(kind: str) -> None:
    report = prune(typed(convolutions(), KINDS[kind]), speedup=1.5, threads=1).report
    assert report.proof is not None and "in float32 copies of both models" in report.proof.inputs
    assert any("latency was not measured" in warning for warning in report.warnings)
    assert report.before.latency_ms is report.achieved.latency is None


def test_float16_is_timed_and_proven_more_exactly_than_it_computes() -> None:
    report = prune(typed(convolutions(), TensorProto.FLOAT16), speedup=1.5, threads=1).report
    assert report.proof is not None and "in float32 copies of both models" in report.proof.inputs
    assert report.before.latency_ms is not None


def test_products_in_float64_are_run_and_proven_in_float64() -> None:
    g = Builder()
    model = typed(g.model(g.linear(g.Relu(g.gemm(g.input("x", ["n", 12]), 24)), 5)), TensorProto.DOUBLE)
    report = prune(model, speedup=1.5, threads=1).report
    assert report.proof is not None and "float32" not in report.proof.inputs
    assert report.before.latency_ms is not None


def test_compare_and_inspect_take_what_cannot_be_run_as_it_is(tmp_path, capsys) -> None:
    onnx.save(typed(convolutions(), TensorProto.BFLOAT16), tmp_path / "m.onnx")
    assert main(["inspect", str(tmp_path / "m.onnx")]) == 0
    assert "largest reachable speed-up" in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "m.onnx"), str(tmp_path / "m.onnx"), "--samples", "4"]) == 0
    out = capsys.readouterr().out
    assert "MACs" in out and "latency  " not in out


def test_weights_beyond_the_range_of_float16_are_not_written() -> None:
    """Pairs of equal units: where one goes, the other's weights would have to be twice as large."""
    g = Builder()
    half = g.rng.standard_normal((8, 12)) * 1e-3
    x = g.Relu(g.node("Gemm", g.input("x", ["n", 12]), g.const(np.repeat(half, 2, 0)), transB=1, name="a"))
    wide = g.rng.uniform(4.5e4, 6e4, (4, 16))
    model = typed(g.model(g.node("Gemm", x, g.const(wide), g.const(np.zeros(4)), transB=1, name="b")), KINDS["float16"])
    data = np.random.default_rng(0).standard_normal((200, 12)).astype(np.float16)
    result = prune(model, speedup=2, data=data, threads=1)
    assert all(np.isfinite(numpy_helper.to_array(t)).all() for t in result.model.graph.initializer)
    assert any("the weights fitted for 'b' do not fit into float16" in warning for warning in result.report.warnings)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_in_float32_holds_the_same_numbers(kind: str) -> None:
    model = typed(convolutions(), KINDS[kind])
    copy = float32_copy(model)
    assert types(model) >= {KINDS[kind]} and types(copy) - {TensorProto.INT64} == {TensorProto.FLOAT}
    for a, b in zip(model.graph.initializer, copy.graph.initializer, strict=True):
        if kind != "float64":
            assert np.array_equal(numpy_helper.to_array(a).astype(np.float64), numpy_helper.to_array(b))
    onnx.checker.check_model(copy, full_check=True)


def test_a_copy_in_float32_goes_into_bodies_and_functions() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 18, "own" : 1]>
        g (bool c, double[4] x) => (double[4] y) <double[4] a = {1, 2, 3, 4}> {
            h = own.twice(x)
            y = If (c) <
                then_branch = t () => (double[4] u) { u = Add(h, a) },
                else_branch = e () => (double[4] v) { k = Constant <value = double[1] {2}> () v = Mul(h, k) }
            >
        }
        <domain: "own", opset_import: ["" : 18]>
        twice (x) => (z) { two = Constant <value = double {2}> () z = Mul(x, two) }
        """
    )
    copy = float32_copy(model)
    feeds = {"c": np.array(True), "x": np.arange(4.0)}
    found = run(copy, feeds | {"x": feeds["x"].astype(np.float32)})[0]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, run(model, feeds)[0])
    runtime = Runtime("cpu", 1, as_float32=True)
    np.testing.assert_array_equal(runtime.session(model).run(None, feeds)[0], found)


# ------------------------------------------------------------------------------------------------- quantised


def quantised(along: int | None = None, between: str = "", rounds: bool = True) -> onnx.ModelProto:
    """Convolutions with integer weights and 8-bit activations between them."""
    g = Builder(opset=19)

    def weight(out: int, into: int) -> str:
        values = g.const(g.rng.integers(-127, 128, (out, into, 3, 3)), dtype=np.int8)
        return g.DequantizeLinear(values, g.const(g.rng.uniform(1e-3, 3e-3, out)), axis=0)

    def activation(x: str, channels: int) -> str:
        if along is None:
            scale, point = g.const(0.03), g.const(100, dtype=np.uint8)
        else:
            scale, point = g.const(g.rng.uniform(0.02, 0.04, channels)), g.const([100] * channels, dtype=np.uint8)
        axis = {} if along is None else {"axis": along}
        y = g.QuantizeLinear(x, scale, point, **axis) if rounds else x
        y = g.node(between, y, kernel_shape=[2, 2]) if between else y
        return g.DequantizeLinear(y, scale, point, **axis) if rounds else y

    x = g.input("x", ["n", 3, 24, 24])
    for into, out in ((3, 24), (24, 24), (24, 4)):
        x = activation(g.node("Conv", x, weight(out, into), g.weight(out, scale=0.1), pads=[1] * 4), out)
    return g.model(x)


QUANTISED = [(None, ""), (1, ""), (-3, ""), (None, "MaxPool"), (1, "MaxPool")]


@pytest.mark.parametrize(("along", "between"), QUANTISED)
def test_quantised_models_are_sliced_exactly_and_it_is_said(along: int | None, between: str) -> None:
    model = quantised(along, between)
    data = np.random.default_rng(0).standard_normal((16, 3, 24, 24)).astype(np.float32)
    result = prune(model, speedup=2, data=data, threads=1)
    proof = result.report.proof
    assert proof is not None and proof.max_relative_difference < 1e-5
    assert "scaled, but not rounded" in proof.inputs
    assert any(
        "2 layers with quantised weights: cut exactly, and not fitted (" in warning
        for warning in result.report.warnings
    )
    before = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for tensor in result.model.graph.initializer:
        old, new = before[tensor.name], numpy_helper.to_array(tensor)
        for axis, gone in result.report.removed.get(tensor.name, {}).items():
            old = np.delete(old, gone, axis)
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize(("along", "between"), QUANTISED)
def test_without_rounding_the_rest_stays_the_same(along: int | None, between: str) -> None:
    """Scaled and scaled back, activations are what they are where nothing is quantised."""
    model = quantised(along, between)
    plain = without_rounding(model, analysed(model)[0].shapes.probes[0].shapes)
    x = np.random.default_rng(0).standard_normal((2, 3, 24, 24)).astype(np.float32)
    found, expected = (run(m, {"x": x})[0] for m in (plain, quantised(along, between, rounds=False)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert {n.op_type for n in plain.graph.node} <= {"Conv", "MaxPool", "DequantizeLinear", "Div", "Mul", "Reshape"}


def test_where_integers_are_computed_with_nothing_is_taken_out() -> None:
    g = Builder()
    x = g.QuantizeLinear(g.input("x", [1, 3, 8, 8]), g.const(0.1), g.const(0, dtype=np.uint8))
    y = g.ConvInteger(x, g.const(g.rng.integers(0, 9, (4, 3, 1, 1)), dtype=np.uint8))
    model = g.model(g.Cast(y, to=TensorProto.FLOAT))
    assert without_rounding(model, {}) is model
    assert RUNTIME.suited(model) is RUNTIME


def _offset(g: Builder, *shape: int, along: int | None = None) -> str:
    """A tensor of eight bits whose zero point is not zero, and what it stands for."""
    stored = g.const(g.rng.integers(0, 256, shape), dtype=np.uint8)
    if along is None:
        how, axis = (g.const(0.02), g.const(117, dtype=np.uint8)), {}
    else:
        scales = g.rng.uniform(0.01, 0.03, shape[along])
        how, axis = (g.const(scales), g.const(g.rng.integers(1, 256, shape[along]), dtype=np.uint8)), {"axis": along}
    return g.DequantizeLinear(stored, *how, **axis)


def _by_two(g: Builder, *shape: int) -> str:
    """A large tensor that two readers take for zero at unlike numbers, so that neither of them can be silenced."""
    stored = g.const(g.rng.integers(0, 256, shape), dtype=np.uint8)
    a, b = (g.DequantizeLinear(stored, g.const(0.02), g.const(point, dtype=np.uint8)) for point in (117, 3))
    return g.Sub(a, g.Mul(b, g.const(0.5)))


def _told(g: Builder, *shape: int) -> str:
    """A tensor whose zero the caller tells."""
    if not any(value.name == "point" for value in g.inputs):
        g.input("point", [], TensorProto.UINT8)
    return g.DequantizeLinear(g.const(g.rng.integers(0, 256, shape), dtype=np.uint8), g.const(0.02), "point")


@pytest.mark.parametrize("along", [None, 0, 1, -4, -3])
def test_a_weight_of_another_zero_is_silenced_with_that(along: int | None) -> None:
    g = Builder()
    x = g.node("Conv", g.input("x", [2, 3, 6, 6]), _offset(g, 12, 3, 1, 1, along=along), _offset(g, 12), name="a")
    x = g.node("Conv", g.Sigmoid(x), _offset(g, 11, 12, 1, 1, along=along), name="b")
    x = g.node("ConvTranspose", g.Sigmoid(x), g.Identity(_offset(g, 11, 4, 2, 2, along=along)), name="c")
    model = g.model(x)
    _, analysis, _, proof = pruned(model)
    assert [info.name for info in analysis.groups] == ["a", "b"]
    assert proof.max_relative_difference < 1e-6
    result = prune(model, speedup=2, threads=1, samples=8)
    removed = result.report.removed
    stored = {n.input[0]: n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    both = {name: removed[name] for name in stored if name in removed}
    assert both and all(removed[stored[name]] == gone for name, gone in both.items())


@pytest.mark.parametrize("weight", [_by_two, _told])
def test_a_zero_point_matters_where_weights_are_summed_over_and_nowhere_else(weight: Callable[..., str]) -> None:
    """Of a bias that cannot be made zero: what reads the channel silences it."""
    g = Builder()
    x = g.conv(g.input("x", [2, 3, 6, 6]), 12, bias=False, name="a")
    x = g.Relu(g.Add(x, weight(g, 12, 1, 1)))
    x = g.Relu(g.conv(x, 10, name="b"))  # zero where its weights are, whatever reads it
    x = g.Sigmoid(g.node("Conv", x, g.Identity(weight(g, 300, 10, 1, 1)), name="c"))
    model = g.model(g.node("Conv", x, g.Identity(weight(g, 260, 300, 1, 1)), name="d"))
    analysis = analysed(model)[0]
    assert [info.name for info in analysis.groups] == ["a", "b"]
    reasons = {f.reason: f.remedy for f in analysis.frozen if f.node == "d"}
    if weight is _by_two:  # the other one is no layer, whose weights stand in the file
        assert "one stored zero point" in next(
            reasons[r] for r in reasons if "a silenced channel is not zero there" in r
        )
    assert pruned(model)[3].max_relative_difference < 1e-6


@pytest.mark.parametrize(("make", "groups"), [(_told, 0), (_offset, 1), (Builder.weight, 1)])
def test_products_of_activations_are_cut_only_where_a_bias_can_be_silenced(
    make: Callable[..., str], groups: int
) -> None:
    g = Builder()
    x = g.input("x", [2, 7, 6])
    q, k = (g.linear(x, 8, name=name, bias=False) for name in "qk")
    q, k = (g.Add(y, make(g, 8)) for y in (q, k))
    _, analysis, _, proof = pruned(g.model(g.MatMul(q, g.Transpose(k, perm=[0, 2, 1]))))
    assert len(analysis.groups) == groups
    assert proof.max_relative_difference < 1e-6


@pytest.mark.parametrize("point", [0, 117])
def test_weights_that_the_graph_quantises_itself(point: int) -> None:
    """As training with simulated quantisation leaves them: a number, rounded to eight bits and back."""

    def rounded(g: Builder, *shape: int) -> str:
        how = (g.const(0.02), g.const(point, dtype=np.uint8))
        return g.DequantizeLinear(g.QuantizeLinear(g.Transpose(g.weight(*shape)), *how), *how)

    g = Builder()
    x = g.Gelu(g.Add(g.MatMul(g.input("x", [2, 5, 6]), rounded(g, 12, 6)), g.weight(12)), domain="com.microsoft")
    model = g.model(g.MatMul(g.Sigmoid(x), rounded(g, 4, 12)))
    _, analysis, _, proof = pruned(model)
    assert [info.units for info in analysis.groups] == [12]
    assert proof.max_relative_difference < 1e-6


@pytest.mark.parametrize("op", ["Exp", "Add"])
def test_a_weight_that_is_computed_from_integers_is_silenced_only_where_zero_stays_zero(op: str) -> None:
    """A weight of eight bits, and a number on top: zeros in the file do not take its channels out of a sum."""

    def weight(g: Builder, *shape: int, scaled: bool = False) -> str:
        values = g.const(g.rng.integers(-127, 128, shape), dtype=np.int8)
        w = g.DequantizeLinear(values, g.const(0.01))
        return g.Mul(w, g.const(0.5)) if scaled else g.node(op, w, *([g.const(0.3)] if op == "Add" else []))

    for scaled in (False, True):
        g = Builder()
        x = g.Sigmoid(g.conv(g.input("x", [2, 3, 6, 6]), 12, name="a"))
        x = g.Sigmoid(g.node("Conv", x, weight(g, 10, 12, 1, 1, scaled=scaled), name="b"))
        model = g.model(g.conv(x, 4, name="c"))
        _, analysis, _, proof = pruned(model)
        assert [info.consumers for info in analysis.groups] == [("b",), ("c",)][1 - scaled :]
        assert proof.max_relative_difference < 1e-6


def test_weights_of_four_bits_are_cut() -> None:
    g = Builder(opset=21)

    def weight(into: int, out: int) -> str:
        name, points = g.name("w"), g.name("z")
        g.initializers.append(
            helper.make_tensor(name, TensorProto.UINT4, (into, out), g.rng.integers(0, 16, into * out).tolist())
        )
        g.initializers.append(
            helper.make_tensor(points, TensorProto.UINT4, (out,), g.rng.integers(5, 11, out).tolist())
        )
        return g.DequantizeLinear(name, g.const(g.rng.uniform(0.02, 0.06, out)), points, axis=1)

    x = g.Sigmoid(g.MatMul(g.input("x", ["n", 7, 16]), weight(16, 48)))
    model = g.model(g.MatMul(x, weight(48, 16)))
    result = prune(model, speedup=2, threads=1, samples=8)
    assert result.report.achieved.macs == pytest.approx(2)
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    assert all(kinds[t.name] == t.data_type for t in result.model.graph.initializer)


def test_what_integers_stand_for_is_named_where_they_are_not_cut_alike() -> None:
    """Small integers that two readers take for zero at unlike numbers: each has its own copy, and loses its own."""
    g = Builder()
    x = g.Relu(g.conv(g.input("x", [2, 3, 6, 6]), 12, name="a"))
    stored = g.const(g.rng.integers(0, 256, (12, 12, 1, 1)), "integers", dtype=np.uint8)
    for name, point in (("one", 117), ("two", 90)):
        weight = g.node(
            "DequantizeLinear", stored, g.const(0.01), g.const(point, dtype=np.uint8), name=f"{name}_weight"
        )
        x = g.Relu(g.node("Conv", x, weight, name=name))
    removed = prune(g.model(g.conv(x, 4, name="last")), speedup=3, select="random", threads=1, samples=8).report.removed
    assert "integers" not in removed
    one, two = (removed[f"{name}_weight"] for name in ("one", "two"))
    assert one != two and one.get(0) == two.get(1)  # what the first one makes, the second one reads


def test_before_ir_4_a_weight_of_another_zero_stays() -> None:
    g = Builder(opset=13, ir=3)
    x = g.Relu(g.node("Conv", g.input("x", [2, 3, 6, 6]), g.weight(12, 3, 3, 3), name="a"))
    x = g.Sigmoid(g.node("Conv", x, g.weight(10, 12, 1, 1), name="b"))
    analysis = analysed(g.model(g.node("Conv", x, _offset(g, 4, 10, 1, 1), name="c")))[0]
    assert [info.name for info in analysis.groups] == ["a"]


def test_weights_that_training_left_rounded_along_their_filters_are_cut() -> None:
    """Each filter has a scale of its own, which goes with it and is not silenced: nothing is divided by it then."""

    def rounded(g: Builder, out: int, into: int, k: int) -> str:
        weight = g.rng.standard_normal((out, into, k, k)) / np.sqrt(into * k * k)
        how = (g.const(np.abs(weight).max((1, 2, 3)) / 127), g.const(np.zeros(out), dtype=np.int8))
        return g.DequantizeLinear(g.QuantizeLinear(g.Clip(g.const(weight), g.const(-1.0)), *how, axis=0), *how, axis=0)

    g = Builder()
    x = g.Relu(g.node("Conv", g.input("x", [2, 3, 6, 6]), rounded(g, 12, 3, 3), g.weight(12), pads=[1] * 4, name="a"))
    model = g.model(g.node("Conv", g.Sigmoid(x), rounded(g, 4, 12, 1), name="b"))
    _, analysis, _, proof = pruned(model)
    assert [info.name for info in analysis.groups] == ["a"]
    assert proof.max_relative_difference < 1e-5
