"""Branches of an `If` whose condition only the data tell: laid open among the other nodes, and put back at the end.

Open, both branches are computed, and what is left of the `If` chooses between their results. So layers in branches are
layers like any other: counted, coupled, fitted, cut and proven. Closing puts every node back into the branch that it
came from; what was inserted for it goes with it. Names that two branches use alike are kept apart in between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from onnxprune.branches import inline_branch
from onnxprune.graph import Graph, captured, is_choice
from onnxprune.normalise import normalise, unshare
from onnxprune.runtime import Runtime
from onnxprune.tensors import bodies, graphs

_BRANCHES = ("then_branch", "else_branch")


@dataclass(frozen=True, eq=False)
class Branch:
    """One branch of an open `If`.

    Attributes:
        attribute: which one.
        graph: as it was, without its nodes and stored tensors.
        names: of the tensors that are its own: in the open graph, and in the branch.
        results: what it gives, as the open graph calls it.
        labels: of its nodes that got another name in the open graph, their own.
    """

    attribute: str
    graph: onnx.GraphProto
    names: Mapping[str, str]
    results: tuple[str, ...]
    labels: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class OpenIf:
    """How to put an `If` together again.

    Attributes:
        node: as it was, its branches emptied.
        outer: tensors that the nodes around it make.
        branches: both of them.
    """

    node: onnx.NodeProto
    outer: frozenset[str]
    branches: tuple[Branch, Branch]


@dataclass(frozen=True, eq=False)
class Flat:
    """A model whose branches are laid open.

    Attributes:
        model: computes what the nested one does, as far as both branches run on the same data.
        copies: constants that were copied for their users, and of what.
        opened: in the order in which they were opened.
    """

    model: onnx.ModelProto
    copies: Mapping[str, str]
    opened: tuple[OpenIf, ...]

    def closed(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """A model that was made from the open one, its branches put back; the model itself where there are none."""
        if not self.opened:
            return model
        nested = onnx.ModelProto()
        nested.CopyFrom(model)
        for each in reversed(self.opened):
            _close(nested, each)
        return nested

    @property
    def inner(self) -> frozenset[str]:
        """Tensors of the branches, as they call them."""
        return frozenset(name for each in self.opened for b in each.branches for name in b.names.values())

    def own_name(self, tensor: str) -> str:
        """What the nested model calls a tensor."""
        return next((b.names[tensor] for each in self.opened for b in each.branches if tensor in b.names), tensor)


def forms(graph: Graph, runtime: Runtime) -> list[Flat]:
    """A model, normalised, with its branches laid open where it has some, and as it is.

    The second serves where branches do not run on data that are not meant for them.
    """
    model, copies = normalise(graph, runtime)
    plain, flat = Flat(model, copies, ()), flatten(model, copies)
    return [flat, plain] if flat.opened else [plain]


def flatten(model: onnx.ModelProto, copies: Mapping[str, str]) -> Flat:
    """Lay open every `If` of a normalised model that can be; weights that branches move about stay where they are.

    Args:
        model: is left as it is.
        copies: constants that normalisation copied, and of what.
    """
    flat = onnx.ModelProto()
    flat.CopyFrom(model)
    opened = []
    while (found := _open_next(flat)) is not None:
        opened.append(found)
        while inline_branch(flat):
            pass
    if not opened:
        return Flat(model, copies, ())
    more = unshare(flat)
    return Flat(flat, {**copies, **{copy: copies.get(origin, origin) for copy, origin in more.items()}}, tuple(opened))


# ------------------------------------------------------------------------------------------------------------ open


def _open_next(model: onnx.ModelProto) -> OpenIf | None:
    """Lay open the first `If` of the main graph that can be, in place."""
    if model.ir_version < 4:  # a stored tensor of a branch would become an input of the model
        return None
    defined: Counter[str] | None = None
    for index, node in enumerate(model.graph.node):
        if node.op_type != "If" or node.domain not in ("", "ai.onnx") or is_choice(node):
            continue
        defined = defined or Counter(name for graph in graphs(model) for name in _defined(graph))
        if _can_open(node, defined):
            return _open(model, index, defined)
    return None


def _defined(graph: onnx.GraphProto) -> Iterator[str]:
    """Names that a graph gives to tensors; not those of the bodies in it."""
    stored = {t.name for t in graph.initializer}
    yield from stored
    yield from (value.name for value in graph.input if value.name not in stored)
    yield from (name for node in graph.node for name in node.output if name)


def _stored(graph: onnx.GraphProto) -> set[str]:
    return {t.name for t in graph.initializer} | {n.output[0] for n in graph.node if n.op_type == "Constant"}


def _can_open(node: onnx.NodeProto, defined: Counter[str]) -> bool:
    """Whether the branches hold nodes and dense tensors, each of which the report can call by its name."""
    both = list(bodies(node))
    alike = all(len(body.output) == len(node.output) and not body.input for body in both)
    dense = not any(body.sparse_initializer for body in both)
    return len(both) == 2 and alike and dense and all(defined[n] == 1 for body in both for n in _stored(body))


def _open(model: onnx.ModelProto, index: int, defined: Counter[str]) -> OpenIf:
    node = onnx.NodeProto()
    node.CopyFrom(model.graph.node[index])
    del model.graph.node[index]
    outer = frozenset(name for n in model.graph.node for name in n.output)
    labelled = {n.name for n in model.graph.node} | {node.name}
    inserted: list[onnx.NodeProto] = []
    branches = []
    for attribute in (a for name in _BRANCHES for a in node.attribute if a.name == name):
        body, fresh = attribute.g, {}
        for name in _defined(body):
            new, count = name, 1
            while defined[new] > (1 if new == name else 0):
                new, count = f"{name}_{count}", count + 1
            if new != name:
                defined[name] -= 1
                defined[new] += 1
            fresh[name] = new
        rename(body, fresh)
        labels = _unlike_labels(body, labelled)
        inserted += body.node
        model.graph.initializer.extend(body.initializer)
        described = {value.name for value in body.value_info}
        own = set(fresh.values()) - described
        more = [v for v in body.output if v.name in own and v.type.HasField("tensor_type")]
        model.graph.value_info.extend([*body.value_info, *more])
        branch = Branch(
            attribute.name,
            onnx.GraphProto(name=body.name, doc_string=body.doc_string),
            {new: old for old, new in fresh.items()},
            tuple(value.name for value in body.output),
            labels,
        )
        branch.graph.output.extend(body.output)
        branch.graph.value_info.extend(v for v in body.value_info if v.name not in branch.names)
        branch.graph.metadata_props.extend(body.metadata_props)
        branches.append(branch)
    for k, output in enumerate(node.output):
        if output:
            inserted.append(_choice(node, k, [(b.attribute, b.graph.output[k]) for b in branches], defined))
    for k, each in enumerate(inserted):
        model.graph.node.insert(index + k, each)
    for attribute in node.attribute:
        attribute.ClearField("g")
    return OpenIf(node, outer, (branches[0], branches[1]))


def _choice(
    node: onnx.NodeProto, k: int, results: Sequence[tuple[str, onnx.ValueInfoProto]], defined: Counter[str]
) -> onnx.NodeProto:
    """An `If` that hands on one of two tensors: output ``k`` of the one that there was."""
    both, output = {}, node.output[k]
    for attribute, value in results:
        name = f"{output}_{attribute}"
        while defined[name]:
            name += "_"
        defined[name] += 1
        given = onnx.ValueInfoProto()
        given.CopyFrom(value)
        given.name = name
        if given.type.HasField("tensor_type"):
            given.type.tensor_type.ClearField("shape")
        identity = onnx.helper.make_node("Identity", [value.name], [name])
        both[attribute] = onnx.helper.make_graph([identity], name, [], [given])
    return onnx.helper.make_node("If", list(node.input), [output], name="" if k else node.name, **both)


def _unlike_labels(body: onnx.GraphProto, labelled: set[str]) -> dict[str, str]:
    """Give other names to nodes that are called as others are, in place; returns what they were called."""
    found = {}
    for node in body.node:
        name, count = node.name, 1
        while node.name and node.name in labelled:
            node.name, count = f"{name}_{count}", count + 1
        labelled.add(node.name)
        if node.name != name:
            found[node.name] = name
    return found


def rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Call tensors by other names, in a graph and the bodies in it."""
    for node in graph.node:
        for operands in (node.input, node.output):
            for k, name in enumerate(operands):
                operands[k] = names.get(name, name)
        for body in bodies(node):
            rename(body, names)
    for named in (*graph.initializer, *graph.value_info, *graph.input, *graph.output):
        named.name = names.get(named.name, named.name)


# ----------------------------------------------------------------------------------------------------------- close


def _close(model: onnx.ModelProto, opened: OpenIf) -> None:
    """Put the branches of one `If` back, in place."""
    graph = model.graph
    outputs = {name: k for k, name in enumerate(opened.node.output) if name}
    choices = [k for k, node in enumerate(graph.node) if is_choice(node) and node.output[0] in outputs]
    if not choices:  # nothing reads it any more
        return
    left = [outputs[graph.node[k].output[0]] for k in choices]
    owner = _owners(graph, opened)
    closed = onnx.NodeProto()
    closed.CopyFrom(opened.node)
    del closed.output[:]
    closed.output.extend(name if k in left else "" for k, name in enumerate(opened.node.output))
    described = {value.name: value for value in graph.value_info}
    for number, branch in enumerate(opened.branches):
        body = next(a for a in closed.attribute if a.name == branch.attribute).g
        body.CopyFrom(branch.graph)
        body.node.extend(node for k, node in enumerate(graph.node) if owner.get(k) == number)
        body.initializer.extend(t for t in graph.initializer if t.name in branch.names)
        made = {name for node in body.node for name in node.output} | set(branch.names)
        results = set(branch.results)
        body.value_info.extend(v for name, v in described.items() if name in made - results)
        for value, result in zip(body.output, branch.results, strict=True):
            value.name = result
            if result in described:
                value.type.CopyFrom(described[result].type)
            elif value.type.HasField("tensor_type"):
                value.type.tensor_type.ClearField("shape")
        rename(body, branch.names)
        for node in body.node:
            node.name = branch.labels.get(node.name, node.name)
    _keep_outputs(closed, left)
    inner = set().union(*(branch.names for branch in opened.branches))
    moved = {name for k in owner for name in graph.node[k].output} | inner
    gone = {*owner, *choices[1:]}
    nodes = [closed if k == choices[0] else node for k, node in enumerate(graph.node) if k not in gone]
    _replace(graph.node, nodes)
    _replace(graph.initializer, [t for t in graph.initializer if t.name not in inner])
    _replace(graph.value_info, [v for v in graph.value_info if v.name not in moved])


def _owners(graph: onnx.GraphProto, opened: OpenIf) -> dict[int, int]:
    """Per node that belongs into a branch, which one: the nodes that came from there, and what only those read."""
    readers: dict[str, set[int]] = {}
    for k, node in enumerate(graph.node):
        for name in {*node.input, *captured(node)}:
            readers.setdefault(name, set()).add(k)
    outputs = {value.name for value in graph.output}
    owner: dict[int, int] = {}
    for k, node in reversed(list(enumerate(graph.node))):
        names = {name for name in node.output if name}
        homes = [number for number, branch in enumerate(opened.branches) if names & set(branch.names)]
        if not homes and not names & (opened.outer | outputs):
            read_by = {owner.get(reader) for name in names for reader in readers.get(name, ())}
            homes = [home for home in read_by if home is not None] if len(read_by) == 1 else []
        if homes:
            owner[k] = homes[0]
    return owner


def _keep_outputs(node: onnx.NodeProto, left: Sequence[int]) -> None:
    """Take out the outputs that nothing makes any more."""
    names = [node.output[k] for k in range(len(node.output))]
    gone = [k for k, name in enumerate(names) if not name and k not in left]
    for attribute in node.attribute:
        if attribute.name in _BRANCHES:
            for k in reversed(gone):
                del attribute.g.output[k]
    for k in reversed(gone):
        del node.output[k]


def _replace(field: Any, items: Sequence[Any]) -> None:
    copies = list(items)
    del field[:]
    field.extend(copies)
