"""A model whose bodies are laid open: as it is analysed, fitted and cut; and how it is closed again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx

from onnxprune.bodies import OpenIf, close_if, open_next
from onnxprune.branches import inline_branch
from onnxprune.graph import Graph
from onnxprune.loops import OpenLoop, close_loop, open_loops
from onnxprune.normalise import normalise, unshare
from onnxprune.runtime import Runtime
from onnxprune.tensors import bodies


@dataclass(frozen=True, eq=False)
class Flat:
    """A model whose bodies are laid open.

    Attributes:
        model: computes what the nested one does, as far as both branches run on the same data.
        copies: constants that were copied for their users, and of what.
        opened: in the order in which they were opened.
        loops: the same of loops, of which the first turn is laid open beside them. Cut, it runs only when closed.
    """

    model: onnx.ModelProto
    copies: Mapping[str, str]
    opened: tuple[OpenIf, ...] = ()
    loops: tuple[OpenLoop, ...] = ()

    def closed(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """A model that was made from the open one, its bodies put back; the model itself where there are none."""
        if not self.opened and not self.loops:
            return model
        nested = onnx.ModelProto()
        nested.CopyFrom(model)
        for each in reversed(self.opened):
            close_if(nested, each)
        for loop in reversed(self.loops):
            close_loop(nested, loop)
        return nested

    @property
    def names(self) -> dict[str, str]:
        """Tensors of the bodies: as the open model calls them, and as the bodies do."""
        parts: list[OpenIf | OpenLoop] = [*self.opened, *self.loops]
        return {name: own for each in parts for body in each.bodies for name, own in body.names.items()}


def forms(graph: Graph, runtime: Runtime, *, loops: bool = True) -> list[Flat]:
    """A model, normalised: with its bodies laid open where it has some, and as it is.

    The last one serves where branches do not run on data that are not meant for them. Loops are laid open in models
    that have no open branches.
    """
    model, copies = normalise(graph, runtime)
    if not any(True for node in model.graph.node for _ in bodies(node)):
        return [Flat(model, copies)]
    flat = flatten(model, copies)
    if loops and not flat.opened:
        flat = _with_loops(model, copies)
    return [flat, Flat(model, copies)] if flat.opened or flat.loops else [flat]


def flatten(model: onnx.ModelProto, copies: Mapping[str, str]) -> Flat:
    """Lay open every `If` of a normalised model that can be; weights that branches move about stay where they are.

    Args:
        model: is left as it is.
        copies: constants that normalisation copied, and of what.
    """
    flat = onnx.ModelProto()
    flat.CopyFrom(model)
    opened = []
    while (found := open_next(flat)) is not None:
        opened.append(found)
        while inline_branch(flat):
            pass
    return Flat(flat, _unshared(flat, copies), opened=tuple(opened)) if opened else Flat(model, copies)


def _with_loops(model: onnx.ModelProto, copies: Mapping[str, str]) -> Flat:
    flat = onnx.ModelProto()
    flat.CopyFrom(model)
    loops = tuple(open_loops(flat))
    return Flat(flat, _unshared(flat, copies), loops=loops) if loops else Flat(model, copies)


def _unshared(flat: onnx.ModelProto, copies: Mapping[str, str]) -> dict[str, str]:
    more = unshare(flat)
    return {**copies, **{copy: copies.get(origin, origin) for copy, origin in more.items()}}
