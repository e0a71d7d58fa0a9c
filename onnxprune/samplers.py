"""Channel samplers: a convolution that reads only some channels of a stream that keeps its width.

The width of a residual stream is shared by all its blocks, so that a channel can go only where no block needs it. A
sampler (a Gather in front of a block's first convolution) lets every block choose its own channels instead and leaves
the stream as it is (He et al. 2017, section 3.3: feature map sampling).
"""

from __future__ import annotations

from onnxprune.analysis import Analysis


def samplable(analysis: Analysis) -> frozenset[int]:
    """Indices of the convolutions that read a stream which several layers add to."""
    streams = {(axis.tensor, axis.axis) for g in analysis.groups if len(g.producers) > 1 for axis in g.group.axes}
    return frozenset(
        layer.node.index
        for layer in analysis.layers
        if layer.node.op == "Conv" and layer.group == 1 and (layer.weight, layer.weight_axis) in streams
    )
