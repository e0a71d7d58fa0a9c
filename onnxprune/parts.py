"""A network in parts that can be timed alone: each layer with what a runtime fuses into it, and what stands between.

A part is cut out of the graph as a model of its own, narrowed by the same rewriting as the whole. Its weights are the
network's; which of them stay does not matter to the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import onnx
from onnx import numpy_helper

from onnxprune.analysis import Analysis
from onnxprune.chains import Timed, chained
from onnxprune.costs import AxisSizes
from onnxprune.graph import FLOATS, Graph, Node
from onnxprune.macs import holds_macs
from onnxprune.plan import Plan
from onnxprune.probe import Shapes
from onnxprune.rewrite import rewrite

# what runtimes do on the way out of a layer, without another pass over memory
_FUSED = frozenset(
    """
    BatchNormalization Relu LeakyRelu Clip Sigmoid Tanh HardSigmoid HardSwish Elu Selu Softplus PRelu Gelu Erf
    Add Sum Sub Mul Div
    """.split()  # noqa: SIM905
)
# what leaves images in the layout that a convolution made them in
_KEEPS_LAYOUT = _FUSED | {"MaxPool", "AveragePool", "Concat", "Resize", "Upsample", "Identity", "Dropout"}


@dataclass(frozen=True, eq=False)
class Part:
    """Nodes that are timed together.

    Attributes:
        nodes: indices in the graph, in its order.
        inputs: activations that come from outside.
        outputs: activations that are read outside.
        sides: sets of groups that make it narrower: two for a layer with its own input and output, else one.
        base: per side, channels that always stay.
        slope: (sides, groups) channels per unit.
        blocked: of the inputs, those that may come in a layout of the runtime's own.
    """

    analysis: Analysis
    deployed: Shapes
    nodes: tuple[int, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sides: tuple[tuple[int, ...], ...]
    base: np.ndarray
    slope: np.ndarray
    blocked: frozenset[str]

    @cached_property
    def name(self) -> str:
        """The label of its first node."""
        return self.analysis.graph.nodes[self.nodes[0]].label

    @cached_property
    def is_layer(self) -> bool:
        """Whether it holds multiply-accumulates."""
        return any(holds_macs(self.analysis.graph.nodes[i]) for i in self.nodes)

    @cached_property
    def full(self) -> tuple[int, ...]:
        """Channels on every side where everything is kept."""
        units = np.array([g.units for g in self.analysis.groups])
        return tuple(int(n) for n in self.base + self.slope @ units)

    def widths(self, kept: np.ndarray) -> np.ndarray:
        """Channels on every side for kept counts of all groups, (sides,)."""
        result: np.ndarray = self.base + self.slope @ np.asarray(kept, dtype=np.float64)
        return result

    def counts(self, side: int, width: int) -> dict[int, int]:
        """Kept counts of one side's groups that come closest to a number of channels, not below it where it can be."""
        groups = self.sides[side]
        units = np.array([self.analysis.groups[g].units for g in groups])
        slope = self.slope[side, list(groups)]
        share = (width - self.base[side]) / max(float(slope @ units), 1e-9)
        kept = np.clip(np.floor(units * share), 1, units).astype(np.int64)
        for k in np.argsort(-slope, kind="stable"):  # what is still missing, in the largest units first
            missing = width - self.base[side] - float(slope @ kept)
            kept[k] += int(np.clip(np.ceil(missing / slope[k]), 0, units[k] - kept[k]))
        return dict(zip(groups, kept.tolist(), strict=True))

    @cached_property
    def _alone(self) -> Analysis:
        """The analysis of the whole, with only the part's nodes and tensors in its graph and its groups."""
        graph = self.analysis.graph
        model = onnx.ModelProto(ir_version=max(graph.model.ir_version, 4))
        model.opset_import.extend(graph.model.opset_import)
        model.graph.name = "part"
        nodes = [graph.nodes[i] for i in self.nodes]
        model.graph.node.extend(graph.model.graph.node[i] for i in self.nodes)
        read = dict.fromkeys(n for node in nodes for n in node.inputs if n)
        for name in read:
            if graph.is_stored(name):
                model.graph.initializer.append(numpy_helper.from_array(graph.array(name), name))
        types = self.deployed.probes[0].types
        for name in self.inputs:
            shape = self.deployed.shape(name)
            model.graph.input.append(onnx.helper.make_tensor_value_info(name, types[name], shape))
        model.graph.output.extend(onnx.helper.make_tensor_value_info(n, types[n], None) for n in self.outputs)
        held = {*read, *(name for node in nodes for name in node.outputs)}
        axes = [(info, tuple(a for a in info.group.axes if a.tensor in held)) for info in self.analysis.groups]
        groups = tuple(replace(info, group=replace(info.group, axes=here)) for info, here in axes if here)
        return replace(self.analysis, graph=Graph(model, graph.folder), groups=groups)

    def model(self, kept: Mapping[int, int]) -> onnx.ModelProto:
        """The part as a model, with these numbers of units of some groups; groups that are not named keep everything.

        Raises:
            CannotRepair: the part alone does not say how a size is made.
        """
        names = {self.analysis.groups[g].name: tuple(range(k)) for g, k in kept.items()}
        return rewrite(self._alone, Plan("", names))

    def timed(self, kept: Mapping[int, int]) -> list[Timed]:
        """The models whose times, with their factors, sum up to the part's own.

        Raises:
            CannotRepair: as of `model`.
        """
        model = self.model(kept)
        types = self.deployed.probes[0].types
        images = [n for n in (*self.inputs, *self.outputs) if len(self.deployed.shape(n) or ()) == 4]
        if len(self.outputs) > 1 or self.outputs[0] not in images or any(types[n] not in FLOATS for n in images):
            return [Timed(1.0, model)]
        read = [n for n in self.inputs if n in images]
        made = [n for n in read if n in self.blocked]
        given = [n for n in read if n not in self.blocked and n != self._summand]
        return chained(model, made, self._summand, given)

    @cached_property
    def _summand(self) -> str:
        """The input that the part adds to its result, as a residual sum does; empty where there is none."""
        graph = self._alone.graph
        shape = self.deployed.shape(self.outputs[0])
        for node in graph.nodes[1:]:
            if node.op == "Add" and holds_macs(graph.nodes[0]):
                for name in node.inputs:
                    if name in self.inputs and self.deployed.shape(name) == shape and len(graph.consumers[name]) == 1:
                        return name
        return ""


def parts_of(analysis: Analysis, deployed: Shapes) -> list[Part]:
    """The parts of a network that get narrower with some group, in the graph's order.

    Args:
        analysis: of the network.
        deployed: shapes of every tensor at the sizes that the network is used with.
    """
    graph = analysis.graph
    sizes = AxisSizes(analysis)
    rows: dict[str, list[int]] = {}
    for (tensor, _), row in sizes.index.items():
        rows.setdefault(tensor, []).append(row)
    constant = graph.computed_from_constants
    owner: dict[int, int] = {}  # node -> first node of its part
    members: dict[int, list[int]] = {}
    for node in graph.nodes:
        touched = any(name in rows for name in (*node.inputs, *node.outputs))
        if not touched or set(node.outputs) <= constant or node.captured or node.often or node.op in ("Shape", "Size"):
            continue
        if not all(deployed.known(n) for n in (*node.inputs, *node.outputs) if n):
            continue
        head = _fused_into(node, graph, owner)
        owner[node.index] = node.index if head is None else head
        members.setdefault(owner[node.index], []).append(node.index)
    found, blocked = [], _blocked(graph)
    for indices in members.values():
        part = _part(analysis, deployed, indices, sizes, rows, blocked)
        if part is not None:
            found.append(part)
    return found


def _blocked(graph: Graph) -> frozenset[str]:
    """Tensors that a convolution made, with nothing in between that asks for the layout of the file.

    Runtimes convolve in blocks of channels, and change the layout only where another operator makes them.
    """
    constant, found = graph.computed_from_constants, set[str]()
    for node in graph.nodes:
        read = [n for n in node.inputs if n and n not in constant and not graph.is_stored(n)]
        if node.op == "Conv" or (node.op in _KEEPS_LAYOUT and not node.domain and found.issuperset(read)):
            found.update(node.outputs)
    return frozenset(found)


def _fused_into(node: Node, graph: Graph, owner: Mapping[int, int]) -> int | None:
    """The first node of the part that this node ends, if a runtime may fuse it there."""
    if node.op not in _FUSED or node.domain:
        return None
    heads = []
    for name in node.inputs:
        maker = graph.producer.get(name)
        alone = len(graph.consumers.get(name, ())) == 1 and name not in graph.outputs
        if maker is not None and maker.index in owner and alone:
            head = owner[maker.index]
            if holds_macs(graph.nodes[head]):
                heads.append(head)
    return max(heads, default=None)


def _part(
    analysis: Analysis,
    deployed: Shapes,
    indices: list[int],
    sizes: AxisSizes,
    rows: Mapping[str, list[int]],
    blocked: frozenset[str],
) -> Part | None:
    graph, inside = analysis.graph, set(indices)
    nodes = [graph.nodes[i] for i in indices]
    made = {name for node in nodes for name in node.outputs if name}
    read = dict.fromkeys(n for node in nodes for n in node.inputs if n)
    stored = {name for name in read if graph.is_stored(name)}
    inputs = tuple(n for n in read if n not in made and n not in stored)
    outputs = tuple(
        name
        for node in nodes
        for name in node.outputs
        if name and (name in graph.outputs or any(r.index not in inside for r in graph.consumers.get(name, ())))
    )
    used = sorted({row for name in (*read, *made) for row in rows.get(name, ())})
    sides = _sides(sizes.slope[used])
    if not sides or not outputs or not inputs:
        return None
    base, slope = [], []
    for groups in sides:  # counted where most of the side's channels meet
        totals = sizes.slope[used][:, groups].sum(axis=1) * (1 + (sizes.slope[used][:, groups] != 0).sum(axis=1))
        row = used[int(np.argmax(totals))]
        base.append(sizes.base[row])
        slope.append(sizes.slope[row])
    # a side whose groups do not all meet in one axis is counted by all of them
    matrix = np.array(slope)
    for k, groups in enumerate(sides):
        missing = [g for g in groups if matrix[k, g] == 0]
        matrix[k, missing] = [max(float(sizes.slope[used][:, g].max()), 1.0) for g in missing]
    return Part(
        analysis, deployed, tuple(indices), inputs, outputs, sides, np.array(base), matrix, blocked & set(inputs)
    )


def _sides(slope: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """Sets of groups that meet in no axis; all in one where there are more than two."""
    sets: list[set[int]] = []
    for row in slope:
        new = set(np.flatnonzero(row).tolist())
        if new:
            apart = [s for s in sets if not s & new]
            sets = [*apart, new.union(*(s for s in sets if s & new))]
    if len(sets) > 2:
        sets = [set().union(*sets)]
    return tuple(tuple(sorted(s)) for s in sorted(sets, key=min))
