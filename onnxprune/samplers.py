"""Channel samplers: a convolution that reads only some channels of a tensor that keeps its width.

The width of a residual stream is shared by all its blocks, so that a channel can go only where no block needs it. A
sampler (a Gather in front of a block's first convolution) lets every block choose its own channels instead and leaves
the stream as it is (He et al. 2017, section 3.3: feature map sampling). The same holds for a narrow layer whose output
several much more expensive layers read.
"""

from __future__ import annotations

from onnxprune.analysis import Analysis, GroupInfo

_SUMS = frozenset({"Add", "Mean", "Sub", "Sum"})
_COSTLY = 0.02  # of what all readers of a group cost; the layers of a gate cost less
_MANY = 2.0  # times the cost of the layers that make a group have the layers that read it, where they read alone


def samplable(analysis: Analysis) -> frozenset[int]:
    """Indices of the convolutions that read what several layers add to, or what is made cheaply for several readers."""
    costs: dict[str, float] = {}
    for term in analysis.terms:
        costs[term.node] = costs.get(term.node, 0.0) + term.at(analysis.nominal)
    summed = _summed(analysis)
    together: dict[tuple[str, int], list[bool]] = {}
    for info in analysis.groups:
        places = {(axis.tensor, axis.axis) for axis in info.group.axes}
        for place in places:
            together.setdefault(place, []).append(_shared(info, costs, not places.isdisjoint(summed)))
    return frozenset(
        layer.node.index
        for layer in analysis.layers
        if layer.node.op == "Conv"
        and layer.group == 1
        and all(together.get((layer.weight, layer.weight_axis), [False]))
    )


def _shared(info: GroupInfo, costs: dict[str, float], added_to: bool) -> bool:
    """Whether a group's readers had better choose for themselves.

    There have to be several that cost something. That layers make it together is not enough: a gate's channels are
    those of what it multiplies.
    """
    made, read = (sum(costs.get(label, 0.0) for label in labels) for labels in (info.producers, info.consumers))
    if sum(costs.get(label, 0.0) >= _COSTLY * read for label in info.consumers) < 2:
        return False
    return (added_to and len(info.producers) > 1) or read >= _MANY * made


def _summed(analysis: Analysis) -> frozenset[tuple[str, int]]:
    """Axes of sums of several tensors that are computed from the data."""
    constant, shapes = analysis.graph.computed_from_constants, analysis.shapes
    return frozenset(
        (node.outputs[0], axis)
        for node in analysis.graph.nodes
        if node.op in _SUMS and sum(name not in constant for name in node.inputs) > 1
        for axis in range(len(shapes.shape(node.outputs[0]) or ()))
    )
