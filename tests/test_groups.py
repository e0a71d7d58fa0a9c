"""Units and groups of small graphs, as text: what goes together, and what stays and why.

A line is ``group xunits: weight.axis:positions-per-unit …``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from builder import Builder, analysed, pruned, table

from onnxprune import choices

GRAPHS: dict[str, tuple[Callable[[], onnx.ModelProto], list[str]]] = {}


def graph(*lines: str) -> Callable[[Callable[[Builder], str | tuple[str, ...]]], None]:
    """Register a graph with the groups that it has to have."""

    def register(make: Callable[[Builder], str | tuple[str, ...]]) -> None:
        def model() -> onnx.ModelProto:
            g = Builder()
            outputs = make(g)
            return g.model(*([outputs] if isinstance(outputs, str) else outputs))

        GRAPHS[make.__name__] = (model, list(lines))

    return register


def image(g: Builder, channels: int = 3) -> str:
    """An input of 2 images."""
    return g.input("x", [2, channels, 6, 6])


def conv(g: Builder, x: str, name: str, out: int, **options: object) -> str:
    """A convolution whose weights are called as it is."""
    channels = g.shape(x)[1]
    k = options.pop("k", 3)
    group = options.get("group", 1)
    weight = g.weight(out, channels // group, k, k, name=f"{name}.w")
    return g.node("Conv", x, weight, g.weight(out, name=f"{name}.b"), name=name, pads=[k // 2] * 4, **options)


@graph("a x4: a.w.0:1 a.b.0:1 b.w.1:1")
def chain(g: Builder) -> str:
    return conv(g, g.Relu(conv(g, image(g), "a", 4)), "b", 5)


@graph("a x4: a.w.0:1 a.b.0:1 b.w.0:1 b.w.1:1 b.b.0:1 c.w.1:1")
def residual(g: Builder) -> str:
    x = conv(g, image(g), "a", 4)
    return conv(g, g.Relu(g.Add(x, conv(g, g.Relu(x), "b", 4))), "c", 5)


@graph("a x4: a.w.0:1 a.b.0:1 c.w.1:1", "b x3: b.w.0:1 b.b.0:1 c.w.1:1")
def concat(g: Builder) -> str:
    x = image(g)
    return conv(g, g.Concat(conv(g, x, "a", 4), conv(g, x, "b", 3), axis=1), "c", 5)


@graph("a x4: a.w.0:1 a.b.0:1 dw.w.0:1 dw.b.0:1 c.w.1:1")
def depthwise(g: Builder) -> str:
    return conv(g, conv(g, conv(g, image(g), "a", 4), "dw", 4, group=4), "c", 5)


@graph("a x4: a.w.0:1 a.b.0:1 dw.w.0:2 dw.b.0:2 c.w.1:2")
def depthwise_with_multiplier(g: Builder) -> str:
    return conv(g, conv(g, conv(g, image(g), "a", 4), "dw", 8, group=4), "c", 5)


@graph("a x4: a.w.0:1 a.b.0:1 fc.w.1:36")
def flatten_into_gemm(g: Builder) -> str:
    x = g.Flatten(conv(g, image(g), "a", 4))
    return g.Gemm(x, g.weight(7, 144, name="fc.w"), g.weight(7, name="fc.b"), transB=1)


@graph("a x4: a.w.0:1 a.b.0:1 down.w.1:1 up.w.0:1 up.b.0:1 c.w.1:1", "down x2: down.w.0:1 down.b.0:1 up.w.1:1")
def squeeze_and_excitation(g: Builder) -> str:
    x = conv(g, image(g), "a", 4)
    gate = g.Relu(conv(g, g.GlobalAveragePool(x), "down", 2, k=1))
    return conv(g, g.Mul(x, g.Sigmoid(conv(g, gate, "up", 4, k=1))), "c", 5)


@graph("a x3: a.w.0:2 a.b.0:2 c.w.1:2")
def shuffle(g: Builder) -> str:
    x = conv(g, image(g), "a", 6)
    x = g.Reshape(x, g.const([2, 2, 3, 6, 6]))
    x = g.Reshape(g.Transpose(x, perm=[0, 2, 1, 3, 4]), g.const([2, 6, 6, 6]))
    return conv(g, x, "c", 5)


@graph("a x6: a.w.0:1 a.b.0:1 c.w.1:1")
def shuffle_by_gather(g: Builder) -> str:
    x = g.Gather(conv(g, image(g), "a", 6), g.const([0, 3, 1, 4, 2, 5]), axis=1)
    return conv(g, x, "c", 5)


@graph("a x3: a.w.0:2 a.b.0:2 c.w.1:1")
def gated_linear_unit(g: Builder) -> str:
    value, gate = g.node("Split", conv(g, image(g), "a", 6), outputs=2, axis=1)
    return conv(g, g.Mul(value, g.Sigmoid(gate)), "c", 5)


@graph("a x2: a.w.0:1 a.b.0:1 c.w.1:1", "a#2 x4: a.w.0:1 a.b.0:1 d.w.1:1")
def uneven_split(g: Builder) -> tuple[str, str]:
    one, two = g.node("Split", conv(g, image(g), "a", 6), g.const([2, 4]), outputs=2, axis=1)
    return conv(g, one, "c", 5), conv(g, two, "d", 3)


@graph("a x4: a.w.0:1 a.b.0:1 c.w.1:1 d.w.1:1")
def two_heads(g: Builder) -> tuple[str, str]:
    x = g.Relu(conv(g, image(g), "a", 4))
    return conv(g, x, "c", 5), conv(g, x, "d", 2)


@graph("a x3: a.w.0:1 a.b.0:1 b.w.0:1 b.b.0:1 c.w.1:1", "b x2: b.w.0:1 b.b.0:1 c.w.1:1")
def padded_shortcut(g: Builder) -> str:
    x = conv(g, image(g), "a", 3)
    short = g.Pad(x, g.const([0, 0, 0, 0, 0, 2, 0, 0]))
    return conv(g, g.Add(short, conv(g, g.Relu(image_of(x)), "b", 5)), "c", 4)


def image_of(x: str) -> str:
    """The graph's input, whatever came of it since."""
    return "x"


@graph("a x4: bn.s.0:1 bn.b.0:1 bn.m.0:1 bn.v.0:1 a.w.0:1 a.b.0:1 c.w.1:1")
def batch_normalization(g: Builder) -> str:
    vectors = [g.const(g.rng.uniform(0.5, 1, 4), f"bn.{v}") for v in "sbmv"]
    return conv(g, g.BatchNormalization(conv(g, image(g), "a", 4), *vectors), "c", 5)


@graph("a x4: a.w.1:1 a.b.0:1 c.w.1:1")
def transposed_convolution(g: Builder) -> str:
    x = g.node("ConvTranspose", image(g), g.weight(3, 4, 2, 2, name="a.w"), g.weight(4, name="a.b"), name="a")
    return conv(g, x, "c", 5)


@graph("mm x8: mm.w.1:1 mm.b.0:1 out.w.0:1")
def feed_forward(g: Builder) -> str:
    x = g.input("x", [2, 5, 6])
    y = g.Add(g.node("MatMul", x, g.weight(6, 8, name="mm.w"), name="mm"), g.weight(8, name="mm.b"))
    return g.Add(x, g.MatMul(g.Erf(y), g.weight(8, 6, name="out.w")))


def attention(g: Builder, heads: int = 3, size: int = 4, activation: str = "") -> str:
    """Self-attention as exporters decompose it."""
    x = g.input("x", [2, 5, 6])
    parts = {}
    for which, perm in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        y = g.node("MatMul", x, g.weight(6, heads * size, name=f"{which}.w"), name=which)
        y = g.Add(y, g.weight(heads * size, name=f"{which}.b"))
        if activation and which != "v":
            y = g.node(activation, y)
        parts[which] = g.Transpose(g.Reshape(y, g.const([0, 0, heads, size])), perm=perm)
    scores = g.Softmax(g.Mul(g.MatMul(parts["q"], parts["k"]), g.const(0.5)), axis=-1)
    y = g.Reshape(g.Transpose(g.MatMul(scores, parts["v"]), perm=[0, 2, 1, 3]), g.const([0, 0, heads * size]))
    return g.Add(x, g.MatMul(y, g.weight(heads * size, 6, name="o.w")))


@graph("q x3: q.w.1:4 q.b.0:4 k.w.1:4 k.b.0:4 v.w.1:4 v.b.0:4 o.w.0:4")
def attention_by_heads(g: Builder) -> str:
    return attention(g, 3, 4, "Sigmoid")  # dimensions of q and k cannot go: a silenced one is not zero there


@graph("q x4: q.w.1:3 q.b.0:3 k.w.1:3 k.b.0:3", "v x4: v.w.1:3 v.b.0:3 o.w.0:3")
def attention_by_head_dimensions(g: Builder) -> str:
    # in the sum over q and k the dimensions are zero when silenced: six times more to choose from than by heads
    return attention(g, 3, 4)


@graph("a x2: a.w.0:2 a.b.0:2 gc.w.1:1", "gc x3: gc.w.0:2 gc.b.0:2 c.w.1:2")
def grouped_convolution_by_slots(g: Builder) -> str:
    return conv(g, conv(g, conv(g, image(g), "a", 4), "gc", 6, group=2), "c", 5)


@graph("a x2: a.w.0:2 a.b.0:2 gc.w.0:2 gc.b.0:2 c.w.1:2")
def grouped_convolution_by_groups(g: Builder) -> str:
    # the slots of a group cannot go: before and after they stand on an axis that a softmax mixes
    def mixed(x: str) -> str:
        return g.Reshape(g.Softmax(g.Reshape(x, g.const([2, 2, 2, 36])), axis=2), g.const([2, 4, 6, 6]))

    return conv(g, mixed(conv(g, mixed(conv(g, image(g), "a", 4)), "gc", 4, group=2)), "c", 5)


@graph("a x4: a.w.0:1 a.b.0:1 c.w.1:4")
def space_to_depth(g: Builder) -> str:
    return conv(g, g.SpaceToDepth(conv(g, image(g), "a", 4), blocksize=2), "c", 5)


@graph("a x3: a.w.0:4 a.b.0:4 c.w.1:1")
def pixel_shuffle(g: Builder) -> str:
    return conv(g, g.DepthToSpace(conv(g, image(g), "a", 12), blocksize=2, mode="CRD"), "c", 5)


@pytest.mark.parametrize("name", GRAPHS)
def test_groups(name: str) -> None:
    make, lines = GRAPHS[name]
    analysis, _ = analysed(make())
    assert table(analysis) == lines


@pytest.mark.parametrize("name", GRAPHS)
def test_a_random_plan_of_it_is_proven(name: str) -> None:
    _, _, _, proof = pruned(GRAPHS[name][0](), seed=1)
    assert proof.max_relative_difference < 1e-5


@pytest.mark.parametrize("name", GRAPHS)
def test_choices_made_part_by_part_are_those_made_on_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    apart, _ = analysed(GRAPHS[name][0]())
    monkeypatch.setattr(choices._Part, "parts", lambda part: [part])
    whole, _ = analysed(GRAPHS[name][0]())
    assert table(apart) == table(whole)
    assert apart.frozen == whole.frozen


def test_two_networks_side_by_side_are_cut_as_each_alone() -> None:
    g = Builder()
    x = g.input("x", [2, 3, 6, 6])
    alone, ends = [], []
    for name in ("one", "two", "three"):
        y = conv(g, conv(g, conv(g, x, f"{name}.a", 4), f"{name}.gc", 6, group=2), f"{name}.c", 5)
        alone += [
            f"{name}.a x2: {name}.a.w.0:2 {name}.a.b.0:2 {name}.gc.w.1:1",
            f"{name}.gc x3: {name}.gc.w.0:2 {name}.gc.b.0:2 {name}.c.w.1:2",
        ]
        ends.append(y)
    analysis, _ = analysed(g.model(*ends))
    assert table(analysis) == alone


def frozen(make: Callable[[Builder], str | tuple[str, ...]]) -> list[str]:
    """What stays, as ``tensor.axis channels: reason (operator)``, without the graph's own inputs and outputs."""
    g = Builder()
    outputs = make(g)
    analysis, _ = analysed(g.model(*([outputs] if isinstance(outputs, str) else outputs)))
    skip = ("an input of the graph", "an output of the graph")
    return [
        f"{f.channels}: {f.reason} ({f.op} of {','.join(f.layers)})" for f in analysis.frozen if f.reason not in skip
    ]


def test_a_normalised_axis_stays() -> None:
    def make(g: Builder) -> str:
        x = g.node("MatMul", g.input("x", [2, 5, 6]), g.weight(6, 8), name="a")
        x = g.node("LayerNormalization", x, g.const(np.ones(8)), g.const(np.zeros(8)), axis=-1, name="norm")
        return g.node("MatMul", x, g.weight(8, 3), name="b")

    assert frozen(make) == [
        f"8: LayerNormalization mixes the values of this axis (LayerNormalization of {layer})" for layer in "ab"
    ]


def test_an_operator_without_a_row_freezes_what_it_touches() -> None:
    def make(g: Builder) -> str:
        x = conv(g, image(g), "a", 4)
        x = g.node("Inverse", x, domain="com.microsoft", name="inverse")
        return g.node("Conv", x, g.weight(3, 4, 1, 1), name="b")

    said = "no rule for operator com.microsoft.Inverse"
    assert frozen(make) == [f"4: {said} (Inverse of {layer})" for layer in "ab"]


def test_a_sum_over_what_is_not_zero_stays() -> None:
    def make(g: Builder) -> str:
        x = g.Sigmoid(conv(g, image(g), "a", 4))
        return conv(g, g.ReduceSum(x, g.const([1]), keepdims=1, name="sum"), "b", 3)

    said = "ReduceSum sums over this axis, and a silenced channel is not zero there"
    assert frozen(make) == [f"4: {said} (ReduceSum of a)"]


def test_a_sum_over_what_is_zero_when_silenced_goes() -> None:
    g = Builder()
    x = g.Relu(conv(g, image(g), "a", 4))
    analysis, _ = analysed(g.model(conv(g, g.ReduceSum(x, g.const([1]), keepdims=1), "b", 3)))
    assert table(analysis) == ["a x4: a.w.0:1 a.b.0:1"]


def test_channels_that_could_only_go_together_stay() -> None:
    """A shuffle of three times four channels spreads those that a convolution of three groups reads alike over all."""

    def make(g: Builder) -> str:
        x = g.Reshape(conv(g, image(g), "a", 12), g.const([2, 3, 4, 6, 6]))
        x = g.Reshape(g.Transpose(x, perm=[0, 2, 1, 3, 4]), g.const([2, 12, 6, 6]))
        return conv(g, x, "b", 6, group=3)

    assert frozen(make) == ["12: its channels could only go all together (Conv of a,b)"]


def test_an_axis_goes_through_the_branches_of_an_if() -> None:
    g = Builder()
    x = conv(g, image(g), "a", 4)
    body = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", [x], ["inner"])], "body", [], [onnx.helper.make_empty_tensor_value_info("inner")]
    )
    y = g.node("If", g.input("condition", [], onnx.TensorProto.BOOL), then_branch=body, else_branch=body, name="if")
    analysis, _ = analysed(g.model(conv(g, y, "b", 5)))
    assert table(analysis) == ["a x4: a.w.0:1 a.b.0:1 b.w.1:1"]
