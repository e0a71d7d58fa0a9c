"""What the bodies of Loop and Scan cost: the work of the first turn, times the number of turns.

The first turn is laid out as a model of its own, with the body's nodes where the loop stood, and run: that tells the
sizes. How often a Loop turns is told by the loop itself, which counts its turns in one more output. A body whose sizes
change from turn to turn is counted at those of the first.
"""

from __future__ import annotations

import onnx

from onnxprune.bodies import all_names
from onnxprune.flat import Flat, flatten
from onnxprune.graph import Graph, Node
from onnxprune.loops import count_turns, first_turn, scanned_axis
from onnxprune.macs import layers_within, mac_terms
from onnxprune.probe import Feeds, Shapes, run_probe
from onnxprune.runtime import Runtime, expose


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
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    proto = model.graph.node[node.index]
    if node.op == "Scan":
        return shapes.size(*scanned_axis(proto))
    count_turns(proto, f"{node.outputs[0]}/turns")
    session = runtime.session(expose(model, [proto.output[-1]]), optimise=False)
    return len(session.run(None, dict(feeds))[0])


def _one_turn(graph: Graph, node: Node, feeds: Feeds, runtime: Runtime) -> float:
    """Multiply-accumulates of the body's nodes in the first turn, and of the bodies in it."""
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    before = {name for other in graph.nodes for name in other.outputs}
    turn = first_turn(model, model.graph.node[node.index], all_names(model), set())
    kept = list(model.graph.node[: node.index])
    del model.graph.node[:], model.graph.value_info[:], model.graph.output[:]
    model.graph.node.extend([*kept, *turn.nodes])
    laid = Graph(flatten(Flat(model, {}, model.ir_version)).model, graph.folder)
    shapes = Shapes((run_probe(laid, feeds, runtime),))
    own = [other for other in laid.nodes if not before & set(other.outputs)]
    return sum(term.at(shapes) for other in own for term in mac_terms(other, shapes)) + sum(
        macs
        for index, macs in macs_of_turns(laid, shapes, runtime).items()
        if not before & set(laid.nodes[index].outputs)
    )
