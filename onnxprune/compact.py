"""A block without the channels that are gone, so that fitting it costs what the pruned network costs.

Only the channels between the layers, and those that nobody but the block's inner layers reads in front, are taken out,
and only where everything on the way is understood; a block where something is not is fitted as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import numpy_helper

from onnxprune.blocks import Block, BlockData, Inner
from onnxprune.graph import Graph
from onnxprune.joint import Network, Part, Vector
from onnxprune.layers import Layer

Cut = tuple[int, np.ndarray]  # an axis and the positions that stay


@dataclass(frozen=True, eq=False)
class Compact:
    """A block and its layers, smaller; and where the matrices' entries stand in the whole.

    Attributes:
        net: the block.
        parts: its layers, the inner ones first.
        cuts: of tensors that the block reads, by name, the axis and the positions that are left.
        places: per layer, the rows and the columns of its matrices that are left.
    """

    net: Network
    parts: tuple[Part, ...]
    cuts: Mapping[str, Cut]
    places: tuple[tuple[np.ndarray, np.ndarray], ...]

    def data(self, whole: BlockData) -> BlockData:
        """What the fit looks at, without what is gone."""
        held = {
            name: np.take(a, self.cuts[name][1], self.cuts[name][0]) if name in self.cuts else a
            for name, a in whole.held.items()
        }
        return replace(whole, held=held)

    def whole(self, before: Sequence[Part], found: Vector) -> Vector:
        """Matrices of the layers as they were, with what was found in its place."""
        result = []
        for part, matrices, (rows, columns) in zip(before, found, self.places, strict=True):
            weights = part.weights.copy()
            weights[0][np.ix_(rows, columns)] = matrices[0]
            result.append(weights)
        return result


def compact(net: Network, parts: Sequence[Part], data: BlockData) -> Compact | None:
    """Take out the channels that no layer of a block uses and none may; None where there are none to take out."""
    block, graph = net.block, net.graph
    if any(part.unfolding.group > 1 for part in parts):
        return None
    inner, outer = parts[: len(block.inner)], parts[len(block.inner) :]
    between = np.any([_used(part) for part in outer], axis=0)
    for each in block.inner:
        if not between[each.start : each.start + each.channels].any():
            between[each.start] = True  # a layer of no outputs is none
    outs = [np.flatnonzero(between[i.start : i.start + i.channels]) for i in block.inner]
    rank = data.least[0].ndim  # as of all tensors of the block
    cuts: dict[str, Cut | None] = {}

    def cut(name: str, axis: int, left: np.ndarray) -> None:
        """Note down a cut; None where two do not agree."""
        known = cuts.setdefault(name, (axis, left))
        if known is not None and (known[0] != axis or not np.array_equal(known[1], left)):
            cuts[name] = None

    for each, left in zip(block.inner, outs, strict=True):
        whole = len(left) == each.channels
        for node in each.between:
            made = {n for other in each.between for n in other.outputs} | {each.layer.output}
            for place, name in enumerate(node.inputs):
                if not name or name in made:
                    continue
                if not graph.is_stored(name) and name not in data.held:
                    return None
                shape = graph.array(name).shape if graph.is_stored(name) else data.held[name].shape
                # a BatchNormalization's tensors lie along the second axis, others along the last ones
                axis = block.axis - (1 if node.op == "BatchNormalization" and place else rank - len(shape))
                if 0 <= axis < len(shape) and shape[axis] == each.channels and each.channels > 1:
                    cut(name, axis, left)
                elif not whole and 0 <= axis < len(shape) and shape[axis] > 1:
                    return None
    aside = set(cuts)  # tensors beside the layers' inputs
    for each in block.inner:
        name = each.layer.data
        used = np.any([_used(p) for e, p in zip(block.inner, inner, strict=True) if e.layer.data == name], axis=0)
        used[0] |= not used.any()
        if name in aside:
            return None
        cut(name, each.layer.data_axis % rank, np.flatnonzero(used))
    for name, start, size in _passed(net, data):
        left = between[start : start + size]
        if not left.any():
            left[0] = True  # of no channels, there is no tensor
        if name in aside:
            return None
        cut(name, block.axis, np.flatnonzero(left))
    if any(known is None for known in cuts.values()):
        return None
    final = {name: known for name, known in cuts.items() if known is not None}
    ins = [*(final[i.layer.data][1] for i in block.inner), *[np.flatnonzero(between)] * len(outer)]
    left_out = [*outs, *(np.arange(part.weights.shape[2]) for part in outer)]
    places = tuple((_rows(p, i), o) for p, i, o in zip(parts, ins, left_out, strict=True))
    sizes = zip(parts, places, strict=True)
    if all(len(r) == p.weights.shape[1] and len(c) == p.weights.shape[2] for p, (r, c) in sizes):
        return None
    small = _small(net, parts, ins, left_out, final)
    if small is None:
        return None
    cut_parts = tuple(
        replace(p, layer=layer, weights=p.weights[:, r][:, :, c], free=p.free[:, r][:, :, c])
        for p, layer, (r, c) in zip(parts, small.layers, places, strict=True)
    )
    return Compact(small, cut_parts, final, places)


def _passed(net: Network, data: BlockData) -> list[tuple[str, int, int]]:
    """What a block puts beside the outputs of its inner layers, each with its first channel and how many it has."""
    made, found, start = {i.start: i for i in net.block.inner}, [], 0
    for name in net.block.concat.inputs if net.block.concat else ():
        if start in made and made[start].made == name:
            start += made[start].channels
            continue
        array = data.held[name] if name in data.held else net.graph.array(name)
        found.append((name, start, array.shape[net.block.axis]))
        start += array.shape[net.block.axis]
    return found


def _used(part: Part) -> np.ndarray:
    """Which channels of its input a layer uses, or may."""
    live = (part.free | (part.weights != 0))[0, :-1].any(axis=1)
    found: np.ndarray = live.reshape(-1, part.unfolding.taps).any(axis=1)
    return found


def _rows(part: Part, channels: np.ndarray) -> np.ndarray:
    """Rows of a layer's matrices that belong to some channels of its input, and the bias."""
    return np.append(part.unfolding.columns(channels[:, None]).ravel(), part.weights.shape[1] - 1)


def _small(
    net: Network,
    parts: Sequence[Part],
    ins: Sequence[np.ndarray],
    outs: Sequence[np.ndarray],
    cuts: dict[str, Cut],
) -> Network | None:
    """The network of the block alone, its stored tensors cut."""
    graph, block = net.graph, net.block
    model = onnx.ModelProto()
    model.ir_version = graph.model.ir_version
    model.opset_import.extend(graph.model.opset_import)
    model.functions.extend(graph.model.functions)
    model.graph.name = "block"
    model.graph.node.extend(graph.model.graph.node[k] for k in block.nodes)
    arrays: dict[str, np.ndarray] = {}
    for name in {n for k in block.nodes for n in graph.nodes[k].inputs if n and graph.is_stored(n)}:
        arrays[name] = graph.array(name)
        if name in cuts:
            arrays[name] = np.take(arrays[name], cuts[name][1], axis=cuts[name][0])
    for part, i, o in zip(parts, ins, outs, strict=True):
        layer, weight = part.layer, graph.array(part.layer.weight)
        arrays[layer.weight] = np.take(np.take(weight, i, axis=layer.weight_axis), o, axis=layer.out_axis)
        for name in {layer.bias, *layer.node.inputs[2:]} - {""}:  # a Gemm may read one that does not count
            bias = graph.array(name)
            arrays[name] = np.take(bias, o, axis=-1) if bias.shape[-1:] == part.weights.shape[2:] else bias
    for name, array in arrays.items():
        model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
    for name in block.held:
        model.graph.input.append(onnx.helper.make_empty_tensor_value_info(name))
    for reader in block.outer:
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(reader.layer.output))
    small = Graph(model, graph.folder)
    node = {old: small.nodes[new] for new, old in enumerate(block.nodes)}
    known = {"", *small.computed_from_constants, *small.producer, *block.held}
    if any(not set(each.inputs) <= known for each in small.nodes):
        return None  # something is computed from constants elsewhere

    def moved(layer: Layer) -> Layer:
        return replace(layer, node=node[layer.node.index])

    inner = []
    for each, left in zip(block.inner, outs, strict=False):
        between = tuple(node[n.index] for n in each.between)
        start = int((ins[-1] < each.start).sum())  # of what the outer layers read
        inner.append(Inner(moved(each.layer), each.unfolding, between, each.made, start, len(left)))
    outer = tuple(replace(r, layer=moved(r.layer)) for r in block.outer)
    concat = node[block.concat.index] if block.concat else None
    pool = (node[block.pool[0].index], block.pool[1]) if block.pool else None
    names = block.tensor, block.joined
    return Network(small, net.runtime, Block(tuple(inner), outer, *names, concat, pool, block.axis, block.held))
