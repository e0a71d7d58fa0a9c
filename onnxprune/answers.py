"""What the original network gives wherever something is fitted: found once, for every sweep.

A layer is fitted at a draw of positions and a block at windows of some samples, so that no more of the original's
tensors has to be kept, and the original need not run beside the pruned network.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune.analysis import Analysis
from onnxprune.batches import Batches
from onnxprune.blocks import Block
from onnxprune.readers import Reader
from onnxprune.shelf import Shelf, Shelved
from onnxprune.surroundings import look_behind
from onnxprune.unfold import out_positions
from onnxprune.views import View

Sizes = dict[int, tuple[int, ...]]  # by the reader's index, those of the axes of its output that are positions


@dataclass(frozen=True, eq=False)
class Answer:
    """What a layer of the original gives, and what is added behind it.

    Attributes:
        output: of the layer.
        residual: what is added; None where nothing is, or where it is not followed.
        out: sizes of the axes of the whole output that are neither batch nor channel.
    """

    output: np.ndarray
    residual: np.ndarray | None
    out: tuple[int, ...]


class Answers:
    """The original's outputs where the batches' draws and the blocks' views look.

    Args:
        analysis: of the original.
        readers: all that may be fitted.
        blocks: all that may be fitted.
        batches: the data.
        room: bytes that a view may take.
        shelf: where to keep them.
        products: multiplications that a view may take.
    """

    def __init__(
        self,
        analysis: Analysis,
        readers: Sequence[Reader],
        blocks: Sequence[Block],
        batches: Batches,
        room: int,
        shelf: Shelf,
        products: float = math.inf,
    ) -> None:
        self.readers, self.batches, self.shelf = tuple(readers), batches, shelf
        views = blocks if batches.data.batchable else ()
        self.views = {b.tensor: View(b, analysis.graph, batches, room, products) for b in views}
        everything = {*analysis.graph.producer, *(spec.name for spec in analysis.graph.inputs)}
        self._residuals = {r.index: _residual(analysis, r, everything) for r in readers}
        self._kept: dict[int, Shelved] = {}  # by batch
        self._sizes: dict[int, Sizes] = {}
        self._held = 0  # bytes of them in memory
        self._counting = threading.Lock()

    def names(self, reader: Reader) -> list[str]:
        """Tensors of the original to find for a reader."""
        between = reader.layer.data if self._view(reader) is not None else ""
        return [name for name in (reader.layer.output, self._residuals[reader.index], between) if name]

    @property
    def are_known(self) -> bool:
        """Whether they were found for every reader and batch."""
        return sum(map(len, self._sizes.values())) == len(self.batches) * len(self.readers)

    def settle(self, readers: Sequence[Reader], found: Mapping[str, np.ndarray]) -> None:
        """Decide what the views of some readers look at, from the tensors of a first batch."""
        for reader in readers:
            view = self._view(reader)
            if view is not None:
                view.settle(found[reader.layer.data], found[reader.layer.output])

    def take(self, readers: Sequence[Reader], batch: int, found: Mapping[str, np.ndarray]) -> None:
        """Keep what there is to keep of a batch for some readers, as the original gives it; on any thread."""
        kept, sizes = {}, {}
        for reader in readers:
            tensors = {"": found[reader.layer.output]}
            if self._residuals[reader.index]:
                tensors["+"] = found[self._residuals[reader.index]]
            out = sizes[reader.index] = out_positions(reader.layer, tensors[""].shape)
            positions = self.batches.positions(reader, batch, int(np.prod(out, dtype=np.int64)))
            view = self._view(reader)
            for which, tensor in tensors.items():
                kept[f"{reader.index}{which}"] = reader.unfolding.targets(tensor, positions)
                if view is not None:
                    kept[f"{reader.index}{which}view"] = view.given(batch, reader, tensor)
        size = sum(array.nbytes for array in kept.values())
        with self._counting:
            together = self._held + size
            self._held += size if together <= self.shelf.limit else 0
        self._kept[batch] = {**self._kept.get(batch, {}), **self.shelf.put(kept, together)}
        self._sizes[batch] = {**self._sizes.get(batch, {}), **sizes}

    def at_positions(self, reader: Reader, batch: int) -> Answer:
        """At the positions that are drawn: (group, rows, outputs / group)."""
        return self._get(reader.index, "", batch)

    def in_view(self, reader: Reader, batch: int) -> Answer:
        """In the view of the block that the reader belongs to: (samples, outputs, *window)."""
        return self._get(reader.index, "view", batch)

    def _get(self, index: int, where: str, batch: int) -> Answer:
        tensors = self.shelf.get(self._kept[batch])
        output, residual = f"{index}{where}", f"{index}+{where}"
        return Answer(tensors[output], tensors.get(residual), self._sizes[batch][index])

    def _view(self, reader: Reader) -> View | None:
        view = self.views.get(reader.layer.data)
        return view if view is not None and reader in view.block.outer else None


def _residual(analysis: Analysis, reader: Reader, available: set[str]) -> str:
    """The tensor that is added behind a reader, wherever it comes from; empty where there is none."""
    name, shapes = look_behind(analysis.graph, reader, available).residual, analysis.shapes
    return name if name and shapes.shape(name) == shapes.shape(reader.layer.output) else ""
