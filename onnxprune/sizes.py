"""Sizes that a model computes: the part of the graph that follows from Shape and constants alone.

After a cut such values change, or do not change although they should. Which, is found by running that part of the graph
on the new shapes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx

from onnxprune.graph import Graph
from onnxprune.precision import types
from onnxprune.probe import Shapes, size_nodes
from onnxprune.runtime import Runtime

_OF_PRODUCTS = frozenset(
    {
        "Shape",
        "Size",
        "Gather",
        "Slice",
        "Split",
        "Concat",
        "Unsqueeze",
        "Squeeze",
        "Reshape",
        "Identity",
        "Mul",
        "Cast",
    }
)


class SizeGraph:
    """The size-computing part of a graph, evaluated on new shapes.

    A tensor that loses channels is no size, even if it follows from sizes alone (the first state of a recurrence, and
    what is computed of it before anything is read): the nodes around it are cut as all others are.

    Attributes:
        inside: indices of the nodes that compute sizes.
        known: tensors of the part.
        boundary: tensors of the part that other nodes (or the graph's outputs) read.
    """

    def __init__(self, graph: Graph, shapes: Shapes, new_shape: Callable[[str, int], tuple[int, ...]]) -> None:
        self.graph = graph
        self.shapes = shapes
        self.new_shape = new_shape
        self.roots, computing = size_nodes(graph, shapes.probes)
        self.inside, self.known = self._uncut(computing)
        self.boundary = {
            name
            for name in self.known
            if name in graph.outputs or any(r.index not in self.inside for r in graph.consumers.get(name, ()))
        }
        self._after: dict[int, dict[str, np.ndarray]] = {}

    def _uncut(self, computing: set[int]) -> tuple[set[int], set[str]]:
        """Of the nodes that compute sizes those that follow from others and lose nothing, and the tensors they give."""
        inside, known, constant = set[int](), set[str](), self.graph.computed_from_constants
        for index in sorted(computing):
            node = self.graph.nodes[index]
            if index not in self.roots.values():
                given = [name for name in node.inputs if name and name not in constant]
                if not known.issuperset(given) or any(map(self._is_cut, (*node.inputs, *node.outputs))):
                    continue
            inside.add(index)
            known.update(node.outputs)
        return inside, known - {""}

    def _is_cut(self, name: str) -> bool:
        shape = self.shapes.shape(name) if name else None
        return shape is not None and self.new_shape(name, 0) != shape

    def is_product(self, name: str) -> bool:
        """Whether every element of a tensor of the part is a product of sizes and constants."""
        seen, open_names = {name}, [name]
        while open_names:
            node = self.graph.producer.get(open_names.pop())
            if node is None or node.op in ("Shape", "Size"):
                continue
            if node.index in self.inside and node.op not in _OF_PRODUCTS:
                return False
            more = set(node.inputs) & self.known - seen
            seen |= more
            open_names += more
        return name in self.known

    def after(self, name: str, which: int) -> np.ndarray:
        """The value of a tensor of the part on the new shapes, at one of the probes."""
        if which not in self._after:
            self._after[which] = self._evaluate(which)
        return self._after[which][name]

    def _evaluate(self, which: int) -> dict[str, np.ndarray]:
        feeds = {}
        for output, index in self.roots.items():
            node = self.graph.nodes[index]
            shape = np.array(self.new_shape(node.inputs[0], which), dtype=np.int64)
            if node.op == "Size":
                feeds[output] = np.array(shape.prod(), dtype=np.int64)
            else:
                start, end = node.attributes.get("start", 0), node.attributes.get("end")
                feeds[output] = shape[start:end]
        rest = sorted(self.known - set(feeds))
        return feeds | dict(zip(rest, self._run(rest, feeds), strict=True)) if rest else feeds

    def _run(self, names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        source = self.graph.model
        part = onnx.ModelProto()
        part.CopyFrom(source)
        del part.graph.node[:], part.graph.input[:], part.graph.output[:], part.graph.value_info[:]
        part.ir_version = max(part.ir_version, 4)
        part.graph.input.extend(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, list(value.shape))
            for name, value in feeds.items()
        )
        constant = self.graph.computed_from_constants
        part.graph.node.extend(
            proto
            for index, proto in enumerate(source.graph.node)
            if (index in self.inside and index not in self.roots.values())
            or (proto.output and all(o in constant for o in proto.output if o))
        )
        part.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
        del part.graph.initializer[:]
        used = {name for node in part.graph.node for name in node.input}
        part.graph.initializer.extend(t for t in source.graph.initializer if t.name in used)
        runtime = Runtime("cpu", 1, as_float32=onnx.TensorProto.BFLOAT16 in types(part))
        found = runtime.session(part, optimise=False).run(names, feeds)
        return [np.asarray(value) for value in found]
