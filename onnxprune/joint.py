"""Two neighbouring layers fitted together, by linear least squares.

With the inner layers' pattern held as it is (which Relu lets what pass; in general the slope of what stands between;
and which position a pool takes its maximum from),
what the outer layers give is linear in a change of the inner weights, and linear in a change of the outer ones:

    change of the output = W_out * (slope . (X * dW_in))  +  Z * dW_out

so that the way to less error follows from products with the transposes of the layers, and how far to go on it from
products with the layers, in the metric of the Gram matrices of the layers' inputs. Then the pattern is looked at again
(`descent`). The network behind the two layers plays no part, and no label either.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from onnxprune.blocks import Block, BlockData
from onnxprune.graph import Graph
from onnxprune.layers import Layer
from onnxprune.readers import matrices_of
from onnxprune.runtime import Runtime
from onnxprune.segments import Piece, Segments
from onnxprune.statistics import squared
from onnxprune.unfold import Unfolding, from_matrices, out_positions

CHUNKS = 2  # that samples are worked on in, side by side

Arrays = dict[str, np.ndarray]
Vector = list[np.ndarray]  # one stack of matrices per layer, the inner ones first


@dataclass(frozen=True, eq=False)
class Between:
    """What the inner layers make together, and what the outer layers read: behind a pool, if there is one."""

    joined: np.ndarray
    read: np.ndarray


@dataclass(frozen=True, eq=False)
class Part:
    """A layer of a block: its matrices, and which of their entries may change, both (group, p, outputs / group)."""

    layer: Layer
    unfolding: Unfolding
    weights: np.ndarray
    free: np.ndarray


class Network:
    """A block that can be run: as it is, changed a little, and backwards.

    Args:
        graph: the network.
        runtime: how to run.
        block: the part of the network.
    """

    def __init__(self, graph: Graph, runtime: Runtime, block: Block) -> None:
        self.graph, self.block, self.runtime = graph, block, runtime
        # several chunks of the samples are worked on side by side
        self.at_once, self._shared = runtime.shared_out(CHUNKS)
        self.segments = Segments(graph, range(len(graph.nodes)), self._shared)  # windows have sizes of their own
        self._pieces: dict[object, Piece] = {}
        self._pool: ort.InferenceSession | None = None
        self._adjoints: dict[tuple[int, tuple[int, ...]], Callable[[np.ndarray, np.ndarray], np.ndarray]] = {}
        self._making = threading.Lock()  # no session twice
        self.layers = [i.layer for i in block.inner] + [r.layer for r in block.outer]

    def _part(self, nodes: Sequence[int], outputs: Sequence[str], feeds: Mapping[str, np.ndarray]) -> Piece:
        key = (tuple(nodes), tuple(outputs))
        with self._making:
            if key not in self._pieces:
                read = {name for k in nodes for name in self.graph.nodes[k].inputs}
                free = [n for layer in self.layers for n in (layer.weight, layer.bias) if n in read]
                self._pieces[key] = self.segments.part(nodes, outputs, feeds, free=free)
            return self._pieces[key]

    def stored(self, layer: Layer, matrices: np.ndarray) -> Arrays:
        """Matrices as the tensors that the model stores."""
        return {k: v.astype(self.graph.array(k).dtype) for k, v in stored_tensors(self.graph, layer, matrices).items()}

    def run(self, data: BlockData, weights: Vector) -> tuple[list[np.ndarray], Between, list[np.ndarray]]:
        """What every inner layer gives, the tensors between, and what every outer layer gives."""
        given = dict(data.held)
        for layer, matrices in zip(self.layers, weights, strict=True):
            given |= self.stored(layer, matrices)
        names = [i.layer.output for i in self.block.inner] + sorted({self.block.joined, self.block.tensor})
        names += [r.layer.output for r in self.block.outer]
        piece = self._part(self.block.nodes, names, data.held)
        found = piece.run(given, given)
        inner = [found[i.layer.output] for i in self.block.inner]
        outer = []
        for reader, matrices in zip(self.block.outer, weights[len(inner) :], strict=True):
            outer.append(_with_bias(reader.layer, matrices, found[reader.layer.output]))
        return inner, Between(found[self.block.joined], found[self.block.tensor]), outer

    def linear(self, layer: Layer, x: np.ndarray, matrices: np.ndarray) -> np.ndarray:
        """The layer with other weights, on an input of its own; the bias in the last row counts."""
        piece = self._part([layer.node.index], [layer.output], {layer.data: x})
        tensors = self.stored(layer, matrices)
        return _with_bias(layer, matrices, piece.run({layer.data: x}, tensors)[layer.output])

    def slope(self, k: int, before: np.ndarray, data: BlockData, weights: Vector) -> np.ndarray:
        """How the elementwise operators behind an inner layer change with their input, by a central difference."""
        inner = self.block.inner[k]
        if not inner.between:
            return np.ones_like(before)
        given = dict(data.held) | self.stored(inner.layer, weights[k])
        step = before.dtype.type(1e-3 * float(before.std()) + 1e-12)
        high, low = before + step, before - step
        name = inner.layer.output
        piece = self._part([n.index for n in inner.between], [inner.made], {**data.held, name: before})
        up, down = (piece.run({**data.held, name: value}, given)[inner.made] for value in (high, low))
        found: np.ndarray = (up - down) / (high - low)
        return found

    def taken(self, joined: np.ndarray) -> np.ndarray | None:
        """Of every position behind the pool, the flat position that it takes its maximum from."""
        if self.block.pool is None:
            return None
        node = self.block.pool[0]
        with self._making:
            if self._pool is None:
                proto = onnx.helper.make_node("MaxPool", ["x"], ["y", "at"], **node.attributes)
                element = onnx.helper.np_dtype_to_tensor_dtype(joined.dtype)
                x = onnx.helper.make_tensor_value_info("x", element, [None] * joined.ndim)
                at = onnx.helper.make_tensor_value_info("at", onnx.TensorProto.INT64, [None] * joined.ndim)
                graph = onnx.helper.make_graph([proto], "pool", [x], [at])
                opset = [onnx.helper.make_opsetid("", 17)]
                self._pool = self._shared.session(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8))
        found: np.ndarray = self._pool.run(None, {"x": joined})[0]
        return found

    def back(self, k: int, residual: np.ndarray, matrices: np.ndarray, like: np.ndarray) -> np.ndarray:
        """The transpose of an outer layer: from its output to the tensor between."""
        reader = self.block.outer[k]
        stored = from_matrices(
            reader.layer, matrices[:, :-1], tuple(self.graph.stored(reader.layer.weight).dims)
        ).astype(residual.dtype)
        if not reader.unfolding.kernel:
            result: np.ndarray = residual @ (stored.T if reader.layer.weight_axis == 0 else stored)
            return result
        key = (k, like.shape[1:])
        with self._making:
            if key not in self._adjoints:
                self._adjoints[key] = adjoint(reader.layer, reader.unfolding, stored, residual, like, self._shared)
            apply = self._adjoints[key]
        return apply(residual, stored)


def stored_tensors(graph: Graph, layer: Layer, matrices: np.ndarray) -> Arrays:
    """A layer's matrices (group, p, outputs / group) as the tensors that the model stores, in float64."""
    shape = tuple(graph.stored(layer.weight).dims)
    arrays = {layer.weight: from_matrices(layer, matrices[:, :-1] / layer.alpha, shape)}
    if layer.bias:
        bias, old = matrices[:, -1].reshape(-1) / layer.beta, graph.array(layer.bias)
        # the Add behind a MatMul goes on adding what it added
        arrays[layer.bias] = bias + old if layer.node.op == "MatMul" else bias.reshape(old.shape)
    return arrays


def current(graph: Graph, layer: Layer, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """The inverse of `stored_tensors`, for tensors of which some have new values."""
    bias = None
    if layer.bias:
        old = graph.array(layer.bias)
        bias = np.asarray(arrays.get(layer.bias, old), dtype=np.float64)
        bias = bias - old if layer.node.op == "MatMul" else bias
    return matrices_of(layer, np.asarray(arrays.get(layer.weight, graph.array(layer.weight))), bias)


def _with_bias(layer: Layer, matrices: np.ndarray, output: np.ndarray) -> np.ndarray:
    """A layer's output, with what a matrix product without a bias of its own leaves to the Add behind it."""
    if layer.node.op == "MatMul":
        output += matrices[:, -1].reshape(-1).astype(output.dtype)
    return output


def adjoint(
    layer: Layer, unfolding: Unfolding, weight: np.ndarray, output: np.ndarray, data: np.ndarray, runtime: Runtime
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The transpose of a convolution as a function of (output, weight): a convolution of the other kind."""
    spatial = len(unfolding.kernel)
    ends, extra = [], []
    for a in range(spatial):
        reach = (unfolding.kernel[a] - 1) * unfolding.dilations[a] + 1 - unfolding.pads[a]
        small, large = (data, output) if unfolding.transposed else (output, data)
        end = (small.shape[2 + a] - 1) * unfolding.strides[a] + reach - large.shape[2 + a]
        ends.append(max(end, 0))
        extra.append(max(-end, 0))
    options: dict[str, Any] = {
        "kernel_shape": list(unfolding.kernel),
        "strides": list(unfolding.strides),
        "dilations": list(unfolding.dilations),
        "pads": [*unfolding.pads, *ends],
        "group": unfolding.group,
    }
    kind = "Conv" if unfolding.transposed else "ConvTranspose"
    if not unfolding.transposed and any(extra):
        options["output_padding"] = extra
    node = onnx.helper.make_node(kind, ["r", "w"], ["y"], **options)
    element = onnx.helper.np_dtype_to_tensor_dtype(output.dtype)
    inputs = [
        onnx.helper.make_tensor_value_info("r", element, [None, *output.shape[1:]]),
        onnx.helper.make_tensor_value_info("w", element, weight.shape),
    ]
    graph = onnx.helper.make_graph([node], "adjoint", inputs, [onnx.helper.make_empty_tensor_value_info("y")])
    session = runtime.session(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    )

    def apply(r: np.ndarray, w: np.ndarray) -> np.ndarray:
        found: np.ndarray = session.run(None, {"r": r, "w": w})[0]
        return found

    return apply


@dataclass(frozen=True, eq=False)
class State:
    """A block at some weights: what flows in it, what is missing behind it, and how bad that is."""

    weights: Vector
    before: list[np.ndarray]  # per inner layer, its output
    between: Between
    missing: list[np.ndarray]  # per outer layer: target - output, zero where the limiter behind hides the difference
    live: list[np.ndarray]  # per outer layer: where a change of the output matters
    loss: float


def look(net: Network, weights: Vector, data: BlockData, scales: Sequence[float]) -> State:
    """The block at some weights, beside what it should give."""
    before, between, outputs = net.run(data, weights)
    missing, live, loss = [], [], 0.0
    for y, least, most, valid, scale in zip(outputs, data.least, data.most, data.valid, scales, strict=True):
        gap = np.clip(y, least, most)
        gap -= y
        gap *= valid
        loss += scale * squared(gap)
        missing.append(gap)
        # a small change matters unless the limiter behind hides it
        live.append((gap != 0.0) | (valid & (least == most)))
    return State(weights, before, between, missing, live, loss)


class Linear:
    """The block as a linear map of a change of its weights, around a state; and that map's transpose.

    Args:
        net: the block.
        parts: its layers, the inner ones first.
        data: what it reads and should give.
        scales: what the squared error of each outer layer counts.
        state: where the map is looked at.
    """

    def __init__(
        self,
        net: Network,
        parts: Sequence[Part],
        data: BlockData,
        scales: Sequence[float],
        state: State,
    ) -> None:
        self.net, self.parts, self.data, self.scales, self.state = net, parts, data, scales, state
        self.inner = len(net.block.inner)
        self.taken = net.taken(state.between.joined)
        self.slopes = [net.slope(k, y, data, state.weights) for k, y in enumerate(state.before)]
        shapes = [y.shape for y in (*state.before, *data.least)]
        inputs = [data.held[i.layer.data] for i in net.block.inner] + [state.between.read] * len(data.least)
        self.rows = [
            part.unfolding.everywhere(x, out_positions(part.layer, shape))
            for part, x, shape in zip(parts, inputs, shapes, strict=True)
        ]

    def forward(self, change: Vector) -> list[np.ndarray]:
        """(outer outputs) What the outer layers give more, where it matters."""
        net, state = self.net, self.state
        moved = np.zeros_like(state.between.joined)  # but for the layers, nothing changes
        for k, inner in enumerate(net.block.inner):
            step = net.linear(inner.layer, self.data.held[inner.layer.data], change[k])
            np.multiply(step, self.slopes[k], out=moved[self._slots(k)])
        if self.taken is not None:
            moved = moved.reshape(-1)[self.taken]
        found = []
        for j, reader in enumerate(net.block.outer):
            weights = state.weights[self.inner + j].copy()
            weights[:, -1] = 0.0
            y = net.linear(reader.layer, moved, weights)
            y += net.linear(reader.layer, state.between.read, change[self.inner + j])
            y *= state.live[j]
            found.append(y)
        return found

    def backward(self, missing: Sequence[np.ndarray]) -> Vector:
        """The transpose of `forward`, each output weighted by its scale."""
        net, state = self.net, self.state
        back = np.zeros_like(state.between.read)
        outer = []
        for j, r in enumerate(missing):
            scaled = r * r.dtype.type(self.scales[j])
            scaled *= state.live[j]
            back += net.back(j, scaled, state.weights[self.inner + j], state.between.read)
            outer.append(self._cross(self.inner + j, scaled))
        if self.taken is not None:
            joined = state.between.joined
            spread = np.bincount(self.taken.reshape(-1), weights=back.reshape(-1), minlength=joined.size)
            back = spread.astype(back.dtype).reshape(joined.shape)
        inner = [self._cross(k, back[self._slots(k)] * self.slopes[k]) for k in range(self.inner)]
        return [*inner, *outer]

    def _slots(self, k: int) -> tuple[slice, ...]:
        inner = self.net.block.inner[k]
        return (*[slice(None)] * self.net.block.axis, slice(inner.start, inner.start + inner.channels))

    def _cross(self, k: int, output: np.ndarray) -> np.ndarray:
        part = self.parts[k]
        targets = part.unfolding.targets_everywhere(output)
        found: np.ndarray = np.matmul(self.rows[k].transpose(0, 2, 1), targets).astype(np.float64) * part.free
        return found
