"""A model whose bodies are laid open: as it is analysed, fitted and cut; and how it is closed again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import onnx
from onnx import helper

from onnxprune.bodies import OpenIf, close_if, open_next
from onnxprune.branches import inline_branch
from onnxprune.errors import InputError
from onnxprune.graph import Graph
from onnxprune.loops import OpenLoop, close_loop, open_loops
from onnxprune.normalise import normalise, unshare
from onnxprune.runtime import Runtime
from onnxprune.tensors import bodies, graphs


@dataclass(frozen=True, eq=False)
class Flat:
    """A model whose bodies are laid open.

    Attributes:
        model: computes what the nested one does, as far as both branches run on the same data.
        copies: constants that were copied for their users, and of what.
        ir_version: of the file.
        opened: how each `If` and each loop is put back, in the order in which they were opened: branches, then loops,
            then branches in the bodies of those. Of loops the first turn is laid open beside them.
    """

    model: onnx.ModelProto
    copies: Mapping[str, str]
    ir_version: int
    opened: tuple[OpenIf | OpenLoop, ...] = ()

    @property
    def is_open(self) -> bool:
        """Whether there is anything to close."""
        return bool(self.opened)

    @property
    def branches(self) -> tuple[OpenIf, ...]:
        """Every `If` that is open."""
        return tuple(each for each in self.opened if isinstance(each, OpenIf))

    @property
    def loops(self) -> tuple[OpenLoop, ...]:
        """Every loop that is open."""
        return tuple(each for each in self.opened if isinstance(each, OpenLoop))

    def turning(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """A model that was made from the open one, its loops put back, without which it does not run once it is cut."""
        first = next((k for k, each in enumerate(self.opened) if isinstance(each, OpenLoop)), len(self.opened))
        return _closed(model, self.opened[first:])

    def closed(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """A model that was made from the open one, its bodies put back, in the IR version of the file."""
        return _in_version(_closed(model, self.opened), self.ir_version)

    @property
    def names(self) -> dict[str, str]:
        """Tensors of the bodies: as the open model calls them, and as the bodies do."""
        return {name: own for each in self.opened for body in each.bodies for name, own in body.names.items()}


def _closed(model: onnx.ModelProto, opened: Sequence[OpenIf | OpenLoop]) -> onnx.ModelProto:
    """What was opened last is closed first."""
    if not opened:
        return model
    nested = onnx.ModelProto()
    nested.CopyFrom(model)
    for each in reversed(opened):
        if isinstance(each, OpenLoop):
            close_loop(nested, each)
        else:
            close_if(nested, each)
    return nested


def _in_version(model: onnx.ModelProto, ir_version: int) -> onnx.ModelProto:
    """The model in an earlier IR version, where a stored tensor has to be an input: new ones become Constant nodes."""
    if ir_version >= model.ir_version:
        return model
    earlier = onnx.ModelProto()
    earlier.CopyFrom(model)
    earlier.ir_version = ir_version
    listed = {value.name for value in model.graph.input}
    new = [t for t in model.graph.initializer if t.name not in listed]
    del earlier.graph.initializer[:], earlier.graph.node[:]
    earlier.graph.initializer.extend(t for t in model.graph.initializer if t.name in listed)
    earlier.graph.node.extend(helper.make_node("Constant", [], [t.name], value=t) for t in new)
    earlier.graph.node.extend(model.graph.node)
    return earlier


def forms(graph: Graph, runtime: Runtime) -> list[Flat]:
    """A model, normalised: with all of its bodies laid open, then fewer of them, and last as it is.

    The later ones serve where the first ones do not run: branches on data that are not meant for them, say. A form in
    which nothing more is open than in the next one is left out.

    Raises:
        InputError: onnxruntime would compute something else than what the model says.
    """
    model, copies = normalise(graph, runtime)
    found = [Flat(model, copies, graph.model.ir_version)]
    if any(True for node in model.graph.node for _ in bodies(node)):
        _refuse_repeated(model)
        branches = flatten(found[0])
        loops = _with_loops(branches)
        found = [form for form in (_with_their_branches(loops), loops, branches) if form.is_open] + found
    return [form for form, after in zip(found, [*found[1:], None], strict=True) if form is not after]


def _refuse_repeated(model: onnx.ModelProto) -> None:
    """A branch that gives one tensor twice: onnxruntime leaves the second result as the memory happens to be."""
    for graph in graphs(model):
        for node in graph.node:
            for body in bodies(node) if node.op_type == "If" else ():
                names = [value.name for value in body.output]
                twice = next((name for name in names if names.count(name) > 1), None)
                if twice is not None:
                    raise InputError(
                        f"a branch of If {node.name or node.output[0]!r} gives {twice!r} twice, which onnxruntime"
                        " computes wrongly; put an Identity behind one of them"
                    )


def flatten(form: Flat) -> Flat:
    """The same with every `If` opened that can be, weights that branches move about staying; itself where none can."""
    flat = onnx.ModelProto()
    flat.CopyFrom(form.model)
    opened = []
    while (found := open_next(flat)) is not None:
        opened.append(found)
        while inline_branch(flat):
            pass
    return replace(form, model=flat, copies=_unshared(flat, form.copies), opened=tuple(opened)) if opened else form


def _with_loops(form: Flat) -> Flat:
    """The same with the loops opened as well; itself where there are none to open."""
    flat = onnx.ModelProto()
    flat.CopyFrom(form.model)
    loops = tuple(open_loops(flat))
    if not loops:
        return form
    return replace(form, model=flat, copies=_unshared(flat, form.copies), opened=(*form.opened, *loops))


def _with_their_branches(form: Flat) -> Flat:
    """The same with every `If` in the first turns opened as well; itself where there are none to open.

    What one turn knows of a condition need not hold in the next one, so that none is inlined here.
    """
    flat = onnx.ModelProto()
    flat.CopyFrom(form.model)
    branches = []
    while form.loops and (found := open_next(flat)) is not None:
        branches.append(found)
    if not branches:
        return form
    return replace(form, model=flat, copies=_unshared(flat, form.copies), opened=(*form.opened, *branches))


def _unshared(flat: onnx.ModelProto, copies: Mapping[str, str]) -> dict[str, str]:
    more = unshare(flat)
    return {**copies, **{copy: copies.get(origin, origin) for copy, origin in more.items()}}
