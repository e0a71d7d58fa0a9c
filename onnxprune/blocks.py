"""Blocks: layers that can be fitted together with the readers behind them.

Between an inner layer and the outer layers that read it stands nothing but operators that work on every element by
itself, and perhaps a concatenation and a pool that takes maxima: ``expand -> Relu -> Concat -> MaxPool -> squeeze``,
``fc1 -> Gelu -> fc2``. Nobody else looks at what stands between, so both sides may change as long as what the outer
layers give stays right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnxprune.analysis import Analysis
from onnxprune.graph import Graph, Node
from onnxprune.images import is_float
from onnxprune.layers import Layer
from onnxprune.readers import Reader
from onnxprune.rules.pointwise import UNARY, UNARY_OF_ZERO
from onnxprune.unfold import Unfolding, columns_of

# every element of the output follows from the same element of the input; the other inputs are stored
_ELEMENTWISE = {*UNARY_OF_ZERO.split(), *UNARY.split(), "Clip", "Add", "Sub", "Mul", "Div", "PRelu"}
_ELEMENTWISE |= {"BatchNormalization"}
# these have no slope, or another type
_ELEMENTWISE -= {"BitwiseNot", "Cast", "CastLike", "Ceil", "Dropout", "Floor", "IsInf", "IsNaN", "Not", "Round", "Sign"}
MAX_COLUMNS = 4608  # of an unfolded input: a wider layer stays as the fit of one layer left it


@dataclass(frozen=True, eq=False)
class Inner:
    """A layer in front, and its way to the tensor that the outer layers read.

    Attributes:
        layer: the layer.
        unfolding: how it reads its input.
        between: nodes that work on every element, in graph order.
        made: what comes out of them.
        start: the first channel that it takes in the tensor that the outer layers read.
        channels: how many.
    """

    layer: Layer
    unfolding: Unfolding
    between: tuple[Node, ...]
    made: str
    start: int
    channels: int


@dataclass(frozen=True, eq=False)
class Block:
    """Inner layers, the tensor they make together, and all readers of it.

    Attributes:
        inner: the layers in front.
        outer: the readers behind, in graph order.
        tensor: what the outer layers read.
        joined: what the inner layers make together; the same tensor where there is no pool.
        concat: the node that puts it together; None where there is one inner layer.
        pool: the MaxPool between the two tensors, and how it reads the one in front; None where there is none.
        axis: the channel axis of the tensor.
        held: tensors from outside, needed to run the block again.
    """

    inner: tuple[Inner, ...]
    outer: tuple[Reader, ...]
    tensor: str
    joined: str
    concat: Node | None
    pool: tuple[Node, Unfolding] | None
    axis: int
    held: tuple[str, ...]

    @property
    def reach(self) -> list[Unfolding]:
        """How every position between the layers depends on the inputs of the inner ones."""
        return [i.unfolding if self.pool is None else behind(i.unfolding, self.pool[1]) for i in self.inner]

    @property
    def nodes(self) -> list[int]:
        """Indices of all nodes from the inner layers to the outer ones."""
        found = [n.index for i in self.inner for n in (i.layer.node, *i.between)]
        found += [self.concat.index] if self.concat else []
        found += [self.pool[0].index] if self.pool else []
        return sorted({*found, *(r.layer.node.index for r in self.outer)})


def find_blocks(analysis: Analysis, readers: Sequence[Reader]) -> tuple[Block, ...]:
    """Every tensor that only readers read, and that only layers make, with elementwise operators behind and a pool."""
    by_tensor: dict[str, list[Reader]] = {}
    for reader in readers:
        by_tensor.setdefault(reader.layer.data, []).append(reader)
    found = []
    for tensor, outer in by_tensor.items():
        block = _block(analysis, tensor, outer)
        if block is not None:
            found.append(block)
    return tuple(found)


def _block(analysis: Analysis, tensor: str, outer: list[Reader]) -> Block | None:
    graph, shapes = analysis.graph, analysis.shapes
    shape = shapes.shape(tensor)
    node = graph.producer.get(tensor)
    read_by = {r.layer.node.index for r in outer}
    if shape is None or node is None or {n.index for n in graph.consumers[tensor]} != read_by:
        return None
    axis = outer[0].layer.data_axis % len(shape)
    if tensor in graph.outputs or any(r.layer.data_axis % len(shape) != axis or r.width > MAX_COLUMNS for r in outer):
        return None
    pool = _pool(node, axis)
    joined = node.inputs[0] if pool else tensor
    ends = {node.index} if pool else read_by
    node = graph.producer.get(joined)
    if node is None or (pool and (joined in graph.outputs or {n.index for n in graph.consumers[joined]} != ends)):
        return None
    concat = node if node.op == "Concat" and node.attributes["axis"] % len(shape) == axis else None
    ends = {concat.index} if concat else ends
    inner, start = [], 0
    for name in concat.inputs if concat else (joined,):
        size = (shapes.shape(name) or shape)[axis]
        traced = _trace(analysis, name, ends)
        if traced is not None:
            layer, between = traced
            unfolding = _unfolding(analysis, layer)
            known = unfolding is not None and not (pool and unfolding.transposed)
            if unfolding is not None and known and layer.channel_axis % len(shape) == axis:
                inner.append(Inner(layer, unfolding, between, name, start, size))
        start += size
    if not inner or len({i.layer.node.index for i in inner}) < len(inner):
        return None
    held = _held(graph, [n for i in inner for n in (i.layer.node, *i.between)] + ([concat] if concat else []))
    if any((shapes.shape(name) or ())[:1] != shape[:1] for name in held):
        return None
    behind_it = tuple(sorted(outer, key=lambda r: r.layer.node.index))
    return Block(tuple(inner), behind_it, tensor, joined, concat, pool, axis, held)


def _pool(node: Node, axis: int) -> tuple[Node, Unfolding] | None:
    """A node that takes maxima over positions, and how it reads them; None where it is something else."""
    if node.op != "MaxPool" or node.domain or axis != 1 or len([n for n in node.outputs if n]) > 1:
        return None
    kernel = tuple(node.attributes["kernel_shape"])
    ones = (1,) * len(kernel)
    strides, dilations = (tuple(node.attributes.get(name) or ones) for name in ("strides", "dilations"))
    auto = node.attributes.get("auto_pad", "NOTSET")
    if (auto.decode() if isinstance(auto, bytes) else auto) not in ("NOTSET", "VALID"):
        return None  # what is padded depends on the size
    pads = tuple(node.attributes.get("pads") or (0,) * (2 * len(kernel)))[: len(kernel)]
    return node, Unfolding(kernel, strides, dilations, pads)


def behind(first: Unfolding, second: Unfolding) -> Unfolding:
    """How positions behind two layers depend on what the first one reads; taps in between count as well."""
    axes = range(len(second.kernel))
    last = [
        (first.kernel[a] - 1) * first.dilations[a] + (second.kernel[a] - 1) * second.dilations[a] * first.strides[a]
        for a in axes
    ]
    return replace(
        first,
        kernel=tuple(n + 1 for n in last),
        strides=tuple(first.strides[a] * second.strides[a] for a in axes),
        dilations=(1,) * len(last),
        pads=tuple(first.pads[a] + second.pads[a] * first.strides[a] for a in axes),
    )


def _trace(analysis: Analysis, name: str, ends: set[int]) -> tuple[Layer, tuple[Node, ...]] | None:
    """The one layer that a tensor comes from by elementwise operators alone, if nobody else reads on the way."""
    graph, shapes = analysis.graph, analysis.shapes
    layers = {layer.output: layer for layer in analysis.layers}
    between: dict[int, Node] = {}
    seen: set[str] = set()
    source: Layer | None = None
    waiting = [name]
    while waiting:
        tensor = waiting.pop()
        if tensor in seen:
            continue
        seen.add(tensor)
        if tensor in layers:
            if source is not None:
                return None
            source = layers[tensor]
            continue
        node = graph.producer.get(tensor)
        if node is None or node.op not in _ELEMENTWISE or node.domain or len(node.outputs) != 1:
            return None
        if node.attributes.get("training_mode", 0):  # all samples together make one
            return None
        between[node.index] = node
        waiting += [n for n in node.inputs if n and n not in graph.computed_from_constants]
    if source is None:
        return None
    inside, shape = set(between) | ends, shapes.shape(source.output)
    for tensor in seen:
        read_by = {n.index for n in graph.consumers.get(tensor, ())}
        if tensor in graph.outputs or not read_by <= inside or shapes.shape(tensor) != shape:
            return None
    return source, tuple(between[k] for k in sorted(between))


def _unfolding(analysis: Analysis, layer: Layer) -> Unfolding | None:
    """How an inner layer reads; None where its weights are shared, too wide or no numbers."""
    graph, shapes = analysis.graph, analysis.shapes
    stored = [name for name in (layer.weight, layer.bias) if name]
    if any(sum((*n.inputs, *n.captured).count(name) for n in graph.consumers[name]) > 1 for name in stored):
        return None
    weight = graph.stored(layer.weight)
    if not is_float(graph.array(layer.weight).dtype):
        return None
    in_shape, out_shape = shapes.shape(layer.data) or (), shapes.shape(layer.output) or ()
    if in_shape[:1] != out_shape[:1] or columns_of(layer, tuple(weight.dims)) > MAX_COLUMNS:
        return None
    return Unfolding.of(layer, tuple(weight.dims), in_shape, out_shape)


def _held(graph: Graph, nodes: Sequence[Node]) -> tuple[str, ...]:
    """Tensors that the nodes read and do not make."""
    made = {name for node in nodes for name in node.outputs}
    known = made | graph.computed_from_constants
    return tuple(sorted({n for node in nodes for n in (*node.inputs, *node.captured) if n} - known))


@dataclass(frozen=True, eq=False)
class BlockData:
    """What a fit of a block looks at, for some samples.

    Attributes:
        held: the tensors that the block reads, as the pruned network gives them.
        least: per outer layer, the least output that is as good as the wanted one.
        most: per outer layer, the largest; the same where nothing behind cuts off.
        valid: per outer layer, where its output counts: not where a window's edge cuts off what it reads.
        energy: per outer layer, of the wanted output about its mean, where it counts.
    """

    held: Mapping[str, np.ndarray]
    least: tuple[np.ndarray, ...]
    most: tuple[np.ndarray, ...]
    valid: tuple[np.ndarray, ...]
    energy: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.least[0])

    def take(self, samples: np.ndarray) -> BlockData:
        """Some of the samples."""
        return BlockData(
            {k: v[samples] for k, v in self.held.items()},
            tuple(a[samples] for a in self.least),
            tuple(a[samples] for a in self.most),
            tuple(a[samples] for a in self.valid),
            self.energy,
        )
