"""Plan -> model: the only place that makes a changed graph, once, at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import numpy_helper

from onnxprune.analysis import Analysis, view
from onnxprune.bodies import rename
from onnxprune.errors import OnnxPruneError
from onnxprune.graph import Graph, Node
from onnxprune.normalise import drop_unused, used_names
from onnxprune.plan import Plan, removed_positions
from onnxprune.positions import AxisId
from onnxprune.precision import NARROW, cast
from onnxprune.probe import COUNTING, Shapes
from onnxprune.rules.base import Kept, row_for
from onnxprune.sizes import SizeGraph
from onnxprune.tensors import array_of, stored


class CannotRepair(OnnxPruneError):
    """A node states a size in a way that cannot be mended; its axes have to be frozen."""

    def __init__(self, message: str, node: Node, tensor: str, axes: tuple[int, ...]) -> None:
        super().__init__(message)
        self.node = node.label
        self.op = node.op
        self.tensor = tensor
        self.axes = axes


@dataclass(frozen=True, eq=False)
class _Cut:
    """What is left of every axis that loses something."""

    shapes: Shapes
    kept: Mapping[AxisId, np.ndarray]

    def of(self, name: str, which: int = 0) -> tuple[np.ndarray | None, ...]:
        """Kept positions per axis of a tensor, at one of the probes.

        Of an axis that is a product with a dynamic factor, only their number means something at another probe.
        """
        found: list[np.ndarray | None] = []
        for axis, size in enumerate(self.shapes.shape(name) or ()):
            left = self.kept.get((name, axis))
            there = self.shapes.probes[which].shapes[name][axis]
            if left is not None and there != size:
                left = np.arange(len(left) * there // size)
            found.append(left)
        return tuple(found)

    def take(self, name: str, array: np.ndarray) -> np.ndarray:
        """What is left of a tensor's values."""
        for axis, left in enumerate(self.of(name)):
            if left is not None:
                array = np.take(array, left, axis=axis)
        return array

    def new_shape(self, name: str, which: int) -> tuple[int, ...]:
        """The tensor's shape after the cut, at one of the probes."""
        old = self.shapes.probes[which].shapes[name]
        return tuple(size if left is None else len(left) for size, left in zip(old, self.of(name, which), strict=True))


def rewrite(
    analysis: Analysis,
    plan: Plan,
    arrays: Mapping[str, np.ndarray] | None = None,
    copies: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """The model with the plan's removed units taken out.

    Args:
        analysis: of the model that is rewritten; the model itself is left as it is.
        plan: which units stay.
        arrays: new values for stored tensors, in their original shapes (reconstructed weights).
        copies: constants that normalisation copied, and of what; copies that end alike are merged again.

    Raises:
        CannotRepair: a size is stated in a way that no rule can mend.
    """
    graph, shapes = analysis.graph, analysis.shapes
    kept = {
        axis: np.setdiff1d(np.arange((shapes.shape(axis[0]) or ())[axis[1]]), gone)
        for axis, gone in removed_positions(analysis, plan).items()
    }
    cut = _Cut(shapes, kept)
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    _slice_stored(model, graph, cut, arrays or {})
    if kept:
        used = used_names(model)
        _repair_nodes(model, analysis, cut)
        drop_unused(model, used)
        _update_declared(model, cut)
    _merge_copies(model, copies or {})
    return model


def _slice_stored(model: onnx.ModelProto, graph: Graph, cut: _Cut, arrays: Mapping[str, np.ndarray]) -> None:
    touched = {name for name, _ in cut.kept if graph.is_stored(name)} | set(arrays)
    protos = {t.name: t for t in model.graph.initializer if t.name in touched}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.output[0] in touched:
            for attribute in node.attribute:
                if attribute.name == "value":
                    protos[node.output[0]] = attribute.t
    for name, proto in protos.items():
        array = graph.array(name)
        if name in arrays:
            array = cast(arrays[name], array.dtype)
        proto.CopyFrom(stored(cut.take(name, array), proto))


def _repair_nodes(model: onnx.ModelProto, analysis: Analysis, cut: _Cut) -> None:
    graph, shapes = analysis.graph, analysis.shapes
    count = range(len(shapes.probes))
    sizes = SizeGraph(graph, shapes, lambda name, which: cut.new_shape(name, which))
    # operands whose size is stated anew: what each has to hold at every probe
    wanted: dict[tuple[int, int], list[np.ndarray]] = {}
    patcher = _Patcher(model, graph, shapes, sizes)
    for node in graph.nodes:
        proto = model.graph.node[node.index]
        row = row_for(node.domain, node.op, graph.opsets.get(node.domain, 1))
        if row is not None and row.repair is not None and _touched(node, cut):
            repairs = [row.repair(view(node, graph, shapes, which), _kept(node, cut, which)) for which in count]
            _set_attributes(proto, repairs[0].attributes)
            if repairs[0].factor != 1:
                patcher.scale(node, repairs[0].factor)
            for k in repairs[0].inputs:
                wanted[node.index, k] = [repair.inputs[k] for repair in repairs]
        for k, name in enumerate(node.inputs):  # a size that is used as a value keeps its number
            a_value = name in sizes.boundary and node.index not in sizes.inside
            # what loses channels itself (a tensor of zeros, an expanded token) is no number, and its node is repaired
            if a_value and (node.index, k) not in wanted and all(left is None for left in cut.of(name)):
                wanted[node.index, k] = [shapes.probes[which].values[name] for which in count]
    for index in sorted(analysis.sampled):
        left = cut.kept.get((graph.nodes[index].inputs[1], 1))
        if left is not None:
            patcher.sample(graph.nodes[index], left)
    for name in graph.outputs:  # a size that the caller reads keeps its number, too
        if name in sizes.known and all(left is None for left in cut.of(name)):
            patcher.give_out(name, [p.values[name] for p in shapes.probes])
    patcher.apply(wanted)


def _touched(node: Node, cut: _Cut) -> bool:
    return any(left is not None for name in (*node.inputs, *node.outputs) if name for left in cut.of(name))


def _kept(node: Node, cut: _Cut, which: int) -> Kept:
    inputs, outputs = (tuple(cut.of(n, which) if n else () for n in names) for names in (node.inputs, node.outputs))
    return Kept(inputs, outputs)


def _set_attributes(proto: onnx.NodeProto, attributes: Mapping[str, object]) -> None:
    for name, value in attributes.items():
        rest = [a for a in proto.attribute if a.name != name]
        del proto.attribute[:]
        proto.attribute.extend(rest)
        if value is not None:
            proto.attribute.append(onnx.helper.make_attribute(name, value))


class _Patcher:
    """Gives operands new values: in place, as a new constant, or element by element beside a computed one.

    What it inserts comes into the graph by `apply`.
    """

    def __init__(self, model: onnx.ModelProto, graph: Graph, shapes: Shapes, sizes: SizeGraph) -> None:
        self.model = model
        self.graph = graph
        self.shapes = shapes
        self.sizes = sizes
        self.counting = any(node.op in COUNTING for node in graph.nodes)
        self.taken = {name for node in graph.nodes for name in node.outputs} | set(graph.initializers)
        self.inserted: list[tuple[int, onnx.NodeProto]] = []
        self.given_out: dict[str, str] = {}

    def apply(self, wanted: dict[tuple[int, int], list[np.ndarray]]) -> None:
        read = ((*node.inputs, *(() if node.turn else node.captured)) for node in self.graph.nodes)
        uses = Counter(name for names in read for name in names)
        uses.update(self.graph.outputs)
        by_name: dict[str, list[tuple[int, int]]] = {}
        for index, operand in wanted:
            by_name.setdefault(self._operand(index, operand), []).append((index, operand))
        for name, places in by_name.items():
            values = [value for place in places for value in wanted[place]]
            alike = all(np.array_equal(values[0], other) for other in values)
            if name and alike and self.graph.is_stored(name) and uses[name] == len(places):
                self._overwrite(name, values[0])
                continue
            for index, operand in places:
                self._give(self.graph.nodes[index], operand, wanted[index, operand])
        self.inserted.sort(key=lambda pair: pair[0])
        for index, node in reversed(self.inserted):  # the last one first: nodes at one place keep their order
            self.model.graph.node.insert(index, node)
        for name, result in self.given_out.items():
            inside = self._fresh(f"{name}_counted")
            rename(self.model.graph, {name: inside})
            next(o for o in self.model.graph.output if o.name == inside).name = name
            nodes, used = self.model.graph.node, used_names(self.model)
            maker = next(k for k, node in enumerate(nodes) if inside in node.output)
            if used.isdisjoint(nodes[maker].output):
                del nodes[maker]
            self.model.graph.node.append(onnx.helper.make_node("Identity", [result], [name], name=f"{inside}_before"))

    def give_out(self, name: str, values: list[np.ndarray]) -> None:
        """Let an output of the graph hold these values at the probes, whatever else is made of it."""
        end = replace(self.graph.producer[name], index=len(self.graph.nodes))
        now = [self.sizes.after(name, which) for which in range(len(values))]
        if any(not np.array_equal(a, b) for a, b in zip(now, values, strict=True)):
            same = not self._may_vary(name) and all(np.array_equal(values[0], other) for other in values)
            kept = self._constant(f"{name}_kept", values[0]) if same else self._mix(end, name, now, values)
            self.given_out[name] = kept

    def scale(self, node: Node, factor: float) -> None:
        """Multiply a node's output; the product takes over its name.

        In float32 where the output's own type would round the factor more coarsely than the proof allows.
        """
        output = node.outputs[0]
        kind = self.shapes.probes[0].types[output]
        before = self._fresh(f"{output}_uncounted")
        self.model.graph.node[node.index].output[0] = before
        narrow = kind in NARROW
        dtype = onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.FLOAT if narrow else kind)
        number = self._constant(f"{output}_factor", np.array(factor, dtype))
        made = onnx.helper.make_node
        if narrow:
            wide, product = self._fresh(f"{before}_wide"), self._fresh(f"{output}_wide")
            nodes = [
                made("Cast", [before], [wide], name=wide, to=onnx.TensorProto.FLOAT),
                made("Mul", [wide, number], [product], name=product),
                made("Cast", [product], [output], name=f"{before}_factor", to=kind),
            ]
        else:
            nodes = [made("Mul", [before, number], [output], name=f"{before}_factor")]
        self.inserted += [(node.index + 1, each) for each in nodes]

    def sample(self, node: Node, channels: np.ndarray) -> None:
        """Let a convolution read some of the channels of its input."""
        data = node.inputs[0]
        output = self._fresh(f"{data}_sampled")
        which = self._constant(f"{node.label}_channels", channels.astype(np.int64))
        gather = onnx.helper.make_node("Gather", [data, which], [output], name=output, axis=1)
        self.inserted.append((node.index, gather))
        self.model.graph.node[node.index].input[0] = output

    def _operand(self, index: int, operand: int) -> str:
        inputs = self.graph.nodes[index].inputs
        return inputs[operand] if operand < len(inputs) else ""

    def _overwrite(self, name: str, value: np.ndarray) -> None:
        """A stored tensor that all its readers want alike keeps its name."""
        if np.array_equal(self.graph.array(name), value):
            return
        tensors = {t.name: t for t in self.model.graph.initializer}
        for node in self.model.graph.node:
            if node.op_type == "Constant" and node.output[0] == name:
                tensors |= {name: a.t for a in node.attribute if a.name == "value"}  # noqa: B035
        new = numpy_helper.from_array(value, tensors[name].name)
        new.doc_string = tensors[name].doc_string
        tensors[name].CopyFrom(new)

    def _give(self, node: Node, operand: int, values: list[np.ndarray]) -> None:
        proto = self.model.graph.node[node.index]
        name = self._operand(node.index, operand)
        same = not self._may_vary(name) and all(np.array_equal(values[0], other) for other in values)
        now = self._now(name)
        if now is not None and all(np.array_equal(a, b) for a, b in zip(now, values, strict=True)):
            return
        if same:
            new = self._constant(f"{name or node.label}_kept", values[0])
        elif now is None:
            raise self._refuse(node, name)
        else:
            new = self._mix(node, name, now, values)
        while len(proto.input) <= operand:
            proto.input.append("")
        proto.input[operand] = new

    def _may_vary(self, name: str) -> bool:
        """Whether a value may depend on data (a number of findings), however alike it was at the probes."""
        if not name or name in self.graph.computed_from_constants:
            return False
        return self.counting or name not in self.sizes.known

    def _now(self, name: str) -> list[np.ndarray] | None:
        """What the operand would hold after the cut if it were left alone, at every probe."""
        count = len(self.shapes.probes)
        if not name:
            return None
        if self.graph.is_stored(name):
            return [self.graph.array(name)] * count
        if name in self.sizes.known:
            return [self.sizes.after(name, which) for which in range(count)]
        found = [p.values[name] for p in self.shapes.probes if name in p.values]
        return found if len(found) == count else None

    def _mix(self, node: Node, name: str, now: list[np.ndarray], values: list[np.ndarray]) -> str:
        """Computed elements that are still right stay; static ones become numbers, and multiples are scaled."""
        if now[0].shape != values[0].shape:
            raise self._refuse(node, name)
        static = np.all([v == values[0] for v in values], axis=0)
        right = np.all([a == b for a, b in zip(now, values, strict=True)], axis=0)
        # heads times a batch: as much smaller at every probe; a quotient would be rounded, and is not scaled
        alike = [(a > 0) & (b > 0) & (b * now[0] == values[0] * a) for a, b in zip(now, values, strict=True)]
        scaled = np.all(alike, axis=0) & ~static & ~right & self.sizes.is_product(name)
        if not (static | right | scaled).all():
            raise self._refuse(node, name)
        result = name
        if scaled.any():
            common = np.gcd(now[0], values[0])
            for op, factor in (("Mul", values[0]), ("Div", now[0])):
                number = self._constant(f"{name}_{op.lower()}", np.where(scaled, factor // np.maximum(common, 1), 1))
                result = self._insert(node, op, [result, number], f"{name}_scaled")
        if (static & ~right).any():
            mask = self._constant(f"{name}_static", static & ~right)
            numbers = self._constant(f"{name}_kept", np.where(static, values[0], 0).astype(values[0].dtype))
            result = self._insert(node, "Where", [mask, numbers, result], f"{name}_mended")
        return result

    def _insert(self, node: Node, op: str, inputs: list[str], base: str) -> str:
        """A new node before this one."""
        output = self._fresh(base)
        self.inserted.append((node.index, onnx.helper.make_node(op, inputs, [output], name=output)))
        return output

    def _refuse(self, node: Node, name: str) -> CannotRepair:
        tensor, axes = next(
            ((tensor, axes) for tensor in (*node.outputs, *node.inputs) if tensor and (axes := self._cut_axes(tensor))),
            (node.outputs[0], tuple(range(len(self.shapes.shape(node.outputs[0]) or ())))),
        )
        said = f"{node.op} {node.label!r} takes sizes from {name!r}, which cannot be traced"
        return CannotRepair(said, node, tensor, axes)

    def _cut_axes(self, tensor: str) -> tuple[int, ...]:
        """The axes of a tensor that lose something."""
        old = self.shapes.shape(tensor)
        if old is None:
            return ()
        new = self.sizes.new_shape(tensor, 0)
        return tuple(axis for axis, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)

    def _constant(self, base: str, value: np.ndarray) -> str:
        name = self._fresh(base)
        self.model.graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def _fresh(self, base: str) -> str:
        name, count = base, 1
        while name in self.taken:
            name, count = f"{base}_{count}", count + 1
        self.taken.add(name)
        return name


def _update_declared(model: onnx.ModelProto, cut: _Cut) -> None:
    """Declared shapes follow: of inner tensors, and of weights that are also listed as inputs."""
    for value in (*model.graph.value_info, *model.graph.input):
        if not value.type.HasField("tensor_type") or not cut.shapes.known(value.name):
            continue
        dims = value.type.tensor_type.shape.dim
        for axis, left in enumerate(cut.of(value.name)):
            if left is not None and axis < len(dims):
                if cut.shapes.is_static(value.name, axis):
                    dims[axis].dim_value = len(left)
                else:  # a symbol that other tensors have too stands for the old size
                    dims[axis].Clear()


def _merge_copies(model: onnx.ModelProto, copies: Mapping[str, str]) -> None:
    """Constants that were copied for their users and came out the same are one again."""
    tensors = {t.name: t for t in model.graph.initializer}
    back = {
        copy: origin
        for copy, origin in copies.items()
        if copy in tensors
        and origin in tensors
        and tensors[copy].dims == tensors[origin].dims
        and np.array_equal(array_of(tensors[copy]), array_of(tensors[origin]))
    }
    for node in model.graph.node:
        for k, name in enumerate(node.input):
            if name in back:
                node.input[k] = back[name]
    rest = [t for t in model.graph.initializer if t.name not in back]
    del model.graph.initializer[:]
    model.graph.initializer.extend(rest)
