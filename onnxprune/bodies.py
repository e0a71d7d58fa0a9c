"""Branches of an `If` whose condition only the data tell: laid open among the other nodes, and put back at the end.

Open, both branches are computed, and what is left of the `If` chooses between their results. So layers in branches are
layers like any other: counted, coupled, fitted, cut and proven. Closing puts every node back into the branch that it
came from; what was inserted for it goes with it. Names that two branches use alike are kept apart in between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx

from onnxprune.graph import captured, copy_notes, drop_notes, is_choice
from onnxprune.tensors import bodies, graphs

_BRANCHES = ("then_branch", "else_branch")


@dataclass(frozen=True, eq=False)
class Body:
    """A body that is laid open.

    Attributes:
        attribute: that holds it.
        graph: as it was, without its nodes and stored tensors.
        names: of the tensors that are its own: in the open graph, and in the body.
        results: what it gives, as the open graph calls it.
        labels: of its nodes that got another name in the open graph, their own.
        aliases: tensors from outside that the open graph has in place of some of its own, and those.
    """

    attribute: str
    graph: onnx.GraphProto
    names: Mapping[str, str]
    results: tuple[str, ...]
    labels: Mapping[str, str]
    aliases: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class OpenIf:
    """How to put an `If` together again.

    Attributes:
        node: as it was, its branches emptied.
        outer: tensors that the nodes around it make.
        bodies: both branches.
    """

    node: onnx.NodeProto
    outer: frozenset[str]
    bodies: tuple[Body, ...]


# ------------------------------------------------------------------------------------------------------------ open


def open_next(model: onnx.ModelProto) -> OpenIf | None:
    """Lay open the first `If` of the main graph that can be, in place."""
    defined: Counter[str] | None = None
    for index, node in enumerate(model.graph.node):
        if node.op_type != "If" or node.domain not in ("", "ai.onnx") or is_choice(node):
            continue
        defined = defined or all_names(model)
        if _can_open(node, defined):
            return _open(model, index, defined)
    return None


def all_names(model: onnx.ModelProto) -> Counter[str]:
    """How many graphs of a model give a tensor some name."""
    return Counter(name for graph in graphs(model) for name in _defined(graph))


def names_of(body: onnx.GraphProto) -> Counter[str]:
    """The same of a body and those in it."""
    alone = onnx.ModelProto()
    alone.graph.CopyFrom(body)
    return all_names(alone)


def _defined(graph: onnx.GraphProto) -> Iterator[str]:
    """Names that a graph gives to tensors; not those of the bodies in it."""
    stored = {t.name for t in graph.initializer}
    yield from stored
    yield from (value.name for value in graph.input if value.name not in stored)
    yield from (name for node in graph.node for name in node.output if name)


def stored_names(graph: onnx.GraphProto) -> set[str]:
    """Names of initializers and of what Constants give."""
    return {t.name for t in graph.initializer} | {n.output[0] for n in graph.node if n.op_type == "Constant"}


def _can_open(node: onnx.NodeProto, defined: Counter[str]) -> bool:
    """Whether the branches hold nodes and dense tensors, each of which the report can call by its name."""
    both = list(bodies(node))
    alike = all(len(body.output) == len(node.output) and not body.input for body in both)
    return len(both) == 2 and alike and not any(obstacle(body, defined) for body in both)


def obstacle(body: onnx.GraphProto, defined: Counter[str]) -> str:
    """What keeps a body from being laid open, and how to be rid of it; nothing where it can be.

    Sequences stay in their bodies: between two layers that are fitted only tensors can be held. Of stored tensors, a
    report can name those that nothing else is called like.
    """
    if body.sparse_initializer:
        return "it stores a sparse tensor; export with dense ones"
    for node in body.node:
        if "Sequence" in node.op_type:
            return f"{node.op_type} stands in it; export without lists of tensors"
    for name in sorted(stored_names(body)):
        if defined[name] > 1:
            return f"another graph of the model has a tensor called {name!r} too; give each a name of its own"
    return ""


def _open(model: onnx.ModelProto, index: int, defined: Counter[str]) -> OpenIf:
    node = onnx.NodeProto()
    node.CopyFrom(model.graph.node[index])
    del model.graph.node[index]
    outer = frozenset(name for n in model.graph.node for name in n.output)
    labelled = {n.name for n in model.graph.node} | {node.name}
    inserted: list[onnx.NodeProto] = []
    branches = []
    for attribute in (a for name in _BRANCHES for a in node.attribute if a.name == name):
        branches.append(lay_out(model, attribute, defined, labelled))
        for each in attribute.g.node:
            copy_notes(node, each)  # it runs as often, in the first turn of a loop
        inserted += attribute.g.node
    for k, output in enumerate(node.output):
        if output:
            inserted.append(_choice(node, k, [(b.attribute, b.graph.output[k]) for b in branches], defined))
    for k, each in enumerate(inserted):
        model.graph.node.insert(index + k, each)
    for attribute in node.attribute:
        attribute.ClearField("g")
    return OpenIf(node, outer, tuple(branches))


def lay_out(model: onnx.ModelProto, attribute: onnx.AttributeProto, defined: Counter[str], labelled: set[str]) -> Body:
    """Give the tensors and nodes of a body names of their own, in place, and its stored tensors to the model."""
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
    model.graph.initializer.extend(body.initializer)
    described = {value.name for value in body.value_info}
    own = set(fresh.values()) - described
    more = {v.name: v for v in (*body.output, *body.input) if v.name in own and v.type.HasField("tensor_type")}
    model.graph.value_info.extend([*body.value_info, *more.values()])
    found = Body(
        attribute.name,
        onnx.GraphProto(name=body.name, doc_string=body.doc_string),
        {new: old for old, new in fresh.items()},
        tuple(value.name for value in body.output),
        labels,
    )
    found.graph.input.extend(body.input)
    found.graph.output.extend(body.output)
    found.graph.value_info.extend(v for v in body.value_info if v.name not in found.names)
    found.graph.metadata_props.extend(body.metadata_props)
    return found


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


def close_if(model: onnx.ModelProto, opened: OpenIf) -> None:
    """Put the branches of one `If` back, in place."""
    graph = model.graph
    outputs = {name: k for k, name in enumerate(opened.node.output) if name}
    choices = [k for k, node in enumerate(graph.node) if is_choice(node) and node.output[0] in outputs]
    if not choices:  # nothing reads it any more
        return
    left = [outputs[graph.node[k].output[0]] for k in choices]
    owner = owners(graph, opened.outer, opened.bodies)
    closed = onnx.NodeProto()
    closed.CopyFrom(opened.node)
    del closed.output[:]
    closed.output.extend(name if k in left else "" for k, name in enumerate(opened.node.output))
    for number, body in enumerate(opened.bodies):
        members = [node for k, node in enumerate(graph.node) if owner.get(k) == number]
        for node in members:
            drop_notes(node)
        next(a for a in closed.attribute if a.name == body.attribute).g.CopyFrom(put_together(graph, body, members))
    _keep_outputs(closed, left)
    take_out(graph, opened.bodies, {*owner, *choices[1:]}, {choices[0]: closed})


def put_together(graph: onnx.GraphProto, body: Body, members: Sequence[onnx.NodeProto]) -> onnx.GraphProto:
    """The body with these nodes, and with the names that it had."""
    described = {value.name: value for value in graph.value_info}
    whole = onnx.GraphProto()
    whole.CopyFrom(body.graph)
    whole.node.extend(members)
    whole.initializer.extend(t for t in graph.initializer if t.name in body.names)
    made = {name for node in members for name in node.output} | set(body.names)
    face = {*body.results, *(value.name for value in whole.input)}
    whole.value_info.extend(v for name, v in described.items() if name in made - face)
    for value, name in zip((*whole.output, *whole.input), (*body.results, *(v.name for v in whole.input)), strict=True):
        value.name = name
        if name in described:
            value.type.CopyFrom(described[name].type)
        elif value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")
    rename(whole, {**body.aliases, **body.names})
    for node in whole.node:
        node.name = body.labels.get(node.name, node.name)
    return whole


def take_out(
    graph: onnx.GraphProto, opened: Sequence[Body], gone: Collection[int], instead: Mapping[int, onnx.NodeProto]
) -> None:
    """Take what is in bodies again out of the graph around them, in place."""
    inner = set().union(*(body.names for body in opened))
    moved = {name for k in gone if k not in instead for name in graph.node[k].output} | inner
    kept = {name for node in instead.values() for name in node.output}
    nodes = [instead.get(k, node) for k, node in enumerate(graph.node) if k in instead or k not in gone]
    _replace(graph.node, nodes)
    _replace(graph.initializer, [t for t in graph.initializer if t.name not in inner])
    _replace(graph.value_info, [v for v in graph.value_info if v.name not in moved - kept])


def owners(graph: onnx.GraphProto, outer: Collection[str], opened: Sequence[Body]) -> dict[int, int]:
    """Per node that belongs into a body, which one: the nodes that came from there, and what only those read."""
    readers: dict[str, set[int]] = {}
    for k, node in enumerate(graph.node):
        for name in {*node.input, *captured(node)}:
            readers.setdefault(name, set()).add(k)
    outputs = {value.name for value in graph.output}
    owner: dict[int, int] = {}
    for k, node in reversed(list(enumerate(graph.node))):
        names = {name for name in node.output if name}
        homes = [number for number, branch in enumerate(opened) if names & set(branch.names)]
        if not homes and not names & outputs and names.isdisjoint(outer):
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
