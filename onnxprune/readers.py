"""Readers: the layers whose weights can be fitted again, as matrix products."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from onnxprune.analysis import Analysis
from onnxprune.errors import InputError
from onnxprune.layers import Layer
from onnxprune.picks import picked
from onnxprune.statistics import Statistics
from onnxprune.unfold import Unfolding, columns_of, to_matrices

MAX_COLUMNS = 8192  # a Gram matrix of this many columns takes half a GiB; wider readers keep their weights


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer whose weights can be fitted, and the columns that each group's units hold in it."""

    index: int
    layer: Layer
    unfolding: Unfolding
    columns: Mapping[int, np.ndarray]  # group index -> (units, columns per unit)
    normalised: bool  # whether a BatchNormalization of its outputs stands right behind
    output_scale: np.ndarray  # (outputs,) what that multiplies by; ones where there is none
    weights: np.ndarray  # (group, p, outputs / group) as they are in the original, the bias in the last row

    @property
    def width(self) -> int:
        """Columns of the unfolded input, the bias among them."""
        return int(self.weights.shape[1])


def check_finite(reader: Reader, sums: Iterable[Statistics], network: str) -> None:
    """Refuse sums that nothing can be chosen or fitted by.

    Raises:
        InputError: the network computes NaN, infinity or numbers that cannot be squared there.
    """
    if not all(each.is_finite for each in sums):
        raise InputError(
            f"{network} has NaN, infinite numbers, or some that are too large to be squared, at layer"
            f" {reader.layer.node.label!r}; mend its weights or the scale of the data, prune it in float32 where it is"
            " in float16, or go by the weights alone (--select l1 --no-reconstruct)"
        )


def find_readers(analysis: Analysis) -> tuple[Reader, ...]:
    """The layers that read a group or feed an output, in graph order, where their weights can be fitted."""
    graph, shapes, other_rows = analysis.graph, analysis.shapes, picked(analysis)
    uses: dict[str, int] = {}
    for node in graph.nodes:
        for name in (*node.inputs, *node.captured):
            uses[name] = uses.get(name, 0) + 1
    by_axis: dict[tuple[str, int], list[tuple[int, np.ndarray]]] = {}
    for info in analysis.groups:
        for axis in info.group.axes:
            by_axis.setdefault((axis.tensor, axis.axis), []).append((info.group.index, axis.positions))
    heads = _heads(analysis)
    readers: list[Reader] = []
    for layer in analysis.layers:
        parts = by_axis.get((layer.weight, layer.weight_axis), [])
        shared = uses[layer.weight] > 1 or (layer.bias and uses[layer.bias] > 1)
        weight_shape = tuple(graph.stored(layer.weight).dims)
        if shared or columns_of(layer, weight_shape) > MAX_COLUMNS or not (parts or layer.node.index in heads):
            continue
        in_shape, out_shape = shapes.shape(layer.data) or (), shapes.shape(layer.output) or ()
        if in_shape[:1] != out_shape[:1] or layer.data in other_rows:
            continue
        unfolding = Unfolding.of(layer, weight_shape, in_shape, out_shape)
        columns = {}
        for index, positions in parts:
            slots = _slots(layer, weight_shape, positions)
            if slots is not None:
                columns[index] = unfolding.columns(slots)
        if len(columns) < len(parts):
            continue
        weights, scale = _matrices(analysis, layer), _following_scale(analysis, layer)
        normalised, ones = scale is not None, np.ones(weights.shape[0] * weights.shape[2])
        scale = ones if scale is None else scale
        readers.append(Reader(len(readers), layer, unfolding, columns, normalised, scale, weights))
    return tuple(readers)


def _slots(layer: Layer, weight_shape: tuple[int, ...], positions: np.ndarray) -> np.ndarray | None:
    """Slots of one group's unfolded input that every unit holds; None where they differ from group to group."""
    if layer.node.op != "ConvTranspose" or layer.group == 1:
        return positions  # the weight's axis is that of one group
    per_group = weight_shape[layer.weight_axis] // layer.group
    if positions.shape[1] % layer.group:
        return None
    slots = np.sort(positions % per_group, axis=1).reshape(len(positions), -1, layer.group)
    return slots[:, :, 0] if (slots == slots[:, :, :1]).all() else None


def _heads(analysis: Analysis) -> set[int]:
    """Nodes of the last layers before the graph's outputs: no other layer comes after them."""
    graph = analysis.graph
    layers = {layer.node.index for layer in analysis.layers}
    later: set[str] = set()  # tensors behind which another layer comes
    heads = set()
    for node in reversed(graph.nodes):
        before = any(name in later for name in node.outputs)
        if node.index in layers and not before:
            heads.add(node.index)
        if before or node.index in layers:
            later.update((*node.inputs, *node.captured))
    return heads


def _following_scale(analysis: Analysis, layer: Layer) -> np.ndarray | None:
    """What a BatchNormalization right behind the layer multiplies every output by; None where there is none.

    It takes the second axis for the channels, which a product of matrices need not make.
    """
    graph, rank = analysis.graph, len(analysis.shapes.shape(layer.output) or ())
    readers = graph.consumers.get(layer.output, ())
    if len(readers) != 1 or readers[0].op != "BatchNormalization" or layer.channel_axis % max(rank, 2) != 1:
        return None
    if not all(map(graph.is_stored, readers[0].inputs[1:])):
        return None
    gamma, variance = (graph.array(readers[0].inputs[k]).astype(np.float64) for k in (1, 4))
    result: np.ndarray = gamma / np.sqrt(variance + float(readers[0].attributes.get("epsilon", 1e-5)))
    return result


def matrices_of(layer: Layer, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """What a layer multiplies by, (group, p, outputs / group), the last row what it adds (zeros without a bias)."""
    matrices = to_matrices(layer, weight) * layer.alpha
    outputs = matrices.shape[0] * matrices.shape[2]
    row = np.zeros(1) if bias is None else bias.astype(np.float64).ravel() * layer.beta
    rows = np.broadcast_to(row, (outputs,)).reshape(matrices.shape[0], 1, -1)
    return np.concatenate([matrices, rows], axis=1)


def _matrices(analysis: Analysis, layer: Layer) -> np.ndarray:
    graph = analysis.graph
    inner = layer.bias and layer.node.op != "MatMul"  # the Add behind a MatMul is not part of its output
    return matrices_of(layer, graph.array(layer.weight), graph.array(layer.bias) if inner else None)
