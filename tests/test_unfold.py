"""Unfolded layers: rows @ matrix is the layer's output; and the sums that are kept of the rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from builder import Builder, run
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxprune.graph import Graph
from onnxprune.layers import Layer, layer_of
from onnxprune.statistics import Gram, Statistics, Sums
from onnxprune.unfold import Unfolding, from_matrices, out_positions, sample_positions, to_matrices

# name: operator, input, weight, attributes
LAYERS: dict[str, tuple[str, list[int], list[int], dict[str, Any]]] = {
    "conv1": ("Conv", [2, 3, 9], [4, 3, 3], {}),
    "conv1-strided": ("Conv", [2, 3, 10], [4, 3, 4], {"strides": [3], "pads": [2, 1]}),
    "conv2": ("Conv", [2, 3, 6, 5], [4, 3, 3, 2], {}),
    "conv2-1x1": ("Conv", [2, 3, 4, 5], [4, 3, 1, 1], {"strides": [2, 1]}),
    "conv2-strides": ("Conv", [2, 3, 8, 7], [4, 3, 3, 3], {"strides": [2, 3]}),
    "conv2-pads": ("Conv", [2, 3, 5, 6], [4, 3, 3, 3], {"pads": [0, 2, 1, 3]}),
    "conv2-dilations": ("Conv", [2, 3, 9, 9], [4, 3, 3, 2], {"dilations": [2, 3], "pads": [1, 0, 2, 3]}),
    "conv2-group": ("Conv", [2, 6, 5, 5], [9, 2, 3, 3], {"group": 3, "pads": [1, 1, 1, 1]}),
    "conv2-depthwise": ("Conv", [2, 4, 5, 5], [8, 1, 3, 3], {"group": 4}),
    "conv2-everything": (
        "Conv",
        [2, 4, 11, 9],
        [6, 2, 3, 2],
        {"group": 2, "strides": [2, 1], "dilations": [2, 2], "pads": [1, 2, 0, 1]},
    ),
    "conv3": ("Conv", [2, 3, 5, 4, 6], [4, 3, 2, 3, 3], {"strides": [1, 2, 2], "pads": [1, 0, 1, 0, 1, 2]}),
    "conv2-same-upper": ("Conv", [2, 3, 7, 8], [4, 3, 4, 3], {"auto_pad": "SAME_UPPER"}),
    "conv2-same-lower": ("Conv", [2, 3, 7, 8], [4, 3, 4, 3], {"auto_pad": "SAME_LOWER"}),
    "conv2-same-upper-strided": ("Conv", [2, 3, 8, 9], [4, 3, 3, 4], {"auto_pad": "SAME_UPPER", "strides": [2, 3]}),
    "conv2-same-lower-strided": ("Conv", [2, 3, 8, 9], [4, 3, 3, 4], {"auto_pad": "SAME_LOWER", "strides": [2, 3]}),
    "conv2-same-short-kernel": ("Conv", [2, 3, 9, 9], [4, 3, 1, 2], {"auto_pad": "SAME_UPPER", "strides": [3, 3]}),
    "conv2-valid": ("Conv", [2, 3, 7, 8], [4, 3, 3, 3], {"auto_pad": "VALID", "strides": [2, 2]}),
    "conv1-same-lower": ("Conv", [2, 3, 7], [4, 3, 2], {"auto_pad": "SAME_LOWER"}),
    "transpose2-same-upper-odd": (
        "ConvTranspose",
        [2, 3, 4, 5],
        [3, 4, 4, 3],
        {"strides": [3, 2], "auto_pad": "SAME_UPPER"},
    ),
    "transpose2-same-lower-odd": (
        "ConvTranspose",
        [2, 3, 4, 5],
        [3, 4, 4, 3],
        {"strides": [3, 2], "auto_pad": "SAME_LOWER"},
    ),
    "transpose2-output-shape-odd": (
        "ConvTranspose",
        [2, 3, 4, 5],
        [3, 4, 3, 3],
        {"strides": [2, 2], "output_shape": [8, 10]},
    ),
    "transpose1": ("ConvTranspose", [2, 3, 5], [3, 4, 3], {"strides": [2]}),
    "transpose2": ("ConvTranspose", [2, 3, 4, 5], [3, 4, 3, 2], {}),
    "transpose2-strides": ("ConvTranspose", [2, 3, 4, 3], [3, 4, 3, 2], {"strides": [2, 3]}),
    "transpose2-pads": ("ConvTranspose", [2, 3, 4, 5], [3, 4, 3, 4], {"strides": [2, 1], "pads": [1, 0, 0, 2]}),
    "transpose2-dilations": ("ConvTranspose", [2, 3, 4, 5], [3, 4, 3, 2], {"strides": [1, 2], "dilations": [2, 3]}),
    "transpose2-output-padding": (
        "ConvTranspose",
        [2, 3, 4, 5],
        [3, 4, 3, 3],
        {"strides": [2, 3], "pads": [1, 1, 1, 1], "output_padding": [1, 2]},
    ),
    "transpose2-group": (
        "ConvTranspose",
        [2, 6, 4, 4],
        [6, 2, 4, 4],
        {"group": 3, "strides": [2, 2], "pads": [1, 1, 1, 1]},
    ),
    "transpose2-same-upper-even": (
        "ConvTranspose",
        [2, 3, 4, 5],
        [3, 4, 5, 4],
        {"strides": [3, 2], "auto_pad": "SAME_UPPER"},
    ),
    "transpose2-same-lower-even": (
        "ConvTranspose",
        [2, 3, 4, 5],
        [3, 4, 5, 4],
        {"strides": [3, 2], "auto_pad": "SAME_LOWER"},
    ),
    "transpose2-valid": ("ConvTranspose", [2, 3, 4, 5], [3, 4, 3, 3], {"strides": [2, 2], "auto_pad": "VALID"}),
    "transpose2-output-shape-even": (
        "ConvTranspose",
        [2, 3, 4, 5],
        [3, 4, 3, 3],
        {"strides": [2, 2], "output_shape": [7, 9]},
    ),
    "transpose3": ("ConvTranspose", [2, 3, 2, 3, 2], [3, 4, 2, 3, 2], {"strides": [2, 1, 2]}),
    "gemm": ("Gemm", [5, 3], [3, 4], {}),
    "gemm-transB": ("Gemm", [5, 3], [4, 3], {"transB": 1}),
    "matmul2": ("MatMul", [5, 3], [3, 4], {}),
    "matmul3": ("MatMul", [2, 6, 3], [3, 4], {}),
    "matmul4": ("MatMul", [2, 3, 4, 5], [5, 6], {}),
}


class Case:
    """A model of one node, its layer and unfolding, an input and onnxruntime's output."""

    def __init__(self, op: str, in_shape: list[int], weight_shape: list[int], attributes: dict[str, Any]) -> None:
        g = Builder()
        x = g.input("x", in_shape)
        inputs = [x, g.weight(*weight_shape, name="w")]
        if op != "MatMul":
            g.weight(self.outputs(op, weight_shape, attributes), name="b")
            inputs.append("b")
        model = g.model(g.node(op, *inputs, **attributes))
        self.graph = Graph(model)
        layer = layer_of(self.graph.nodes[0], self.graph)
        assert layer is not None
        self.layer: Layer = layer
        self.weight = self.graph.array("w")
        self.x = np.random.default_rng(1).standard_normal(in_shape).astype(np.float32)
        self.y = run(model, {"x": self.x})[0]
        self.unfolding = Unfolding.of(layer, tuple(weight_shape), self.x.shape, self.y.shape)
        self.out = out_positions(layer, self.y.shape)
        self.total = int(np.prod(self.out, dtype=np.int64))

    @staticmethod
    def outputs(op: str, weight_shape: list[int], attributes: dict[str, Any]) -> int:
        if op == "ConvTranspose":
            return weight_shape[1] * attributes.get("group", 1)
        return weight_shape[0] if op == "Conv" or attributes.get("transB") else weight_shape[1]

    def matrices(self) -> np.ndarray:
        """Weights with the bias in the last row, (group, p, outputs / group)."""
        found = to_matrices(self.layer, self.weight)
        outputs = found.shape[0] * found.shape[2]
        bias = self.graph.array("b") if self.layer.bias else np.zeros(outputs)
        return np.concatenate([found, bias.reshape(found.shape[0], 1, -1)], axis=1)


@pytest.fixture(params=LAYERS)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*LAYERS[request.param])


def test_rows_times_matrix_is_the_output(case: Case) -> None:
    positions = np.arange(case.total)
    rows = case.unfolding.rows(case.x, positions, case.out)
    assert rows.shape == (case.layer.group, len(case.x) * case.total, case.matrices().shape[1])
    np.testing.assert_allclose(rows @ case.matrices(), case.unfolding.targets(case.y, positions), rtol=0, atol=2e-6)


def test_sampled_positions_are_a_part_of_all(case: Case) -> None:
    some = sample_positions(case.total, max(case.total // 2, 1), np.random.default_rng(2))
    n = len(case.x)
    for make, given_ in (
        (lambda at: case.unfolding.rows(case.x, at, case.out), case.x),
        (lambda at: case.unfolding.targets(case.y, at), case.y),
    ):
        everything, part = make(np.arange(case.total)), make(some)
        picked = everything.reshape(len(everything), n, case.total, -1)[:, :, some]
        assert given_.dtype == part.dtype
        np.testing.assert_array_equal(part, picked.reshape(part.shape))


def test_all_positions_come_in_one_order_or_another(case: Case) -> None:
    rows, targets = case.unfolding.everywhere(case.x, case.out), case.unfolding.targets_everywhere(case.y)
    assert (rows.dtype, targets.dtype) == (case.x.dtype, case.y.dtype)
    np.testing.assert_allclose(rows @ case.matrices(), targets, rtol=0, atol=2e-6)
    given = case.unfolding.rows(case.x, np.arange(case.total), case.out)
    for group, each in enumerate(rows):
        np.testing.assert_array_equal(each[np.lexsort(each.T)], given[group][np.lexsort(given[group].T)])


def test_the_last_column_is_one(case: Case) -> None:
    rows = case.unfolding.rows(case.x, np.arange(case.total), case.out)
    assert (rows[:, :, -1] == 1).all()


def test_matrices_go_back_to_the_weight(case: Case) -> None:
    matrices = to_matrices(case.layer, case.weight)
    assert matrices.dtype == np.float64
    np.testing.assert_array_equal(from_matrices(case.layer, matrices, case.weight.shape), case.weight)


def test_the_columns_of_a_slot_are_those_that_its_weights_stand_in(case: Case) -> None:
    axis, group = case.layer.weight_axis, case.layer.group if case.layer.node.op == "ConvTranspose" else 1
    for slot in range(case.weight.shape[axis] // group):
        marked = np.zeros(case.weight.shape)
        for g in range(group):  # the slots of a transposed convolution's groups stand one behind the other
            marked[(slice(None),) * axis + (slot + g * (case.weight.shape[axis] // group),)] = 1
        rows = np.flatnonzero(to_matrices(case.layer, marked).any(axis=(0, 2)))
        np.testing.assert_array_equal(case.unfolding.columns(np.array([slot])), rows)


def test_columns_of_several_slots_per_unit() -> None:
    unfolding = Unfolding((3, 2), (1, 1), (1, 1), (0, 0))
    assert unfolding.taps == 6
    assert unfolding.columns(np.array([[0, 2], [1, 3]])).tolist() == [
        [*range(6), *range(12, 18)],
        [*range(6, 12), *range(18, 24)],
    ]
    assert Unfolding().taps == 1
    assert Unfolding().columns(np.array([[4], [1]])).tolist() == [[4], [1]]


def test_half_precision_is_unfolded_in_single() -> None:
    x = np.ones((2, 3, 4, 4), np.float16)
    unfolding = Unfolding((3, 3), (1, 1), (1, 1), (1, 1))
    assert unfolding.rows(x, np.arange(16), (4, 4)).dtype == np.float32
    assert unfolding.targets(x, np.arange(16)).dtype == np.float32


@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_sampled_positions_are_sorted_distinct_and_as_many_as_asked_for(total: int, count: int, seed: int) -> None:
    found = sample_positions(total, count, np.random.default_rng(seed))
    assert len(found) == min(total, count)
    assert (np.diff(found) > 0).all()
    assert found[0] >= 0
    assert found[-1] < total


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[str, list[int], list[int], dict[str, Any]]:
    """Legal two-dimensional convolutions of either kind."""
    group = draw(st.integers(1, 3))
    c, o = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel = draw(st.lists(st.integers(1, 4), min_size=2, max_size=2))
    attributes: dict[str, Any] = {
        "group": group,
        "strides": draw(st.lists(st.integers(1, 3), min_size=2, max_size=2)),
        "dilations": draw(st.lists(st.integers(1, 2), min_size=2, max_size=2)),
    }
    transposed = draw(st.booleans())
    # padding below the kernel's reach, as transposed convolutions need it
    attributes["pads"] = [draw(st.integers(0, min(kernel[a % 2] - 1, 2))) for a in range(4)]
    size = [
        draw(st.integers((k - 1) * d + 1, (k - 1) * d + 4))
        for k, d in zip(kernel, attributes["dilations"], strict=True)
    ]
    if transposed:
        return "ConvTranspose", [2, group * c, *size], [group * c, o, *kernel], attributes
    return "Conv", [2, group * c, *size], [group * o, c, *kernel], attributes


@given(convolutions())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_convolution_is_its_matrix_product(drawn: tuple[str, list[int], list[int], dict[str, Any]]) -> None:
    case = Case(*drawn)
    positions = np.arange(case.total)
    found = case.unfolding.rows(case.x, positions, case.out) @ case.matrices()
    np.testing.assert_allclose(found, case.unfolding.targets(case.y, positions), rtol=0, atol=5e-6)


# ------------------------------------------------------------------------------------------------------ statistics


def draws(rows: int, seed: int = 0, dtype: type = np.float64) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = np.concatenate([rng.standard_normal((rows, 6)), np.ones((rows, 1))], axis=1)
    return x.astype(dtype), rng.standard_normal((rows, 3)).astype(dtype)


def summed(x: np.ndarray, y: np.ndarray) -> Statistics:
    sums = Sums(x.shape[1], y.shape[1])
    sums.add(x, y)
    return sums.statistics


def assert_same(a: Statistics, b: Statistics, rtol: float) -> None:
    assert a.rows == b.rows
    for one, two in ((a.gram, b.gram), (a.cross, b.cross), (a.energy, b.energy)):
        assert one.dtype == np.float64
        np.testing.assert_allclose(one, two, rtol=rtol, atol=rtol * np.abs(two).max())


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float64, 1e-13), (np.float32, 1e-6)])
def test_batches_add_up(dtype: type, rtol: float) -> None:
    x, y = draws(50, dtype=dtype)
    parts = [summed(x[a:b], y[a:b]) for a, b in ((0, 7), (7, 30), (30, 50))]
    sums = Sums(7, 3)
    for a, b in ((0, 7), (7, 30), (30, 50)):
        sums.add(x[a:b], y[a:b])
    streamed = sums.statistics
    whole = Statistics(
        x.T @ x.astype(np.float64), x.T @ y.astype(np.float64), np.square(y, dtype=np.float64).sum(0), 50
    )
    assert_same(parts[0] + parts[1] + parts[2], whole, rtol)
    assert_same(streamed, whole, rtol)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("order", ["C", "F", "neither"])
@pytest.mark.parametrize("together", [1, 20, 1000])
def test_a_gram_matrix_comes_from_rows_in_any_order(
    dtype: type, order: str, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxprune.statistics._TOGETHER", (together, together))
    x = np.random.default_rng(0).standard_normal((50, 7)).astype(dtype)
    gram = Gram(7)
    for a, b in ((0, 7), (7, 7), (7, 30), (30, 50)):
        part = np.repeat(x[a:b], 2, axis=1)[:, ::2] if order == "neither" else x[a:b].copy(order)
        gram.add(part)
    expected = x.astype(np.float64).T @ x.astype(np.float64)
    np.testing.assert_allclose(gram.value, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(gram.value, gram.value.T)


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_the_error_is_that_of_the_residual(seed: int) -> None:
    x, y = draws(30, seed)
    weights = np.random.default_rng(seed + 1).standard_normal((7, 3))
    assert summed(x, y).error(weights) == pytest.approx(np.square(y - x @ weights).sum(), rel=1e-12)


def test_the_error_is_never_negative() -> None:
    x, _ = draws(30)
    weights = np.random.default_rng(1).standard_normal((7, 3))
    error = summed(x, x @ weights).error(weights)
    assert 0 <= error < 1e-10


def test_the_statistics_of_a_linear_target_need_no_target() -> None:
    x, _ = draws(30)
    weights = np.random.default_rng(1).standard_normal((7, 3))
    assert_same(Statistics.of_linear(x.T @ x, weights, 30), summed(x, x @ weights), 1e-13)
