"""Loops with layers in their bodies: the first turn laid open beside the loop, and put back into it at the end.

The loop itself stays, and computes what it did. Its first turn stands beside it, so that the layers of the body are
layers like any other: counted (as often as there are turns), coupled and cut. That a state is the same before and after
a turn is what the loop's row in the table says. Closing makes the nodes of the first turn the loop's body.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxprune.bodies import (
    Body,
    all_names,
    lay_out,
    names_of,
    obstacle,
    owners,
    put_together,
    rename,
    stored_names,
    take_out,
)
from onnxprune.graph import drop_notes, note, noted
from onnxprune.macs import layers_within
from onnxprune.tensors import bodies, nodes_within


@dataclass(frozen=True, eq=False)
class OpenLoop:
    """How to put a loop together again.

    Attributes:
        node: as it was, its body emptied.
        outer: tensors that the nodes around it make.
        bodies: its one body.
        entry: tensors that only the first turn has.
    """

    node: onnx.NodeProto
    outer: frozenset[str]
    bodies: tuple[Body, ...]
    entry: frozenset[str]


@dataclass(frozen=True, eq=False)
class FirstTurn:
    """The first turn of a loop, as nodes of the graph around it.

    Attributes:
        body: that of the loop, laid out.
        nodes: what makes the turn's inputs, and those of the body.
        inputs: of the turn, as the graph calls them.
        given: tensors of the body that are handed on as they came, and what stands for them.
        own: names that only the first turn has.
    """

    body: Body
    nodes: tuple[onnx.NodeProto, ...]
    inputs: tuple[str, ...]
    given: dict[str, str]
    own: frozenset[str]


def open_loops(model: onnx.ModelProto) -> Iterator[OpenLoop]:
    """Lay open the first turn of every loop of the main graph that can be, in place, and of those in first turns."""
    found = True
    while found:
        found, defined = False, all_names(model)
        for place in reversed(range(len(model.graph.node))):
            node = model.graph.node[place]
            waits = is_loop(node) and noted(node, "turn") is None and layers_within(node)
            if waits and not why_closed(model, place, defined):
                found = True
                yield _open(model, place, defined)


def is_loop(node: onnx.NodeProto) -> bool:
    """Whether a node has a body that it turns."""
    return node.op_type in ("Loop", "Scan") and node.domain in ("", "ai.onnx")


def why_closed(model: onnx.ModelProto, place: int, defined: Counter[str] | None = None) -> str:
    """What keeps a loop of the main graph from being laid open, so that its layers stay; nothing where it can be.

    A report that names stored tensors has to tell what was cut. A weight that is handed from turn to turn as a state is
    not one that the body reads by its name.
    """
    node = model.graph.node[place]
    (body,) = bodies(node)
    versions = {entry.domain: entry.version for entry in model.opset_import}
    if versions.get("", versions.get("ai.onnx", 0)) < 9:
        return "before opset 9 a Scan had a batch; convert it to opset 9"
    listed = next((inner.op_type for inner in nodes_within(body) if inner.op_type == "SequenceMap"), "")
    if listed:
        return f"{listed} stands within it; export without lists of tensors"
    stored = stored_names(model.graph) - {t.name for t in model.graph.initializer if not t.dims}
    same = {inner.output[0]: inner.input[0] for inner in body.node if inner.op_type == "Identity"}
    for k, (given, value) in enumerate(zip(node.input, body.input, strict=False)):
        if given not in stored or (state := _state(node, k)) is None:
            continue
        handed_on = body.output[state].name
        while handed_on in same:
            handed_on = same[handed_on]
        if handed_on == value.name:
            return (
                f"weight {given!r} comes in as a state that no turn changes; export with the body reading it from"
                " outside, or with the loop unrolled"
            )
    if not all(node.output):
        return "it has an output without a name; name it"
    return obstacle(body, all_names(model) if defined is None else defined)


def first_turn(model: onnx.ModelProto, node: onnx.NodeProto, defined: Counter[str], labelled: set[str]) -> FirstTurn:
    """Lay out the body of a loop as its first turn: stored tensors go to the model, nodes are left to the caller.

    Args:
        model: gets stored tensors and value infos.
        node: the loop, or a copy of it; its body is taken apart.
        defined: how many graphs give a tensor some name, as of `all_names`.
        labelled: names of nodes that are taken.
    """
    attribute = next(a for a in node.attribute if a.HasField("g"))
    body = lay_out(model, attribute, defined, labelled)
    turn, entry, given = attribute.g, _Entry(node), {}
    ins = [value.name for value in body.graph.input]
    for k, name in enumerate(ins):
        state = _state(node, k)
        if state is not None and body.results[state] == name:  # handed on from turn to turn, as it came
            given[name] = node.input[k]
        else:
            entry.give(k, name, turn.input[k].type)
    rename(turn, given)
    model.graph.initializer.extend(entry.stored)
    inputs = tuple(given.get(name, name) for name in ins)
    return FirstTurn(body, (*entry.nodes, *turn.node), inputs, given, frozenset(entry.names))


def _open(model: onnx.ModelProto, place: int, defined: Counter[str]) -> OpenLoop:
    loop = model.graph.node[place]
    node = onnx.NodeProto()
    node.CopyFrom(loop)
    outer = frozenset(name for n in model.graph.node for name in n.output)
    found = first_turn(model, node, defined, {n.name for n in model.graph.node})
    attribute = next(a for a in node.attribute if a.HasField("g"))
    turns = scanned_axis(node) if node.op_type == "Scan" else (f"{node.output[0]}/turns", 0)
    around = noted(loop, "often") or []  # turns of the loops that it stands in
    for each in attribute.g.node:
        note(each, "often", [*around, turns])
    _run_again(loop, found.body, {t.name for t in attribute.g.initializer})
    if node.op_type == "Loop":
        count_turns(loop, turns[0])
    note(loop, "turn", [found.inputs, [value.name for value in attribute.g.output]])
    for k, each in enumerate(found.nodes):
        model.graph.node.insert(place + k, each)
    declared = [value for value in model.graph.value_info if value.name not in found.given]
    del model.graph.value_info[:]
    model.graph.value_info.extend(declared)
    attribute.ClearField("g")
    aliases = {outside: found.body.names[name] for name, outside in reversed(found.given.items())}
    return OpenLoop(node, outer, (replace(found.body, aliases=aliases),), found.own)


def _state(node: onnx.NodeProto, k: int) -> int | None:
    """Which result of a turn is input ``k`` of the next one."""
    if node.op_type == "Loop":
        return k - 1 if k > 1 else None
    return k if k < len(node.input) - _scanned(node) else None


def _scanned(node: onnx.NodeProto) -> int:
    return next(int(a.i) for a in node.attribute if a.name == "num_scan_inputs")


def _scan_axes(node: onnx.NodeProto) -> list[int]:
    return next((list(a.ints) for a in node.attribute if a.name == "scan_input_axes"), [0] * _scanned(node))


def scanned_axis(node: onnx.NodeProto) -> tuple[str, int]:
    """A tensor and its axis that are as long as a Scan turns."""
    return node.input[-_scanned(node)], int(_scan_axes(node)[0])


class _Entry:
    """What stands in front of the first turn: nodes that are not taken for constants, whatever they hand on."""

    def __init__(self, node: onnx.NodeProto) -> None:
        self.node = node
        self.nodes: list[onnx.NodeProto] = []
        self.stored: list[onnx.TensorProto] = []
        self.names: set[str] = set()
        self.taken = self._store("taken", np.array(True))
        self.zero = self._store("zero", np.array(0))

    def give(self, k: int, name: str, kind: onnx.TypeProto) -> None:
        """Make what the body calls its input ``k``."""
        source = self.node.input[k] if k < len(self.node.input) else ""
        if self.node.op_type == "Loop" and k < 2:
            source = self.zero if k == 0 else source or self.taken
        elif self.node.op_type == "Scan" and _state(self.node, k) is None:
            axis = _scan_axes(self.node)[k - len(self.node.input)]
            slices = self._named(f"{name}/first")
            self.nodes.append(helper.make_node("Gather", [source, self.zero], [slices], axis=axis))
            source = slices
        branches = {}
        for branch in ("then_branch", "else_branch"):
            given = helper.make_empty_tensor_value_info(f"{name}/{branch}")
            given.type.tensor_type.elem_type = kind.tensor_type.elem_type
            branches[branch] = helper.make_graph(
                [helper.make_node("Identity", [source], [given.name])], branch, [], [given]
            )
        self.nodes.append(note(helper.make_node("If", [self.taken], [self._named(name)], **branches), "entry"))

    def _named(self, name: str) -> str:
        self.names.add(name)
        return name

    def _store(self, what: str, value: np.ndarray) -> str:
        name = self._named(f"{self.node.output[0]}/{what}")
        self.stored.append(numpy_helper.from_array(value, name))
        return name


def _run_again(loop: onnx.NodeProto, body: Body, stored: set[str]) -> None:
    """Give the body that the loop runs names that are not those of its first turn; stored tensors are the same ones."""
    (own,) = bodies(loop)
    del own.initializer[:], own.value_info[:]
    again = {name: f"{name}/again" for name in names_of(own)}
    again |= {name: open_ if open_ in stored else f"{open_}/again" for open_, name in body.names.items()}
    rename(own, again)


def count_turns(loop: onnx.NodeProto, name: str) -> None:
    """One more output of a Loop, as long as there are turns, in place."""
    (own,) = bodies(loop)
    own.node.append(helper.make_node("Identity", [own.input[0].name], [f"{name}/again"]))
    own.output.append(helper.make_tensor_value_info(f"{name}/again", onnx.TensorProto.INT64, []))
    loop.output.append(name)


def close_loop(model: onnx.ModelProto, opened: OpenLoop) -> None:
    """Make the nodes of the first turn the body of the loop, in place."""
    graph, before = model.graph, list(opened.node.output)
    place = next(k for k, node in enumerate(graph.node) if list(node.output[: len(before)]) == before)
    entry = {k for k, node in enumerate(graph.node) if set(node.output) <= opened.entry}
    owner = owners(graph, opened.outer, opened.bodies)
    closed = onnx.NodeProto()
    closed.CopyFrom(opened.node)
    del closed.input[:]
    closed.input.extend(graph.node[place].input)
    (body,) = opened.bodies
    members = [node for k, node in enumerate(graph.node) if k in owner and k not in entry]
    for node in members:
        drop_notes(node)
    next(a for a in closed.attribute if a.name == body.attribute).g.CopyFrom(put_together(graph, body, members))
    take_out(graph, opened.bodies, {*owner, *entry}, {place: closed})
    stored = [t for t in graph.initializer if t.name not in opened.entry]
    del graph.initializer[:]
    graph.initializer.extend(stored)
