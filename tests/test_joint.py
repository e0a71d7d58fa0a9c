"""Blocks of neighbouring layers, their linear map and its transpose, and the fit of both sides together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import onnx
import pytest
from builder import RUNTIME, Builder, analysed
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxprune import descent, views
from onnxprune.analysis import Analysis
from onnxprune.answers import Answer
from onnxprune.batches import JUDGING, Batches
from onnxprune.blocks import Block, BlockData, find_blocks
from onnxprune.data import InputSpec, load_calibration
from onnxprune.descent import _factor, fit_block
from onnxprune.joint import (
    Linear,
    Network,
    Part,
    Vector,
    adjoint,
    current,
    look,
    stored_tensors,
)
from onnxprune.layers import Layer
from onnxprune.parallel import workers
from onnxprune.readers import find_readers
from onnxprune.reconstruct import Saturation
from onnxprune.surroundings import look_behind
from onnxprune.taking import Taking
from onnxprune.unfold import Unfolding
from onnxprune.views import View

# ------------------------------------------------------------------------------------------------------ the networks


def image(g: Builder) -> str:
    return g.Relu(g.conv(g.input("x", ["n", 3, 6, 6]), 4, name="stem"), name="stem_out")


def head(g: Builder, x: str) -> str:
    return g.gemm(g.Flatten(g.GlobalAveragePool(x)), 3, name="head")


def plain(g: Builder) -> str:
    return head(g, g.Relu(g.conv(g.Relu(g.conv(image(g), 6, name="a")), 4, name="b", strides=[2, 2])))


def gated(g: Builder) -> str:
    """x * sigmoid(x) stands between, and a normalisation's product with constants."""
    y = g.conv(image(g), 6, name="a")
    y = g.Mul(y, g.Sigmoid(y))
    return head(g, g.conv(g.Mul(y, g.const(g.rng.uniform(0.5, 2, (6, 1, 1)))), 4, name="b"))


def expanding(g: Builder) -> str:
    """Two layers put side by side, and read twice."""
    x = image(g)
    y = g.Concat(g.Relu(g.conv(x, 5, k=1, name="a")), g.Tanh(g.conv(x, 6, name="c")), axis=1)
    return head(g, g.Concat(g.conv(y, 4, name="b"), g.Relu(g.conv(y, 3, k=1, name="d")), axis=1))


def beside(g: Builder) -> str:
    """A layer between two tensors that no layer of the block makes."""
    x = image(g)
    pooled = [g.node(op, x, kernel_shape=[3, 3], pads=[1] * 4) for op in ("MaxPool", "AveragePool")]
    y = g.Concat(pooled[0], g.Relu(g.conv(x, 6, name="a")), pooled[1], axis=1)
    return head(g, g.conv(y, 4, name="b"))


def grouped(g: Builder) -> str:
    return head(g, g.conv(g.Relu(g.conv(image(g), 6, group=2, name="a")), 4, group=2, name="b"))


def upwards(g: Builder) -> str:
    y = g.ConvTranspose(image(g), g.weight(4, 5, 3, 3), g.weight(5), name="a", strides=[2, 2], pads=[1, 1, 0, 0])
    return head(g, g.ConvTranspose(g.Relu(y), g.weight(5, 4, 2, 2), g.weight(4), name="b", strides=[2, 2]))


def tokens(g: Builder) -> str:
    x = g.linear(g.input("x", ["n", 5, 4]), 4, name="stem")
    return g.linear(g.Relu(g.linear(g.Gelu(g.linear(x, 7, name="a")), 6, name="b", bias=False)), 3, name="c")


def normalised(g: Builder) -> str:
    y = g.Relu(g.batch_norm(g.conv(image(g), 6, name="a"), name="norm"))
    return head(g, g.Relu(g.batch_norm(g.conv(y, 4, name="b"), name="norm2")))


def normalised_positions(g: Builder) -> str:
    """A normalisation takes the second axis for the channels, and that is as long as the last one."""
    x = g.linear(g.input("x", ["n", 7, 4]), 4, name="stem")
    y = g.batch_norm(g.linear(x, 7, name="a", bias=False), name="norm")
    return g.linear(g.Relu(y), 3, name="b")


def read_elsewhere(g: Builder) -> str:
    y = g.Relu(g.conv(image(g), 6, name="a"))
    return head(g, g.Concat(g.conv(y, 4, name="b"), y, axis=1))


def pooled(g: Builder) -> str:
    y = g.MaxPool(g.Relu(g.conv(image(g), 6, name="a")), kernel_shape=[2, 2], strides=[2, 2])
    return head(g, g.conv(y, 4, name="b"))


def overlapping(g: Builder) -> str:
    """A pool whose windows overlap, begin in the padding and end beyond it, behind two layers put side by side."""
    x = image(g)
    y = g.Concat(g.Relu(g.conv(x, 5, k=1, name="a")), g.Tanh(g.conv(x, 6, name="c")), axis=1)
    y = g.MaxPool(y, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 0, 0, 1], ceil_mode=1)
    return head(g, g.Concat(g.conv(y, 4, name="b"), g.Relu(g.conv(y, 3, k=1, name="d")), axis=1))


def padded_to_size(g: Builder) -> str:
    y = g.MaxPool(g.Relu(g.conv(image(g), 6, name="a")), kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER")
    return head(g, g.conv(y, 4, name="b"))


def pooled_for_two(g: Builder) -> str:
    """What is pooled is read unpooled as well."""
    y = g.Relu(g.conv(image(g), 6, name="a"))
    z = g.conv(g.MaxPool(y, kernel_shape=[2, 2], strides=[2, 2]), 4, name="b")
    return head(g, g.Concat(z, g.conv(y, 4, name="d", strides=[2, 2]), axis=1))


def scaled(g: Builder) -> str:
    """Products and biases that count by a factor, one bias by none."""
    x = g.gemm(g.input("x", ["n", 4]), 5, name="stem")
    y = g.node("Gemm", g.Relu(x), g.weight(5, 7), g.weight(7), name="a", alpha=0.5, beta=0.0)
    return g.node("Gemm", g.Relu(y), g.weight(3, 7), g.weight(3), name="b", transB=1, alpha=-3.0, beta=-2.0)


def shared(g: Builder) -> str:
    w, x = g.weight(4, 4, 3, 3, name="w"), image(g)
    one = g.Relu(g.node("Conv", x, w, name="a", pads=[1] * 4))
    return head(g, g.conv(g.Relu(g.node("Conv", one, w, name="b", pads=[1] * 4)), 5, name="c"))


FOUND: dict[Callable[[Builder], str], list[tuple[str, str]]] = {
    plain: [("stem", "a"), ("a", "b")],
    gated: [("stem", "a"), ("a", "b")],
    expanding: [("stem", "a c"), ("a c", "b d")],
    beside: [("a", "b")],
    grouped: [("stem", "a"), ("a", "b")],
    upwards: [("stem", "a"), ("a", "b")],
    tokens: [("stem", "a"), ("a", "b"), ("b", "c")],
    normalised: [("stem", "a"), ("a", "b")],
    normalised_positions: [("stem", "a"), ("a", "b")],
    read_elsewhere: [("stem", "a")],
    pooled: [("stem", "a"), ("a", "b")],
    overlapping: [("stem", "a c"), ("a c", "b d")],
    padded_to_size: [("stem", "a")],
    pooled_for_two: [("stem", "a")],
    scaled: [("stem", "a"), ("a", "b")],
    shared: [],
}


def model_of(make: Callable[[Builder], str]) -> onnx.ModelProto:
    g = Builder(seed=3, opset=20)
    return g.model(make(g))


def blocks_of(make: Callable[[Builder], str]) -> tuple[Analysis, tuple[Block, ...]]:
    analysis, _ = analysed(model_of(make))
    return analysis, find_blocks(analysis, find_readers(analysis))


@pytest.mark.parametrize("make", FOUND, ids=lambda make: make.__name__)
def test_blocks_are_layers_with_nothing_but_elementwise_operators_between(make: Callable[[Builder], str]) -> None:
    _, blocks = blocks_of(make)
    names = [
        (" ".join(i.layer.node.label for i in b.inner), " ".join(r.layer.node.label for r in b.outer)) for b in blocks
    ]
    assert sorted(names) == sorted(FOUND[make])


def test_inner_layers_know_their_place_in_a_concatenation() -> None:
    _, blocks = blocks_of(expanding)
    block = next(b for b in blocks if b.concat)
    assert [(i.start, i.channels) for i in block.inner] == [(0, 5), (5, 6)]
    assert block.held == ("stem_out",)


# --------------------------------------------------------------------------------------------- maps and transposes

CASES = [(make, k) for make, found in FOUND.items() for k in range(len(found))]


class Case:
    """A block with samples of what it reads, and targets that are not what it gives."""

    def __init__(self, make: Callable[[Builder], str], k: int, samples: int = 12) -> None:
        self.analysis, blocks = blocks_of(make)
        graph = self.analysis.graph
        self.block = blocks[k]
        self.net = Network(graph, RUNTIME, self.block)
        self.rng = np.random.default_rng(0)
        layers = [(i.layer, i.unfolding) for i in self.block.inner] + [(r.layer, r.unfolding) for r in self.block.outer]
        self.parts = [Part(a, u, current(graph, a, {}), self.every(a)) for a, u in layers]
        held = {n: self.normal((samples, *(self.analysis.shapes.shape(n) or ())[1:])) for n in self.block.held}
        outputs = self.net.run(BlockData(held, (), (), (), ()), self.weights)[2]
        self.held, self.offset = held, [0.1 * self.normal(y.shape) for y in outputs]
        away = [y + 0.3 * self.normal(y.shape) for y in outputs]
        self.data, self.limited = self.wanting(away), self.wanting(away, limited=True)
        self.exact = self.wanting(outputs)
        self.exact_behind = self.wanting(outputs, limited=True)

    def wanting(self, outputs: Sequence[np.ndarray], *, limited: bool = False) -> BlockData:
        """Samples with these targets, or with what is as good behind a Relu."""
        bounds = [(y, y) for y in outputs]
        for k, reader in enumerate(self.block.outer if limited else ()):
            saturation = Saturation(reader.output_scale.astype(np.float32), 0.0, np.inf)
            last = (np.moveaxis(a, reader.layer.channel_axis, -1) for a in (outputs[k], self.offset[k]))
            least, most = (np.moveaxis(a, -1, reader.layer.channel_axis) for a in saturation.interval(*last))
            bounds[k] = (least, most)
        return BlockData(
            self.held,
            tuple(a for a, _ in bounds),
            tuple(b for _, b in bounds),
            tuple(np.ones(y.shape, bool) for y in outputs),
            tuple(float(np.square(y - y.mean()).sum()) for y in outputs),
        )

    @property
    def weights(self) -> Vector:
        return [p.weights for p in self.parts]

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        return self.rng.standard_normal(shape).astype(np.float32)

    def every(self, layer: Layer) -> np.ndarray:
        free = np.ones(current(self.analysis.graph, layer, {}).shape, bool)
        free[:, -1] = bool(layer.bias)
        return free

    def change(self, size: float = 1.0) -> Vector:
        return [size * self.rng.standard_normal(p.weights.shape) * p.free for p in self.parts]

    def linear(self, data: BlockData) -> Linear:
        scales = [1.0 + k for k in range(len(self.block.outer))]
        state = look(self.net, self.weights, data, scales)
        return Linear(self.net, self.parts, data, scales, state)


@pytest.mark.parametrize(("make", "k"), CASES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_backward_is_the_transpose_of_forward(make: Callable[[Builder], str], k: int) -> None:
    case = Case(make, k)
    problem = case.linear(case.limited)
    change, outputs = case.change(), [case.normal(y.shape) for y in case.data.least]
    one = sum(
        s * float((a.astype(np.float64) * b).sum())
        for s, a, b in zip(problem.scales, problem.forward(change), outputs, strict=True)
    )
    two = sum(float((a * b).sum()) for a, b in zip(change, problem.backward(outputs), strict=True))
    assert math.isclose(one, two, rel_tol=2e-3, abs_tol=2e-3)


@pytest.mark.parametrize(("make", "k"), CASES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_forward_is_how_the_outputs_change(make: Callable[[Builder], str], k: int) -> None:
    case = Case(make, k)
    problem = case.linear(case.data)
    change, step = case.change(), 2e-4
    moved = [w + step * c for w, c in zip(case.weights, change, strict=True)]
    before, after = (case.net.run(case.data, w)[2] for w in (case.weights, moved))
    for linear, a, b in zip(problem.forward(change), before, after, strict=True):
        assert np.linalg.norm((b - a) / step - linear) < 0.02 * np.linalg.norm(linear)


@given(
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    pad=st.integers(0, 2),
    extra=st.integers(0, 2),
    group=st.sampled_from([1, 2]),
    transposed=st.booleans(),
)
@settings(deadline=None)
def test_adjoints_of_convolutions(
    kernel: int, stride: int, dilation: int, pad: int, extra: int, group: int, transposed: bool
) -> None:
    g = Builder()
    size = 7 + extra
    x = g.input("x", [2, 4, size, size])
    options = {"strides": [stride] * 2, "dilations": [dilation] * 2, "pads": [pad] * 4, "group": group}
    shape = (4, 3, kernel, kernel) if transposed else (6, 4 // group, kernel, kernel)
    y = g.node("ConvTranspose" if transposed else "Conv", x, g.weight(*shape, name="w"), name="layer", **options)
    if min(g.shape(y)[2:]) < 1:
        return
    analysis, _ = analysed(g.model(y))
    graph = analysis.graph
    (layer,) = analysis.layers
    rng = np.random.default_rng(0)
    data = rng.standard_normal((2, 4, size, size)).astype(np.float32)
    output = RUNTIME.session(graph.model).run(None, {"x": data})[0]
    unfolding = Unfolding.of(layer, shape, data.shape, output.shape)
    r = rng.standard_normal(output.shape).astype(np.float32)
    back = adjoint(layer, unfolding, graph.array("w"), r, data, RUNTIME)(r, graph.array("w"))
    assert back.shape == data.shape
    assert math.isclose(float((output * r).sum()), float((data * back).sum()), rel_tol=1e-3, abs_tol=1e-3)


# ---------------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize(("make", "k"), CASES, ids=lambda v: getattr(v, "__name__", str(v)))
@pytest.mark.parametrize("side", [1, 3, 5])
def test_windows_give_what_the_whole_gives(make: Callable[[Builder], str], k: int, side: int) -> None:
    """What is valid is right, and only what the edges reach is not valid."""
    case = Case(make, k, 8)
    _, between, outputs = case.net.run(case.data, case.weights)
    tensor = between.read
    before = dict(case.data.held) | {case.block.tensor: tensor}
    eight = load_calibration(np.zeros((8, 1), np.float32), [InputSpec("x", (None, 1), np.dtype("float32"))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(views, "SIDE", side)
        patch.setattr(views, "ROWS", 1)
        view = View(case.block, case.analysis.graph, Batches(eight, 4, 0), 1 << 30)
        patch.setattr(view, "_plan", lambda samples, whole, output: (View._plan(view, samples, whole, output)[0], 1))
        view.settle(tensor, outputs[0])
        taken = Taking(view)
        for reader, y in zip(case.block.outer, outputs, strict=True):
            behind = replace(look_behind(case.analysis.graph, reader, set()), limits=None)
            taken.begin()
            for batch, part in enumerate((np.arange(0, 8, 2), np.arange(1, 8, 2))):
                answer = Answer(view.given(batch, reader, y[part]), None, ())
                taken.add(batch, reader, behind, answer, {n: a[part] for n, a in before.items()})
    parts = taken.data()
    assert [len(data) for data in parts] == [6, 2]  # of every five, the first one is held out
    for data, records in zip(parts, ([2, 4, 6, 1, 3, 7], [0, 5]), strict=True):
        whole = all(data.held[name].shape[1:] == before[name].shape[1:] for name in data.held)
        if whole:
            assert all(np.array_equal(data.held[name], before[name][records]) for name in data.held)
        found = Network(case.analysis.graph, RUNTIME, case.block).run(data, case.weights)[2]
        for y, wanted, valid in zip(found, data.least, data.valid, strict=True):
            assert y.shape == wanted.shape
            gap = np.abs(y - wanted) * valid
            assert gap.max() < 1e-5
            if whole:
                assert valid.all()
            elif side == 5:
                assert valid.any()


def _two_products(g: Builder) -> str:
    """432 multiplications at each position."""
    hidden = g.Relu(g.Gemm(g.input("x", ["n", 12]), g.weight(12, 24), g.weight(24)))
    return str(g.Gemm(hidden, g.weight(24, 6), g.weight(6)))


@pytest.mark.parametrize(("products", "samples"), [(math.inf, 1000), (432 * 300, 300), (0, 216)])
def test_wide_layers_are_looked_at_in_fewer_positions(
    products: float, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a thousand samples with one position each: as the multiplications allow, and enough for every column."""
    monkeypatch.setattr(views, "_LEAST_PER_COLUMN", 9)
    analysis, (block,) = blocks_of(_two_products)
    many = load_calibration(np.zeros((1000, 12), np.float32), analysis.graph.inputs)
    view = View(block, analysis.graph, Batches(many, 64, 0), 1 << 30, products)
    view.settle(np.zeros((32, 24), np.float32), np.zeros((32, 6), np.float32))
    looked_at = sum(len(view.samples(k, len(part))) for k, part in enumerate(view.batches.parts))
    assert looked_at == pytest.approx(samples, rel=0.3)


@pytest.mark.parametrize("words", [1, 4, 5, 30])
@pytest.mark.parametrize("rows", [1, 100, 200, 211, 500, 1000])
def test_a_fifth_of_what_is_looked_at_is_held_out(rows: int, words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever share of the records is looked at: a step by which all would be held out is not taken.

    Where every word of a record is a row, as many rows are looked at; those of a record are held out together.
    """
    monkeypatch.setattr(views, "ROWS", rows)
    analysis, (block,) = blocks_of(_two_products)
    batches = Batches(load_calibration(np.zeros((1000, 12), np.float32), analysis.graph.inputs), 64, 0)
    view = View(block, analysis.graph, batches, 1 << 30)
    assert len(batches.parts[0]) == 32
    view.settle(np.zeros((32 * words, 24), np.float32), np.zeros((32 * words, 6), np.float32))
    counts = [words * len(part) for part in batches.parts]
    parts = [(view.records(k, count), view.samples(k, count)) for k, count in enumerate(counts)]
    assert all(set(records) == set(part) for (records, _), part in zip(parts, batches.parts, strict=True))
    records = np.concatenate([numbers[samples] for numbers, samples in parts])
    assert 1 <= len(records) <= max(2 * rows, 1)
    assert sum(records % JUDGING == 0) == pytest.approx(len(records) / JUDGING, abs=words)


# ---------------------------------------------------------------------------------------------------------- the fit


@pytest.mark.parametrize(("make", "k"), CASES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_a_fit_finds_its_way_back(make: Callable[[Builder], str], k: int) -> None:
    case = Case(make, k, 40)
    parts = [
        Part(p.layer, p.unfolding, p.weights + c, p.free) for p, c in zip(case.parts, case.change(0.05), strict=True)
    ]
    seen, unseen = case.exact_behind.take(np.arange(30)), case.exact_behind.take(np.arange(30, 40))
    found = fit_block(case.net, parts, seen, unseen)
    assert found is not None
    scales = [1.0] * len(case.block.outer)
    before, after = (look(case.net, w, unseen, scales).loss for w in ([p.weights for p in parts], found))
    assert after < 0.5 * before
    # and the same with any number of threads
    several = Network(case.analysis.graph, replace(RUNTIME, threads=4), case.block)
    for one, two in zip(found, fit_block(several, parts, seen, unseen) or [], strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("make", "k"), CASES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_how_steep_a_loss_is_is_known_well_enough_after_one_round(make: Callable[[Builder], str], k: int) -> None:
    """Where no step is long, the power iteration stops at once: it must not have missed more than is allowed for."""
    case = Case(make, k, 40)
    chunks = [case.exact_behind.take(part) for part in np.array_split(np.arange(40), 2)]
    with workers(1) as spread:
        loss = descent._Loss(case.net, case.parts, [1.0] * len(case.block.outer), spread)
        weights = [p.weights + c for p, c in zip(case.parts, case.change(0.05), strict=True)]
        early, exact = (descent._Metric(loss, weights, chunks, longest).steepest for longest in (0.0, np.inf))
    assert early <= exact * (1 + 1e-6)
    assert exact < descent._DOUBT * early


@pytest.mark.parametrize("wanted", [0, 1, 4, 5, 30])
def test_the_metric_is_made_of_all_samples_and_positions(wanted: int) -> None:
    samples, positions = 20, 75
    step = descent._step(samples * positions, wanted)
    found = np.arange(0, samples * positions, step)
    assert max(wanted, 1) <= step <= wanted + 10
    for period in (samples, positions):
        if len(found) >= period:
            assert len(set(found % period)) == period


def test_what_is_not_free_stays() -> None:
    case = Case(plain, 1, 40)
    for part in case.parts:
        part.free[:, ::2] = False
    changed = zip(case.parts, case.change(0.05), strict=True)
    parts = [Part(p.layer, p.unfolding, p.weights + c, p.free) for p, c in changed]
    found = fit_block(case.net, parts, case.exact.take(np.arange(30)), case.exact.take(np.arange(30, 40)))
    assert found is not None
    for part, new in zip(parts, found, strict=True):
        assert (new[~part.free] == part.weights[~part.free]).all()
        assert (new[part.free] != part.weights[part.free]).any()


def test_a_group_that_went_as_a_whole_is_left_alone() -> None:
    case = Case(grouped, 1, 40)
    for part in case.parts:
        part.free[0] = False
    changed = zip(case.parts, case.change(0.05), strict=True)
    parts = [Part(p.layer, p.unfolding, p.weights + c, p.free) for p, c in changed]
    found = fit_block(case.net, parts, case.exact.take(np.arange(30)), case.exact.take(np.arange(30, 40)))
    assert found is not None
    assert all((new[0] == part.weights[0]).all() for part, new in zip(parts, found, strict=True))


def test_nothing_is_changed_where_it_does_not_help_on_other_samples() -> None:
    case = Case(plain, 1, 40)
    noise = case.wanting([case.normal(y.shape) for y in case.data.least])
    assert fit_block(case.net, case.parts, noise.take(np.arange(2)), case.exact.take(np.arange(10, 40))) is None


def test_columns_of_very_different_sizes_are_damped_more() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((40, 200)).astype(np.float32)
    rows[:, 0] *= 1e-3
    gram = (rows.T @ rows).astype(np.float64)
    gram -= 3e-3 * np.diag(gram).mean() * np.eye(len(gram))  # as rounding in single precision may leave it
    with pytest.raises(np.linalg.LinAlgError):
        np.linalg.cholesky(gram + 1e-3 * np.diag(gram).mean() * np.eye(len(gram)))
    lower = np.tril(_factor(gram)[0])
    left = lower @ lower.T - gram
    assert np.allclose(left, 1e-2 * np.diag(gram).mean() * np.eye(len(gram)), atol=1e-6 * np.diag(gram).mean())
    with pytest.raises(np.linalg.LinAlgError):
        _factor(-np.eye(3))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30], ids=str)
def test_nothing_is_changed_where_the_numbers_are_none(value: float) -> None:
    case = Case(plain, 1, 40)
    held = {name: array.copy() for name, array in case.exact.held.items()}
    for array in held.values():
        array[3] = value
    broken = replace(case.exact, held=held)
    assert fit_block(case.net, case.parts, broken.take(np.arange(30)), broken.take(np.arange(30, 40))) is None


@pytest.mark.parametrize("make", [plain, tokens, grouped, upwards, scaled], ids=lambda make: make.__name__)
def test_stored_tensors_are_the_inverse_of_current(make: Callable[[Builder], str]) -> None:
    analysis, _ = analysed(model_of(make))
    for layer in analysis.layers:
        matrices = current(analysis.graph, layer, {})
        changed = matrices + np.random.default_rng(0).standard_normal(matrices.shape) * (matrices != 0)
        tensors = stored_tensors(analysis.graph, layer, changed)
        assert np.allclose(current(analysis.graph, layer, tensors), changed)
