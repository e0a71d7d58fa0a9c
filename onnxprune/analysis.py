"""From a model to its groups: what may be removed, what it costs, and what is frozen and why."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from onnxprune import rules
from onnxprune.axes import BoundRelation, Refusal
from onnxprune.errors import InputError
from onnxprune.graph import FLOATS, Graph, Node
from onnxprune.groups import Coupling, Group, couple
from onnxprune.layers import Layer, contracted_axes, layer_of, made_axes, silencing, weighted_axes
from onnxprune.loops import why_closed
from onnxprune.macs import MacTerm, all_terms, holds_macs
from onnxprune.positions import VARYING, AxisId, Kind, Seed, Statement
from onnxprune.probe import Shapes
from onnxprune.remedies import remedy
from onnxprune.rules.base import BODY, TURN, OpView

_SAMPLED = "sampled"  # the letter of an input's channels of which a convolution reads some
_NO_CHANNELS = (Kind.ONE, Kind.DYNAMIC)  # nothing is lost where these stay


@dataclass(frozen=True)
class Frozen:
    """Channels of a layer that stay, and the place that holds them."""

    reason: str
    node: str
    op: str
    tensor: str
    axis: int
    channels: int
    layers: tuple[str, ...]
    macs: float
    rule: str  # what the node's row says, in the notation of `onnxprune.axes`; empty where none was asked
    remedy: str  # what would free the channels


@dataclass(frozen=True, eq=False)
class GroupInfo:
    """A group with the names of the layers that make and read it."""

    group: Group
    name: str
    producers: tuple[str, ...]
    consumers: tuple[str, ...]

    @property
    def units(self) -> int:
        """Number of units."""
        return self.group.units


@dataclass(frozen=True, eq=False)
class Analysis:
    """All that is known of a model before any data is looked at."""

    graph: Graph
    shapes: Shapes
    statements: tuple[Statement, ...]
    groups: tuple[GroupInfo, ...]
    frozen: tuple[Frozen, ...]
    terms: tuple[MacTerm, ...]
    layers: tuple[Layer, ...]
    nominal: Shapes  # sizes at which costs are counted
    sampled: frozenset[int] = frozenset()  # indices of the convolutions that choose among the channels they read
    # indices of the nodes that may take a statistic of fewer channels, with the letters of their relations
    approximate: Mapping[int, frozenset[str]] = field(default_factory=dict)

    @cached_property
    def weights(self) -> frozenset[str]:
        """Tensors in which zeros silence a channel: what layers, normalisations and biases take from the file."""
        return silencing(self.graph, statistics=bool(self.approximate))

    @cached_property
    def macs(self) -> float:
        """Multiply-accumulates of the whole model at the nominal shapes."""
        return sum(term.at(self.nominal) for term in self.terms)

    @cached_property
    def prunable_macs(self) -> float:
        """Share of the multiply-accumulates in layers of which at least one channel axis may shrink."""
        free = {(axis.tensor, axis.axis) for g in self.groups for axis in g.group.axes}
        able = {term.index for term in self.terms if any(axis in free for axis in term.axes)}
        share = sum(term.at(self.nominal) for term in self.terms if term.index in able)
        return share / self.macs if self.macs else 0.0


def view(node: Node, graph: Graph, shapes: Shapes, which: int = 0) -> OpView:
    """What a row of the table may know of a node; ``which`` probe's sizes come first."""
    order = [shapes.probes[which], *(p for k, p in enumerate(shapes.probes) if k != which)]

    def sizes(name: str) -> list[list[int]] | None:
        if not name or not shapes.known(name):
            return None
        return [list(axis) for axis in zip(*(p.shapes[name] for p in order), strict=True)]

    def value(name: str) -> np.ndarray | None:
        if not name:
            return None
        if graph.is_stored(name):
            largest = 1 << 16 if graph.stored(name).data_type in FLOATS else 1 << 24  # indices matter, weights do not
            return graph.array(name) if int(np.prod(graph.stored(name).dims)) <= largest else None
        known = name in graph.computed_from_constants or name in shapes.static_sizes
        return order[0].values.get(name) if known else None

    def seen(name: str) -> np.ndarray | None:
        found = value(name)
        return found if found is not None else order[0].values.get(name)

    version, operands, attributes = graph.opsets.get(node.domain, 1), node.operands, dict(node.attributes)
    if node.turn is not None:
        attributes[TURN] = (len(node.inputs), len(node.turn[0]))
    return OpView(
        node.op,
        node.domain,
        version,
        attributes,
        tuple(sizes(n) for n in operands),
        tuple(sizes(n) for n in node.outputs),
        tuple(value(n) for n in operands),
        tuple(n in graph.computed_from_constants and n not in graph.unsilenced for n in operands),
        tuple(seen(n) for n in operands),
    )


def state(node: Node, graph: Graph, shapes: Shapes) -> Statement:
    """What a node says; a refusal where the table has no row, or its tensors were never seen."""
    relation: BoundRelation | Refusal
    operands = node.operands
    missing = [n for n in (*operands, *node.outputs) if n and not shapes.known(n)]
    refused = rules.refusal(node.domain, node.op, graph.opsets.get(node.domain, 1))
    if node.captured and not node.choice and node.turn is None:
        # a body that was not laid open beside the graph: what is read in it from outside is not followed
        relation = Refusal(f"{node.op} {BODY}")
    elif refused is not None:
        relation = refused
    elif missing:
        relation = Refusal(f"the shape of {missing[0]} is not known")
    else:
        relation = rules.describe(view(node, graph, shapes))
        if node.entry and not isinstance(relation, Refusal):
            relation = replace(relation, zero=())
    return Statement(node.label, node.op, relation, operands, node.outputs, not missing or refused is not None)


def all_statements(graph: Graph, shapes: Shapes) -> tuple[Statement, ...]:
    """What every node says; where what was seen does not tell how it broadcasts, up to the next layer, nothing."""
    found: list[Statement] = []
    unsure: dict[str, str] = {}  # tensors that may have other sizes than were seen, and the operator that says which
    for node in graph.nodes:
        statement = state(node, graph, shapes)
        reached = [name for name in statement.inputs if name in unsure]
        if reached and not (reached == [node.inputs[0]] and _is_sure(node, graph)):
            op = unsure[reached[0]]
            reason = f"{op} gives one of something here that it may give more of, which are broadcast in other ways"
            statement = replace(statement, relation=Refusal(f"{reason}; export with fixed sizes"))
            unsure.update(dict.fromkeys(node.outputs, op))
        for group in _alternatives(node):
            if any(_broadcast_otherwise([p.shapes[n] for n in group if n in p.shapes]) for p in shapes.probes):
                unsure[group[0]] = node.op
        if node.op in ("If", "Loop", "Scan") and not (node.domain or node.choice or node.turn):
            unsure.update((name, node.op) for name in node.outputs if _may_be_longer(name, shapes))
        found.append(statement)
    return tuple(found)


def _may_be_longer(name: str, shapes: Shapes) -> bool:
    """Whether a tensor that a closed body gives may have more numbers along some axis; numbers of things have not."""
    shape = shapes.shape(name)
    return shape is not None and shapes.probes[0].types.get(name) in FLOATS and (not shape or 1 in shape)


def _is_sure(node: Node, graph: Graph) -> bool:
    """Whether the node is a layer whose weight says how many channels it gives."""
    layer = layer_of(node, graph)
    return layer is not None and (node.op != "MatMul" or len(graph.stored(layer.weight).dims) == 2)


def _alternatives(node: Node) -> list[tuple[str, ...]]:
    """Per output of a node with bodies that are laid open, its name and those of what it may hand on there."""
    if node.choice:
        return [(node.outputs[0], *node.captured)]
    if node.turn is None:
        return []
    given, made = node.turn
    before, counted = (2, 1) if node.op == "Loop" else (0, 0)
    states = len(given) - before - int(node.attributes.get("num_scan_inputs", 0))
    return [(node.outputs[k], node.inputs[before + k], made[counted + k]) for k in range(states)]


def _broadcast_otherwise(shapes: list[tuple[int, ...]]) -> bool:
    """Whether an axis, counted from the right, is absent or one in some and longer in others."""
    rank = max(map(len, shapes), default=0)
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    return any(min(sizes) == 1 < max(sizes) for sizes in zip(*padded, strict=True))


def partly_static(statements: Iterable[Statement]) -> set[AxisId]:
    """Axes that are products of static and dynamic factors, and that no operator takes for single positions.

    Some operator says so of the axis, or of one that others carry it to unchanged.
    """
    parent: dict[AxisId, AxisId] = {}

    def root(place: AxisId) -> AxisId:
        while (above := parent.setdefault(place, place)) != place:
            parent[place] = parent[above]
            place = above
        return place

    products: set[AxisId] = set()
    positions: set[AxisId] = set()
    for statement in statements:
        relation = statement.relation
        if isinstance(relation, Refusal):
            continue
        same: dict[str, AxisId] = {}
        for names, side in ((statement.inputs, relation.inputs), (statement.outputs, relation.outputs)):
            for name, operand in zip(names, side, strict=False):
                for axis, bound in enumerate(operand):
                    if bound.mapped:
                        positions.add((name, axis))
                    elif len(bound.letters) == 1:
                        first = same.setdefault(bound.letters[0], (name, axis))
                        parent[root((name, axis))] = root(first)
                    elif set(bound.letters) & relation.varying and set(bound.letters) - relation.varying:
                        products.add((name, axis))
    classes = {root(place) for place in products} - {root(place) for place in positions}
    return {place for place in [*parent] if root(place) in classes}


def outside_seeds(
    graph: Graph, shapes: Shapes, known: dict[str, tuple[int, ...]], statements: Iterable[Statement] = ()
) -> list[Seed]:
    """Axes that the graph itself freezes: inputs, outputs, dynamic sizes without a static factor."""
    seeds = []
    partly = partly_static(statements)
    inputs = {spec.name for spec in graph.inputs}
    for name, shape in known.items():
        if name in inputs:
            readers = graph.consumers.get(name, ())
            readers = tuple(reader for reader in readers if reader.op != "Shape") or readers
            where = (readers[0].label, readers[0].op) if readers else ("", "")
            seeds += [Seed(Kind.INPUT, "an input of the graph", *where, name, axis) for axis in range(len(shape))]
        elif name in graph.outputs:
            maker = graph.producer.get(name)
            where = (maker.label, maker.op) if maker else ("", "")
            seeds += [Seed(Kind.OUTPUT, "an output of the graph", *where, name, axis) for axis in range(len(shape))]
        else:
            for axis, size in enumerate(shape):
                if size == 1:
                    seeds.append(Seed(Kind.ONE, "an axis of size one", "", "", name, axis))
                elif not shapes.is_static(name, axis) and (name, axis) not in partly:
                    seeds.append(Seed(Kind.DYNAMIC, VARYING, "", "", name, axis))
    return seeds


def chosen_nodes(graph: Graph, only: str | None, exclude: str | None) -> set[str] | None:
    """Labels of the layers that --only and --exclude leave to be pruned; None for all of them.

    Raises:
        InputError: an expression does not compile, or matches no layer.
    """
    if only is None and exclude is None:
        return None
    labels = [node.label for node in graph.nodes if holds_macs(node)]
    chosen = set(labels)
    for option, text in (("--only", only), ("--exclude", exclude)):
        if text is None:
            continue
        try:
            pattern = re.compile(text)
        except (re.error, TypeError) as error:
            raise InputError(f"{option} {text!r} is not a regular expression: {error}") from error
        matched = {label for label in labels if pattern.search(label)}
        if not matched:
            raise InputError(
                f"{option} {text!r} matches no layer of the model; its layers are {', '.join(labels[:5])}, …"
                " (see onnxprune inspect)"
            )
        chosen = chosen & matched if option == "--only" else chosen - matched
    return chosen


def analyse(
    graph: Graph,
    shapes: Shapes,
    nominal: Shapes | None = None,
    only: str | None = None,
    exclude: str | None = None,
    extra_seeds: tuple[Seed, ...] = (),
    sampled: frozenset[int] = frozenset(),
    approximate: bool = False,
    copies: Mapping[str, str] | None = None,
) -> Analysis:
    """Find the groups of a (normalised) model.

    Args:
        graph: the model.
        shapes: of every tensor, at one or two sizes.
        nominal: shapes at which multiply-accumulates are counted (default: those of the first probe).
        only: regular expression; only layers whose node name it finds are made narrower.
        exclude: regular expression; these layers keep their output channels.
        extra_seeds: axes to freeze besides.
        sampled: indices of convolutions with a channel sampler in front: what they read keeps its width.
        approximate: let normalised axes shrink, whose statistics are then taken of the channels that are left.
        copies: constants that normalisation copied for their users, and of what.
    """
    nominal = nominal or shapes
    known = {
        name: shape
        for name in shapes.probes[0].shapes
        if shapes.known(name) and (shape := shapes.shape(name)) is not None
    }
    statements = all_statements(graph, shapes)
    seeds = [*extra_seeds, *outside_seeds(graph, shapes, known, statements)]
    chosen = chosen_nodes(graph, only, exclude)
    sampled = frozenset(k for k in sampled if chosen is None or graph.nodes[k].label in chosen)
    if sampled:
        statements = tuple(_sampling(s) if k in sampled else s for k, s in enumerate(statements))
        for k in sorted(sampled):
            reason = "readers choose among its channels, by samplers"
            seeds.append(
                Seed(Kind.SAMPLED, reason, graph.nodes[k].label, graph.nodes[k].op, graph.nodes[k].inputs[0], 1)
            )
    if chosen is not None:
        for node, statement in zip(graph.nodes, statements, strict=True):
            if holds_macs(node) and node.label not in chosen:
                for place in weighted_axes(node, statement.relation, graph.computed_from_constants):
                    seeds.append(Seed(Kind.CHOSEN, "not chosen by --only/--exclude", node.label, node.op, *place))
    terms = all_terms(graph.nodes, nominal)
    weights: dict[AxisId, float] = {}
    for term in terms:
        macs = term.at(nominal)
        for place in term.axes:
            if place[0] in known:
                weights[place] = weights.get(place, 0.0) + macs
    silenced = [name for name in silencing(graph) - graph.unsilenced if graph.is_stored(name)]
    coupling = couple(known, (*statements, *_alike(graph, copies or {})), seeds, weights, approximate, silenced)
    layers = tuple(layer for node in graph.nodes if (layer := layer_of(node, graph)) is not None)
    groups = _named(coupling, graph, statements)
    frozen = _frozen(coupling, graph, statements, terms, nominal)
    return Analysis(graph, shapes, statements, groups, frozen, terms, layers, nominal, sampled, coupling.approximate)


def _alike(graph: Graph, copies: Mapping[str, str]) -> Iterator[Statement]:
    """Of a bias that layers share each copy loses what the others do, so that it is still one.

    Exporters write a turned copy of a shared weight for every use, but no copy of its bias. A vector of one number all
    over is equal to others by chance.
    """
    biases = silencing(graph)
    for copy, origin in copies.items():
        if not {copy, origin} <= biases or not (graph.is_stored(copy) and graph.is_stored(origin)):
            continue
        dims = tuple(graph.stored(origin).dims)
        values = graph.array(origin)
        if len(dims) == 1 and graph.stored(origin).data_type in FLOATS and (values != values[:1]).any():
            sizes = ([[dims[0]]],)
            shared = OpView("Identity", "", 1, {}, sizes, sizes, (None,), (True,))
            yield Statement(copy, "Identity", rules.describe(shared), (origin,), (copy,))


def _sampling(statement: Statement) -> Statement:
    """A convolution whose weight may lose input channels that its input keeps."""
    relation = statement.relation
    if isinstance(relation, Refusal):
        return statement
    data = relation.inputs[0]
    (letter,) = data[1].letters
    apart = (data[0], replace(data[1], letters=(_SAMPLED,)), *data[2:])
    sizes = relation.sizes | {_SAMPLED: relation.sizes[letter]}
    return replace(statement, relation=replace(relation, inputs=(apart, *relation.inputs[1:]), sizes=sizes))


def _named(coupling: Coupling, graph: Graph, statements: tuple[Statement, ...]) -> tuple[GroupInfo, ...]:
    """Names of the layers around each group; a group is called by its first producer, or by what its reader reads."""
    where: dict[AxisId, list[int]] = {}
    for group in coupling.groups:
        for held in group.axes:
            where.setdefault((held.tensor, held.axis), []).append(group.index)
    producers: list[dict[str, None]] = [{} for _ in coupling.groups]
    consumers: list[dict[str, None]] = [{} for _ in coupling.groups]
    for node, statement in zip(graph.nodes, statements, strict=True):
        for axis in contracted_axes(node, statement.relation):
            for index in where.get(axis, ()):
                consumers[index][node.label] = None
        for axis in made_axes(node, statement.relation, graph.computed_from_constants):
            for index in where.get(axis, ()):
                producers[index][node.label] = None
    named, used = [], set()
    for group in coupling.groups:
        read = [f"{label}:input" for label in consumers[group.index]]
        base = next(iter([*producers[group.index], *read]), group.axes[0].tensor)
        name, count = base, 2
        while name in used:
            name, count = f"{base}#{count}", count + 1
        used.add(name)
        named.append(GroupInfo(group, name, tuple(producers[group.index]), tuple(consumers[group.index])))
    return tuple(named)


def _frozen(
    coupling: Coupling,
    graph: Graph,
    statements: tuple[Statement, ...],
    terms: tuple[MacTerm, ...],
    nominal: Shapes,
) -> tuple[Frozen, ...]:
    """Frozen channels of the layers, gathered by the place that froze them.

    A channel is what a layer's weights count, and what goes with it: the heads of an attention, but not its tokens.
    """
    inputs = {spec.name for spec in graph.inputs}
    weights = {n for node in graph.nodes if holds_macs(node) for n in node.inputs if n in graph.computed_from_constants}
    channels = {seed for (name, _), (seed, _) in coupling.frozen.items() if name in weights}
    rules_of = {s.node: str(s.relation) for s in statements if not isinstance(s.relation, Refusal)}
    macs: dict[int, float] = {}
    held: dict[Seed, tuple[int, dict[int, str]]] = {}
    for term in terms:
        macs[term.index] = macs.get(term.index, 0.0) + term.at(nominal)
        node = graph.nodes[term.index]
        axes = term.axes
        if isinstance(statements[term.index].relation, Refusal):  # what its weights say is what holds it
            axes = tuple((n, k) for n in node.inputs if n in weights for k in range(len(nominal.shape(n) or ())))
        for axis in axes:
            seed, count = coupling.frozen.get(axis, (None, 0))
            if seed not in channels or seed.kind in _NO_CHANNELS or (seed.tensor in inputs and seed.axis == 0):
                continue
            most, nodes = held.get(seed, (0, {}))
            held[seed] = (max(most, count), nodes | {term.index: term.node})
    return tuple(
        Frozen(
            s.reason,
            s.node,
            s.op,
            s.tensor,
            s.axis,
            count,
            tuple(nodes.values()),
            sum(macs[k] for k in nodes),
            rules_of.get(s.node, ""),
            remedy(s),
        )
        for s, (count, nodes) in held.items()
    ) + tuple(_frozen_body(graph, graph.nodes[index], macs) for index, macs in sorted(nominal.turns.items()) if macs)


def _frozen_body(graph: Graph, node: Node, macs: float) -> Frozen:
    """The layers in the body of a loop."""
    why, _, what = why_closed(graph.model, node.index).partition("; ")
    reason = f"layers in the body of {node.op} stay as they are" + (f": {why}" if why else "")
    what = what or "export without control flow"
    return Frozen(reason, node.label, node.op, node.outputs[0], 0, 0, (node.label,), macs, "", what)
