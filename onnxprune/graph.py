"""A read-only view of an ONNX model: nodes, tensors, constants. Nothing here changes a model.

The view is read through onnx-graphsurgeon; the `onnx.ModelProto` itself stays untouched beside it, because it alone
carries everything that has to survive into the written file (metadata, functions, doc strings, external data).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.logger import G_LOGGER

from onnxprune.data import InputSpec
from onnxprune.errors import InputError
from onnxprune.tensors import array_of, attach, every_tensor, is_attached, is_outside, with_dense

G_LOGGER.severity = G_LOGGER.ERROR  # it warns of types that NumPy lacks, which are kept as they are

_NOTES = "onnxprune."
# what a stored zero passes as a zero: as it is, or as the number that is read as one
MOVING = frozenset(
    {"Cast", "Concat", "Flatten", "Gather", "Identity", "QuantizeLinear"}
    | {"Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
)
_NAMELESS = frozenset({"none", "null", "unk", "unknown", "dynamic"})  # names of sizes that need not be alike
FLOATS = frozenset(
    {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16}
)


@dataclass(frozen=True, eq=False)
class Node:
    """One operator call of the main graph. ``inputs`` and ``outputs`` are tensor names, empty where absent."""

    index: int
    name: str
    op: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]  # but for bodies, which are read from the model
    captured: tuple[str, ...]  # tensors that a body (If, Loop, Scan) takes from outside
    choice: bool = False  # an If that hands on one of two tensors, see `is_choice`
    entry: bool = False  # what the first turn of a loop gets: later ones may get anything
    turn: tuple[tuple[str, ...], tuple[str, ...]] | None = None  # of an open loop, what a turn gets and gives
    often: tuple[tuple[str, int], ...] = ()  # of a node of first turns, the axes that are as long as there are turns

    @property
    def operands(self) -> tuple[str, ...]:
        """All tensors that the node relates to its outputs."""
        return (*self.inputs, *(self.captured if self.turn is None else (*self.turn[0], *self.turn[1])))

    @property
    def label(self) -> str:
        """The node's name, or its first output where it has none."""
        return self.name or next((o for o in self.outputs if o), f"{self.op}_{self.index}")


class Graph:
    """The main graph of a model, indexed for reading."""

    def __init__(self, model: onnx.ModelProto, folder: Path | None = None) -> None:
        self.model = model
        self.folder = folder or Path()
        self.opsets = {entry.domain if entry.domain != "ai.onnx" else "": entry.version for entry in model.opset_import}
        self.initializers = {t.name: t for t in model.graph.initializer}
        try:
            imported = gs.import_onnx(model).nodes
        except Exception as error:  # whatever the reader chokes on is a fault of the file
            raise InputError(f"the graph cannot be read ({error}); check it with onnx.checker.check_model") from error
        self.nodes = tuple(
            Node(
                index,
                node.name,
                node.op,
                "" if proto.domain == "ai.onnx" else proto.domain,
                tuple(proto.input),
                tuple(proto.output),
                {name: value for name, value in node.attrs.items() if not isinstance(value, gs.Graph)},
                tuple(sorted(captured(proto))),
                is_choice(proto),
                **_noted(proto),
            )
            for index, (node, proto) in enumerate(zip(imported, model.graph.node, strict=True))
        )
        self.outputs = tuple(o.name for o in model.graph.output)
        self._constants: dict[str, np.ndarray] = {}

    @cached_property
    def inputs(self) -> tuple[InputSpec, ...]:
        """The inputs that a caller has to feed (initializers listed as inputs are not among them)."""
        specs = []
        fed = [value for value in self.model.graph.input if value.name not in self.initializers]
        inner = {symbol(dim) for value in fed for dim in value.type.tensor_type.shape.dim[1:]} - {""}
        for value in fed:
            if not value.type.HasField("tensor_type"):
                raise InputError(f"input {value.name!r} of the model is not a tensor; only tensor inputs are supported")
            tensor = value.type.tensor_type
            dims = tuple(d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in tensor.shape.dim)
            dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
            stacks = not tensor.shape.dim or symbol(tensor.shape.dim[0]) not in inner
            specs.append(InputSpec(value.name, dims, dtype, stacks))
        return tuple(specs)

    @cached_property
    def consumers(self) -> dict[str, tuple[Node, ...]]:
        """Per tensor the nodes that read it, bodies included."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in dict.fromkeys((*node.inputs, *node.captured)):
                if name:
                    found.setdefault(name, []).append(node)
        return {name: tuple(nodes) for name, nodes in found.items()}

    @cached_property
    def producer(self) -> dict[str, Node]:
        """Per tensor the node that computes it."""
        return {name: node for node in self.nodes for name in node.outputs if name}

    @cached_property
    def computed_from_constants(self) -> frozenset[str]:
        """Names of the tensors that depend on no input: initializers, Constants and what follows from them alone."""
        known = set(self.initializers) | {""}
        for node in self.nodes:
            random = node.op.startswith(("Random", "Multinomial", "Bernoulli"))
            if not random and not node.captured and all(name in known for name in node.inputs):
                known.update(node.outputs)
        return frozenset(known - {""})

    @cached_property
    def unsilenced(self) -> frozenset[str]:
        """Names of the constants that zeros in the file do not make zero: something computes them from what is stored.

        So it is with what is read of integers, unless all readers of those take one stored number for zero.
        """
        found: set[str] = set()
        for node in self.nodes:
            reads_integers = node.op == "DequantizeLinear" and node.inputs[0] in self.computed_from_constants
            constant = reads_integers or set(node.outputs) - {""} <= self.computed_from_constants
            if node.op == "Constant" or not constant:
                continue
            moves, data = node.op in MOVING, node.inputs if node.op == "Concat" else node.inputs[:1]
            if reads_integers:
                maker, point = self.producer.get(node.inputs[0]), self._zero_point(node)
                rounded = maker is not None and maker.op == "QuantizeLinear"  # which makes a zero what is read as one
                moves = rounded or node.inputs[0] in self.zero_points or (point is not None and not np.any(point))
                if not moves:
                    found.add(node.inputs[0])
            if not moves or found & set(data):
                found.update(node.outputs)
        return frozenset(found - {""})

    @cached_property
    def zero_points(self) -> dict[str, np.ndarray]:
        """Per stored tensor of integers the number that all its readers take for zero, where that is not zero itself.

        It broadcasts against the tensor: along an axis there may be one for every position. None of tensors that are
        inputs as well: what the integers stand for cannot be given in place of them.
        """
        found: dict[str, np.ndarray] = {}
        fed = {value.name for value in self.model.graph.input}
        for node in self.nodes:
            name = node.inputs[0] if node.op == "DequantizeLinear" else ""
            own = name and self.is_stored(name) and name not in fed and name not in self.outputs
            point = self._zero_point(node) if own else None
            if point is None or not np.any(point):
                continue
            readers = self.consumers[name]
            points = [self._zero_point(r) for r in readers if r.op == "DequantizeLinear" and name not in r.inputs[1:]]
            if len(points) == len(readers) and all(p is not None and np.array_equal(p, point) for p in points):
                found[name] = point
        return found

    def _zero_point(self, node: Node) -> np.ndarray | None:
        """What a DequantizeLinear takes for zero, to be broadcast against its input; None where that is computed."""
        name = node.inputs[2] if len(node.inputs) > 2 else ""
        if not name:
            return np.zeros((), np.int64)
        if not self.is_stored(name) or node.attributes.get("block_size", 0):
            return None
        point = self.array(name)
        if point.size == 1 or not self.is_stored(node.inputs[0]):
            return point.reshape(()) if point.size == 1 else point
        rank, axis = len(self.stored(node.inputs[0]).dims), int(node.attributes.get("axis", 1))
        return point.reshape([-1 if k == axis % rank else 1 for k in range(rank)]) if rank else None

    def is_stored(self, name: str) -> bool:
        """Whether the tensor's values stand in the file (an initializer or a Constant's tensor)."""
        return name in self.initializers or name in self._constant_nodes

    @cached_property
    def _constant_nodes(self) -> dict[str, onnx.TensorProto]:
        found = {}
        for proto in self.model.graph.node:
            if proto.op_type == "Constant" and proto.domain in ("", "ai.onnx"):
                for attribute in proto.attribute:
                    if attribute.name == "value":
                        found[proto.output[0]] = attribute.t
        return found

    def stored(self, name: str) -> onnx.TensorProto:
        """The proto of a stored tensor."""
        return self.initializers[name] if name in self.initializers else self._constant_nodes[name]

    def stored_names(self) -> Iterator[str]:
        """Every stored tensor of the main graph."""
        yield from self.initializers
        yield from self._constant_nodes

    def array(self, name: str) -> np.ndarray:
        """The values of a stored tensor; read once, and not to be written to."""
        if name not in self._constants:
            self._constants[name] = array_of(self.stored(name))
        return self._constants[name]

    def silenced(self, name: str, gone: np.ndarray | None, array: np.ndarray | None = None) -> np.ndarray:
        """The values of a stored tensor, or new ones; what its readers take for zero stands where the mask says so."""
        array = self.array(name) if array is None else array
        if gone is None:
            return array
        array = array.copy()
        array[gone] = np.broadcast_to(self.zero_points.get(name, 0), array.shape)[gone]
        return array


def symbol(dim: onnx.TensorShapeProto.Dimension) -> str:
    """The name of a dynamic size; nothing where it has none, or one that exporters give to whatever is dynamic."""
    name = "" if dim.HasField("dim_value") and dim.dim_value > 0 else dim.dim_param
    return name if any(map(str.isalpha, name)) and name.lower() not in _NAMELESS else ""


def captured(proto: onnx.NodeProto) -> set[str]:
    """Names that the bodies of a node take from outside."""
    found: set[str] = set()
    for attribute in proto.attribute:
        for body in [attribute.g] if attribute.HasField("g") else list(attribute.graphs):
            inner = {i.name for i in body.input} | {t.name for t in body.initializer}
            for node in body.node:
                found.update(name for name in (*node.input, *captured(node)) if name and name not in inner)
                inner.update(node.output)
            found.update(o.name for o in body.output if o.name not in inner)
    return found


def note(proto: onnx.NodeProto, what: str, value: object = True) -> onnx.NodeProto:
    """Write down on a node what `Node` is to know of it: ``entry``, ``turn`` or ``often``."""
    proto.metadata_props.append(onnx.StringStringEntryProto(key=f"{_NOTES}{what}", value=json.dumps(value)))
    return proto


def noted(proto: onnx.NodeProto, what: str) -> Any:
    """What was written down on a node; nothing where nothing was."""
    return next((json.loads(e.value) for e in proto.metadata_props if e.key == f"{_NOTES}{what}"), None)


def copy_notes(source: onnx.NodeProto, proto: onnx.NodeProto) -> None:
    """Write down on a node what was written down on another one."""
    proto.metadata_props.extend(entry for entry in source.metadata_props if entry.key.startswith(_NOTES))


def drop_notes(proto: onnx.NodeProto) -> None:
    """Take off what was written down."""
    rest = [entry for entry in proto.metadata_props if not entry.key.startswith(_NOTES)]
    del proto.metadata_props[:]
    proto.metadata_props.extend(rest)


def _noted(proto: onnx.NodeProto) -> dict[str, Any]:
    found = {e.key.removeprefix(_NOTES): json.loads(e.value) for e in proto.metadata_props if e.key.startswith(_NOTES)}
    if "turn" in found:
        found["turn"] = tuple(map(tuple, found["turn"]))
    return found | ({"often": tuple(map(tuple, found["often"]))} if "often" in found else {})


def is_choice(proto: onnx.NodeProto) -> bool:
    """Whether a node is an `If` that does nothing but hand on one of two tensors."""
    if proto.op_type != "If" or proto.domain not in ("", "ai.onnx") or len(proto.output) != 1:
        return False
    bodies = [a.g for a in proto.attribute if a.HasField("g")]
    return all([n.op_type for n in body.node] == ["Identity"] and not body.initializer for body in bodies)


def read_model(path: Path) -> onnx.ModelProto:
    """Load a model from a file; large tensors that it keeps outside are mapped when they are looked at.

    Raises:
        InputError: there is no such file, it does not hold an ONNX model, or its external data cannot be used.
    """
    if not path.exists():
        raise InputError(f"no such file: {path}; expected an ONNX model")
    if path.is_dir():
        raise InputError(f"{path} is a folder; expected an ONNX file (try {path / 'model.onnx'})")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty; expected an ONNX model (was the download or the export cut off?)")
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # protobuf's own errors share no base class
        raise InputError(
            f"{path} is not a readable ONNX model (it may be truncated or of another format); export or copy it again"
        ) from error
    if not model.graph.node or not model.opset_import:
        raise InputError(
            f"{path} holds no ONNX graph (found {len(model.graph.node)} nodes and {len(model.opset_import)} opset"
            " imports); export the model again"
        )
    attach(model, path)
    return with_dense(model)


def model_of(given: str | Path | onnx.ModelProto) -> onnx.ModelProto:
    """A model, or that of a file.

    Raises:
        InputError: the file does not hold one, or it is neither.
    """
    if isinstance(given, str | os.PathLike):
        return read_model(Path(given))
    if not isinstance(given, onnx.ModelProto):
        raise InputError(
            f"expected the path of a model or an onnx.ModelProto, found {type(given).__name__}; try onnx.load, or"
            " onnx.load_from_string for bytes"
        )
    if apart := next((t.name for t in every_tensor(given) if is_outside(t) and not is_attached(t)), None):
        raise InputError(
            f"the model's tensor {apart!r} is in another file, and nothing says in which folder; try the path of the"
            " model instead, or onnx.load with its external data"
        )
    return with_dense(given)
