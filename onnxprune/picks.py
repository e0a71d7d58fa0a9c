"""Tensors whose rows are picked by what the network computes: boxes, the tokens of an expert, the best of a ranking.

The pruned network picks other rows than the original, or as many others as it happens to find. What a layer behind
reads in the one is then no counterpart of what it gave in the other, so that its weights cannot be fitted by both.
"""

from __future__ import annotations

from onnxprune.analysis import Analysis
from onnxprune.divergence import unsquashed
from onnxprune.graph import FLOATS

_JUDGING = frozenset({"ArgMax", "ArgMin", "Compress", "NonMaxSuppression", "NonZero", "TopK", "Unique"})
_PICKING = {  # operators that pick from their first input, and where what says which is among the others
    **dict.fromkeys(("Gather", "GatherElements", "GatherND"), (1,)),
    **dict.fromkeys(("Compress", "MaxRoiPool", "RoiAlign"), (1, 2)),
}
_PLACING = frozenset({"Scatter", "ScatterElements", "ScatterND"})  # what is placed is among all rows again


def picked(analysis: Analysis) -> frozenset[str]:
    """Names of the tensors whose rows depend on values that layers made; a table's entries are not among them."""
    return _picks(analysis, _behind_layers(analysis))[0]


def judged(analysis: Analysis) -> tuple[list[str], bool]:
    """The numbers by which rankings and searches pick the rows of outputs, and whether the rows are of those alone."""
    graph, made, types = analysis.graph, _behind_layers(analysis), analysis.shapes.probes[0].types
    picks, choices = _picks(analysis, made)
    waiting = sorted((picks | choices).intersection(graph.outputs))
    seen, found, rows = set(waiting), set[str](), set[str]()
    while waiting:
        node = graph.producer.get(waiting.pop())
        read = made.intersection((*node.inputs, *node.captured)) if node is not None else set[str]()
        if node is not None and node.op in _JUDGING and not node.domain:
            found.update(read)
        elif node is not None and node.op in _PICKING and not picks.isdisjoint(node.outputs):
            rows.update(node.inputs[:1])
        waiting += sorted(read - seen)
        seen |= read
    told = {unsquashed(graph, name) for name in found}
    return sorted(n for n in told if types.get(n) in FLOATS and analysis.shapes.known(n)), rows <= found


def _picks(analysis: Analysis, made: set[str]) -> tuple[frozenset[str], frozenset[str]]:
    """Tensors with picked rows, and what says which rows are picked."""
    graph = analysis.graph
    types = analysis.shapes.probes[0].types
    choices: set[str] = set()  # numbers of rows, and what is computed of them
    found: set[str] = set()
    for node in graph.nodes:
        plain = not node.domain
        if plain and node.op in _PICKING:
            which = [node.inputs[k] for k in _PICKING[node.op] if k < len(node.inputs)]
            judged = any(name in choices or (node.op != "Gather" and name in found) for name in which)
            judged |= node.op == "Compress" and which[0] in made
            if node.inputs[0] in made and judged:
                found.update(node.outputs)
                continue
        if plain and node.op in _JUDGING and not made.isdisjoint(node.inputs):
            choices.update(node.outputs[-1:] if node.op == "TopK" else node.outputs)
            found.update(node.outputs[:-1] if node.op == "TopK" else ())
        elif not choices.isdisjoint(node.inputs) and all(types.get(n) not in FLOATS for n in node.outputs if n):
            choices.update(node.outputs)
        carried = node.inputs[:1] if plain and node.op in _PLACING else node.inputs
        if not found.isdisjoint(carried):
            found.update(node.outputs)
    return frozenset(found - {""}), frozenset(choices - {""})


def _behind_layers(analysis: Analysis) -> set[str]:
    """Tensors that depend on the values that some layer gives; how many there are is known before."""
    graph = analysis.graph
    layers = {layer.node.index for layer in analysis.layers}
    made: set[str] = set()
    for node in graph.nodes:
        if node.op in ("Shape", "Size") and not node.domain:
            continue
        if node.index in layers or not made.isdisjoint((*node.inputs, *node.captured)):
            made.update(node.outputs)
    return made - {""}
