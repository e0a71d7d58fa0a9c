"""What removed positions of a tensor that was folded are in the stored tensors that it was made from.

A function of the model may turn a weight that it is given before it reads it. Folding leaves the turned weight, which
has no name in the file as it came; the weight that was turned has one.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from onnxprune.graph import FLOATS, MOVING, Graph
from onnxprune.runtime import Runtime, expose

Removed = dict[int, tuple[int, ...]]  # per axis the positions that went


def origins(graph: Graph, removed: Mapping[str, Removed], runtime: Runtime) -> dict[str, Removed]:
    """Removed positions by the names of stored tensors, as far as whole slices of those went.

    Args:
        graph: with its functions inlined, and nothing folded yet.
        removed: of tensors that nodes of the graph compute by moving stored tensors about; others are passed over.
        runtime: how to run those nodes.
    """
    gone: dict[str, np.ndarray] = {}  # per stored tensor, which elements went and which stayed
    stayed: dict[str, np.ndarray] = {}
    used: set[int] = set()
    inner: set[str] = set()
    for name, axes in removed.items():
        nodes = _made_by(graph, name)
        if nodes is None:
            continue
        used |= nodes
        inner.update(n for k in nodes for n in graph.nodes[k].outputs if n != name)
        where, starts = _numbered(graph, name, nodes, runtime)
        mask = np.zeros(where.shape, bool)
        for axis, positions in axes.items():
            mask[(slice(None),) * axis + (list(positions),)] = True
        for source, start in starts.items():
            dims = tuple(graph.stored(source).dims)
            size = int(np.prod(dims))
            ours = (where >= start) & (where < start + size)
            for found, chosen in ((gone, ours & mask), (stayed, ours & ~mask)):
                found.setdefault(source, np.zeros(dims, bool)).flat[where[chosen] - start] = True
    return {
        source: axes
        for source, mask in gone.items()
        if not (mask & stayed[source]).any()
        and all(node.index in used for name in (source, *inner) for node in graph.consumers.get(name, ()))
        and (axes := _slices(mask))
    }


def _made_by(graph: Graph, name: str) -> set[int] | None:
    """The nodes that make a tensor by moving stored ones about; None where they do more."""
    found: set[int] = set()
    waiting = [name]
    while waiting:
        node = graph.producer.get(waiting.pop())
        if node is None or node.op == "Constant" or node.index in found:
            continue
        if (
            node.op not in MOVING
            or node.op == "QuantizeLinear"
            or node.domain
            or node.captured
            or not set(node.outputs) <= _constant(graph)
        ):
            return None
        found.add(node.index)
        waiting += [n for n in node.inputs if n]
    return found or None


def _constant(graph: Graph) -> set[str]:
    return {*graph.computed_from_constants, ""}


def _numbered(graph: Graph, name: str, nodes: set[int], runtime: Runtime) -> tuple[np.ndarray, dict[str, int]]:
    """Where every element comes from: its number, and the first number of each stored tensor of floats."""
    model = onnx.ModelProto(ir_version=max(graph.model.ir_version, 4))
    model.opset_import.extend(graph.model.opset_import)
    model.graph.name = "moved"
    starts: dict[str, int] = {}
    feeds: dict[str, np.ndarray] = {}
    end = 0
    for k in sorted(nodes):
        copy = model.graph.node.add()
        copy.CopyFrom(graph.model.graph.node[k])
        if copy.op_type == "Cast":
            copy.op_type = "Identity"
            del copy.attribute[:]
        for each in filter(graph.is_stored, copy.input):
            if each in feeds or any(t.name == each for t in model.graph.initializer):
                continue
            tensor = graph.stored(each)
            if tensor.data_type not in FLOATS:
                kept = model.graph.initializer.add()
                kept.CopyFrom(tensor)
                kept.name = each
                continue
            size = int(np.prod(tensor.dims))
            starts[each], end = end, end + size
            feeds[each] = np.arange(starts[each], end).reshape(tuple(tensor.dims))
            model.graph.input.append(
                onnx.helper.make_tensor_value_info(each, onnx.TensorProto.INT64, list(tensor.dims))
            )
    return runtime.session(expose(model, [name]), optimise=False).run([name], feeds)[0], starts


def _slices(mask: np.ndarray) -> dict[int, tuple[int, ...]]:
    """Whole slices along axes that together are the mask; nothing where there are none such."""
    axes: dict[int, tuple[int, ...]] = {}
    together = np.zeros(mask.shape, bool)
    for axis in range(mask.ndim):
        whole = np.flatnonzero(mask.all(axis=tuple(k for k in range(mask.ndim) if k != axis)))
        if len(whole):
            axes[axis] = tuple(int(i) for i in whole)
            together[(slice(None),) * axis + (whole,)] = True
    return axes if np.array_equal(together, mask) else {}
