"""A graph run piece by piece: each node once, with only the frontier between two pieces kept.

Nodes are put in an order in which the nodes of interest come as late as they can, so that whatever else is to be known
at that point (the other branch of a residual sum) has been computed before.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx
import onnxruntime as ort

from onnxprune.graph import Graph
from onnxprune.precision import cast
from onnxprune.probe import Shapes, size_nodes
from onnxprune.runtime import Runtime
from onnxprune.tensors import stored

_FOUR_BITS = frozenset({onnx.TensorProto.INT4, onnx.TensorProto.UINT4})  # which onnxruntime takes from no array


def late_order(graph: Graph, late: Collection[int]) -> list[int]:
    """A topological order of the nodes in which the ``late`` ones wait until nothing else can run."""
    producer = graph.producer
    waits: dict[int, int] = {}
    readers: dict[int, list[int]] = {}
    for node in graph.nodes:
        sources = {producer[n].index for n in (*node.inputs, *node.captured) if n in producer}
        waits[node.index] = len(sources)
        for source in sources:
            readers.setdefault(source, []).append(node.index)
    wait = set(late)
    heap = [(index in wait, index) for index, count in waits.items() if count == 0]
    heapq.heapify(heap)
    order = []
    while heap:
        _, index = heapq.heappop(heap)
        order.append(index)
        for reader in readers.get(index, ()):
            waits[reader] -= 1
            if waits[reader] == 0:
                heapq.heappush(heap, (reader in wait, reader))
    return order


class Segments:
    """Pieces of a graph as sessions.

    Args:
        graph: the model.
        order: all its nodes in a topological order.
        runtime: how to run the pieces.
        shapes: which sizes are static; without, all but the batch are taken to be.
    """

    def __init__(self, graph: Graph, order: Sequence[int], runtime: Runtime, shapes: Shapes | None = None) -> None:
        self.graph = graph
        self.shapes = shapes
        self.order = list(order)
        self.runtime = runtime
        self.place = {index: k for k, index in enumerate(order)}
        self._last_use = {name: max(self.place[n.index] for n in readers) for name, readers in graph.consumers.items()}
        self._stored = set(graph.stored_names())
        inside = size_nodes(graph, shapes.probes)[1] if shapes else set()
        self._sizes = {name for index in inside for name in graph.nodes[index].outputs}  # whose first axis is no batch

    def frontier(self, cut: int) -> list[str]:
        """Tensors made before position ``cut`` of the order that a node at or after it reads."""
        constant = self.graph.computed_from_constants
        names = [spec.name for spec in self.graph.inputs]
        names += [n for index in self.order[:cut] for n in self.graph.nodes[index].outputs if n]
        return [n for n in names if n not in constant and self._last_use.get(n, -1) >= cut]

    def piece(
        self,
        start: int,
        stop: int,
        outputs: Sequence[str],
        examples: Mapping[str, np.ndarray],
        arrays: Mapping[str, np.ndarray] | None = None,
        free: Collection[str] = (),
    ) -> Piece:
        """The nodes at positions [start, stop) as a session; the arguments are those of `part`."""
        return self.part(self.order[max(start, 0) : stop], outputs, examples, arrays, free)

    def part(
        self,
        nodes: Collection[int],
        outputs: Sequence[str],
        examples: Mapping[str, np.ndarray],
        arrays: Mapping[str, np.ndarray] | None = None,
        free: Collection[str] = (),
    ) -> Piece:
        """Some nodes as a session.

        Args:
            nodes: their indices in the graph.
            outputs: tensors to compute.
            examples: one array per tensor that is fed; only their types and ranks matter.
            arrays: values that replace stored tensors.
            free: stored tensors that are fed instead, at every call.
        """
        arrays = arrays or {}
        graph = self.graph
        inside = sorted({i for i in nodes if self._computes(i)} | self._constants())
        made = {name for i in inside for name in graph.nodes[i].outputs}
        needed = {name for i in inside for name in (*graph.nodes[i].inputs, *graph.nodes[i].captured)} | set(outputs)
        model = onnx.ModelProto()
        model.ir_version = max(graph.model.ir_version, 4)
        model.opset_import.extend(graph.model.opset_import)
        model.functions.extend(graph.model.functions)
        model.graph.name = "piece"
        # the pieces' nodes keep a topological order: by position, constants first
        inside.sort(key=lambda i: (graph.nodes[i].op != "Constant", self.place[i]))
        model.graph.node.extend(
            graph.model.graph.node[i] for i in inside if not set(graph.nodes[i].outputs) & (set(arrays) | set(free))
        )
        for name in sorted(needed & self._stored):
            if name in free:
                continue
            if name in arrays:
                new = stored(cast(arrays[name], graph.array(name).dtype), graph.stored(name))
                new.name = name  # the value of a Constant node need not have one
                model.graph.initializer.append(new)
            elif name in graph.initializers:
                model.graph.initializer.append(graph.initializers[name])
        feeds = [n for n in examples if n in needed and n not in made and n not in self._stored]
        widened: dict[str, str] = {}
        for name in (*feeds, *free):
            dtype = graph.array(name).dtype if name in free else examples[name].dtype
            shape = graph.array(name).shape if name in free else self._shape(name, examples[name])
            kind = onnx.helper.np_dtype_to_tensor_dtype(dtype)
            if kind in _FOUR_BITS:
                widened[name] = f"{name}/int8"
                model.graph.node.insert(0, onnx.helper.make_node("Cast", [widened[name]], [name], to=kind))
                kind = onnx.TensorProto.INT8
            model.graph.input.append(onnx.helper.make_tensor_value_info(widened.get(name, name), kind, shape))
        wanted = [name for name in outputs if name in made]
        model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in wanted)
        session = self.runtime.session(model) if wanted else None
        return Piece(session, [*feeds, *free], wanted, list(outputs), widened)

    def _shape(self, name: str, example: np.ndarray) -> list[int | str]:
        known = self.shapes is not None and self.shapes.known(name)
        return [
            size
            if (axis or name in self._sizes) and (not known or self.shapes is None or self.shapes.is_static(name, axis))
            else f"{name}_{axis}"
            for axis, size in enumerate(example.shape)
        ]

    def _computes(self, index: int) -> bool:
        return self.graph.nodes[index].op != "Constant"

    def _constants(self) -> set[int]:
        """Constants and what follows from them alone: part of every piece."""
        constant = self.graph.computed_from_constants
        return {n.index for n in self.graph.nodes if n.outputs and all(o in constant for o in n.outputs if o)}


class Piece:
    """A session over some nodes; tensors that are only passed through are passed on."""

    def __init__(
        self,
        session: ort.InferenceSession | None,
        inputs: list[str],
        computed: list[str],
        outputs: list[str],
        widened: Mapping[str, str],
    ) -> None:
        self.session = session
        self.inputs = inputs
        self.computed = computed
        self.outputs = outputs
        self.widened = widened  # inputs that are fed in int8, and what they are called then

    def run(
        self, tensors: Mapping[str, np.ndarray], free: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """The outputs, from the tensors of the frontier."""
        found = self.compute(tensors, free)
        return {name: found[name] if name in found else tensors[name] for name in self.outputs}

    def compute(
        self, tensors: Mapping[str, np.ndarray], free: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """The outputs that are not merely passed on."""
        free = free or {}
        given = {name: free[name] if name in free else tensors[name] for name in self.inputs}
        for name, wide in self.widened.items():
            given[wide] = given.pop(name).astype(np.int8)
        return dict(zip(self.computed, self.session.run(self.computed, given), strict=True)) if self.session else {}
