"""Make the graph say plainly what it computes, without changing it.

Functions of the model are inlined, and the branch of an `If` that a constant or a static size chooses takes its place.
Lists of tensors that are split, written and read at known places become slices and concatenations.
What depends on constants alone is computed once and stored, so that weights behind Identity, Transpose, Cast or a
normalisation are ordinary weights; quantised weights stay quantised. Small constants that exporters merged although
unrelated operators use them (the ones and zeros of normalisations) are given back to each user. Weights that several
layers truly share stay shared.
"""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.inliner import inline_local_functions

from onnxprune.branches import inline_branch
from onnxprune.graph import FLOATS, MOVING, Graph
from onnxprune.runtime import Runtime, expose
from onnxprune.sequences import unpack_sequences
from onnxprune.tensors import graphs

STORING = 4  # IR version from which on a stored tensor need not be an input
_LARGEST_FOLDED = 1 << 20  # elements; larger results are folded only where they do not outgrow what they come from
_LARGEST_COPY = 1 << 16  # elements
_QUANTISED = ("QuantizeLinear", "DequantizeLinear")
_WEIGHT_OPERANDS = {  # what makes channels: to be named in the report, it has to be cut alike for all that read it
    **dict.fromkeys(("Conv", "ConvTranspose", "DeformConv", "FusedConv"), (1,)),
    **dict.fromkeys(("Einsum", "FusedGemm", "FusedMatMul", "Gemm", "MatMul"), (0, 1)),
    **dict.fromkeys(("GRU", "LSTM", "RNN"), (1, 2)),
    "Gather": (0,),
}


def normalise(graph: Graph, runtime: Runtime) -> tuple[onnx.ModelProto, dict[str, str]]:
    """A model that computes the same, with constants folded and small constants given to each user.

    Returns:
        the model, of an IR version in which a stored tensor need not be an input, and per copied constant the name of
        the tensor that it is a copy of.
    """
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    if model.functions:
        model = inline_local_functions(model)
    fold = functools.partial(_fold, model, graph.folder, runtime, weights=model.ir_version >= STORING)
    model.ir_version = max(model.ir_version, STORING)
    fold()
    while inline_branch(model):
        fold()
    used = used_names(model)
    unpack_sequences(model, model.graph.initializer.append)
    drop_unused(model, used)
    _fill_apart(model)
    return model, unshare(model)


def _fill_apart(model: onnx.ModelProto) -> None:
    """One node for every user of a tensor that is one number all over, sized at run time: the first states of layers.

    Exporters write one where layers have nothing to do with one another but that they all start at zero.
    """
    taken = {name for graph in graphs(model) for node in graph.node for name in node.output}
    readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
    for node in model.graph.node:
        for k, name in enumerate(node.input):
            readers.setdefault(name, []).append((node, k))
    for place in reversed(range(len(model.graph.node))):
        made = model.graph.node[place]
        if made.op_type != "ConstantOfShape" or made.domain or any(a.t.data_type not in FLOATS for a in made.attribute):
            continue
        for number, (reader, k) in enumerate(readers.get(made.output[0], [])[1:]):
            copy = onnx.NodeProto()
            copy.CopyFrom(made)
            while (name := f"{made.output[0]}__{number}") in taken:
                number += 1
            taken.add(name)
            copy.output[0] = reader.input[k] = name
            copy.name = f"{made.name}__{number}" if made.name else ""
            model.graph.node.insert(place + 1, copy)


def _fold(model: onnx.ModelProto, folder: Path, runtime: Runtime, *, weights: bool) -> None:
    """Store what depends on constants alone, in place; or, without ``weights``, what is no number in floating point.

    In IR versions before 4 weights keep to their names in the file, where a tensor that was computed could not be one.
    """
    graph = Graph(model, folder)
    constant = graph.computed_from_constants
    stays: set[str] = set()  # quantised weights; and what layers' weights give that are read as they are, too
    folded: set[int] = set()
    read_twice = _read_twice(graph)
    for node in graph.nodes:
        computes = node.op not in MOVING and not read_twice.isdisjoint(node.inputs)
        if node.op in _QUANTISED or stays & set(node.inputs) or (computes and set(node.outputs) <= constant):
            stays.update(node.outputs)
        elif _foldable(node.outputs, constant) and any(node.inputs):
            folded.add(node.index)
    wanted = sorted(
        {
            name
            for index in folded
            for name in graph.nodes[index].outputs
            if name in graph.outputs or any(reader.index not in folded for reader in graph.consumers.get(name, ()))
        }
    )
    if not wanted:
        return
    only = onnx.ModelProto()
    only.CopyFrom(model)
    del only.graph.node[:], only.graph.input[:], only.graph.value_info[:]
    only.graph.node.extend(n for k, n in enumerate(model.graph.node) if k in folded or n.op_type == "Constant")
    values = runtime.session(expose(only, wanted), optimise=False).run(wanted, {})
    largest = max((int(np.prod(t.dims)) for t in model.graph.initializer), default=0)
    keep = {
        name: value
        for name, value in zip(wanted, values, strict=True)
        if isinstance(value, np.ndarray)
        and value.size <= max(_LARGEST_FOLDED, largest)
        and name not in graph.outputs
        and (value.dtype.kind != "f" or (weights and not runtime.as_float32))  # not in another type than the model's
    }
    used = used_names(model)
    nodes = [n for k, n in enumerate(model.graph.node) if k not in folded or not set(n.output) <= {*keep, ""}]
    present = {name for node in nodes for name in node.output}
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for name, value in keep.items():
        if name not in present:
            model.graph.initializer.append(numpy_helper.from_array(value, name))
    drop_unused(model, used)


def _read_twice(graph: Graph) -> set[str]:
    """Stored matrices that layers read: what is computed of them has to follow where their channels go.

    So it is with a codebook and its norms. What only moves a matrix about does not compute. A table that is only picked
    from is no layer's: distances to its rows, say, are taken with a copy, and have to stay what they are.
    """
    constant, found = graph.computed_from_constants, set[str]()
    for node in reversed(graph.nodes):
        moves = node.op in MOVING and not node.domain and found & set(node.outputs)
        if moves or not set(node.outputs) - {""} <= constant:
            reads = () if node.op == "Gather" else _WEIGHT_OPERANDS.get(node.op, ())
            weights = range(len(node.inputs)) if moves else reads
            found.update(node.inputs[k] for k in weights if k < len(node.inputs) and node.inputs[k] in constant)
    return {n for n in found if graph.is_stored(n) and len(graph.stored(n).dims) > 1}


def used_names(model: onnx.ModelProto) -> set[str]:
    """Names that a node of the main graph or of a body reads, and the graph's outputs."""

    def read(graph: onnx.GraphProto) -> set[str]:
        names = {o.name for o in graph.output} | {name for node in graph.node for name in node.input}
        for node in graph.node:
            for attribute in node.attribute:
                for body in [attribute.g] if attribute.HasField("g") else list(attribute.graphs):
                    names |= read(body)
        return names - {""}

    return read(model.graph)


def drop_unused(model: onnx.ModelProto, before: set[str]) -> None:
    """Take out nodes and stored tensors that nothing reads any more; what nothing read ``before`` stays."""
    listed = {value.name for value in model.graph.input}
    while True:
        used = used_names(model)
        gone = [
            k for k, node in enumerate(model.graph.node) if not set(node.output) & used and set(node.output) & before
        ]
        for k in reversed(gone):
            del model.graph.node[k]
        if not gone:
            break
    rest = [t for t in model.graph.initializer if t.name in used or t.name in listed or t.name not in before]
    if len(rest) < len(model.graph.initializer):
        del model.graph.initializer[:]
        model.graph.initializer.extend(rest)


def _foldable(outputs: tuple[str, ...], constant: frozenset[str]) -> bool:
    return all(name in constant for name in outputs if name) and any(outputs)


def unshare(model: onnx.ModelProto) -> dict[str, str]:
    """One copy of a small shared constant for every user but the first; layers' weights stay shared."""
    stored = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    stored[node.output[0]] = attribute.t
    uses: Counter[str] = Counter()
    weights: set[str] = set()
    inner: set[str] = set()
    for node in model.graph.node:
        uses.update(name for name in node.input if name)
        weights.update(node.input[k] for k in _WEIGHT_OPERANDS.get(node.op_type, ()) if k < len(node.input))
        for attribute in node.attribute:
            for body in [attribute.g] if attribute.HasField("g") else list(attribute.graphs):
                inner.update(name for n in body.node for name in n.input)
    outputs = {o.name for o in model.graph.output}
    copies: dict[str, str] = {}
    seen: set[str] = set()
    taken = set(stored) | {name for node in model.graph.node for name in node.output}
    for node in list(model.graph.node):
        for k, name in enumerate(node.input):
            tensor = stored.get(name)
            if tensor is None or uses[name] < 2 or name in weights | inner | outputs:
                continue
            if not tensor.dims or int(np.prod(tensor.dims)) > _LARGEST_COPY:
                continue
            if name not in seen:
                seen.add(name)
                continue
            copy = f"{name}__{len(copies)}"
            while copy in taken:
                copy += "_"
            taken.add(copy)
            copies[copy] = name
            twin = onnx.TensorProto()
            twin.CopyFrom(tensor)
            twin.name = copy
            model.graph.initializer.append(twin)
            node.input[k] = copy
    return copies
