"""What the bodies of Loop and Scan cost: the work of the first turn, times the number of turns.

The first turn is laid out as a model of its own, with the body's nodes where the loop stood, and run: that tells the
sizes. How often a Loop turns is told by the loop itself, which counts its turns in one more output. A body whose sizes
change from turn to turn is counted at those of the first.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxprune.bodies import rename
from onnxprune.flat import flatten
from onnxprune.graph import Graph, Node
from onnxprune.macs import layers_within, mac_terms
from onnxprune.probe import Feeds, Shapes, run_probe
from onnxprune.runtime import Runtime, expose
from onnxprune.tensors import bodies


def turning(graph: Graph) -> list[Node]:
    """The loops that have layers in their bodies."""
    return [
        node
        for node in graph.nodes
        if node.op in ("Loop", "Scan")
        and not (node.domain or node.turn)
        and layers_within(graph.model.graph.node[node.index])
    ]


def macs_of_turns(graph: Graph, shapes: Shapes, runtime: Runtime) -> dict[int, float]:
    """Multiply-accumulates of the bodies at the first probe, per node that has one, where they can be told."""
    found, feeds = {}, shapes.probes[0].feeds
    for node in turning(graph):
        try:
            turns = _turns(graph, node, feeds, shapes, runtime)
            found[node.index] = turns * _one_turn(graph, node, feeds, runtime) if turns else 0.0
        except Exception:  # a turn that does not run by itself; onnxruntime's errors share no base class
            continue
    return found


def _turns(graph: Graph, node: Node, feeds: Feeds, shapes: Shapes, runtime: Runtime) -> int:
    """How often the body runs."""
    if node.op == "Scan":
        count = int(node.attributes["num_scan_inputs"])
        axes = node.attributes.get("scan_input_axes", [0] * count)
        return shapes.size(node.inputs[-count], axes[0])
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    proto = model.graph.node[node.index]
    (body,) = bodies(proto)
    body.node.append(helper.make_node("Identity", [body.input[0].name], [f"{node.outputs[0]}/turn"]))
    body.output.append(helper.make_tensor_value_info(f"{node.outputs[0]}/turn", onnx.TensorProto.INT64, []))
    proto.output.append(f"{node.outputs[0]}/turns")
    session = runtime.session(expose(model, [proto.output[-1]]), optimise=False)
    return len(session.run(None, dict(feeds))[0])


def _one_turn(graph: Graph, node: Node, feeds: Feeds, runtime: Runtime) -> float:
    """Multiply-accumulates of the body's nodes in the first turn, and of the bodies in it."""
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    (body,) = bodies(model.graph.node[node.index])
    before = {name for other in graph.nodes for name in other.outputs}
    rename(body, {name: f"{node.outputs[0]}/{name}" for name in _own(body)})
    entry = [each for k, value in enumerate(body.input) for each in _entry(graph, node, k, value.name)]
    inner = [*entry, *body.node]
    stored = [*model.graph.initializer, *body.initializer]
    kept = list(model.graph.node[: node.index])
    del model.graph.node[:], model.graph.initializer[:], model.graph.value_info[:], model.graph.output[:]
    model.graph.node.extend([*kept, *inner])
    model.graph.initializer.extend(stored)
    turn = Graph(flatten(model, {}).model, graph.folder)
    shapes = Shapes((run_probe(turn, feeds, runtime),))
    own = [other for other in turn.nodes if not before & set(other.outputs)]
    return sum(term.at(shapes) for other in own for term in mac_terms(other, shapes)) + sum(
        macs
        for index, macs in macs_of_turns(turn, shapes, runtime).items()
        if not before & set(turn.nodes[index].outputs)
    )


def _own(body: onnx.GraphProto) -> set[str]:
    names = {value.name for value in body.input} | {t.name for t in body.initializer}
    return names | {name for node in body.node for name in node.output if name}


def _entry(graph: Graph, node: Node, k: int, name: str) -> list[onnx.NodeProto]:
    """Nodes that make what the first turn gets as input ``k`` of the body."""
    given = node.inputs[k] if k < len(node.inputs) else ""
    if node.op == "Scan":
        count = int(node.attributes["num_scan_inputs"])
        which = k - (len(node.inputs) - count)
        if which < 0:
            return [helper.make_node("Identity", [given], [name])]
        axis = node.attributes.get("scan_input_axes", [0] * count)[which]
        return [_constant(f"{name}/first", 0), helper.make_node("Gather", [given, f"{name}/first"], [name], axis=axis)]
    if k and given:
        return [helper.make_node("Identity", [given], [name])]
    return [_constant(name, True if k else 0)]


def _constant(name: str, value: int | bool) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(value)))
