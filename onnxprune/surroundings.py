"""What stands behind a reader: a BatchNormalization, a residual sum, a limiter such as Relu."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from onnxprune.graph import Graph, Node
from onnxprune.readers import Reader
from onnxprune.reconstruct import Saturation
from onnxprune.shelf import Shelf, Shelved
from onnxprune.statistics import Together, squared

_SAMPLE_BYTES = 256 << 20  # that rows kept for one reader may take, in memory or in files


@dataclass(frozen=True, eq=False)
class Behind:
    """The way from a reader's output ``z`` to what comes of it: ``limit(scale * z + shift + residual)``.

    Attributes:
        scale: (o,) of a BatchNormalization.
        shift: (o,) of a BatchNormalization or a stored bias.
        residual: the tensor that is added, where it is known before the reader runs; empty where there is none.
        limits: of the limiter, None where there is none or where what is added cannot be known.
    """

    scale: np.ndarray
    shift: np.ndarray
    residual: str = ""
    limits: tuple[float, float] | None = None

    @property
    def saturation(self) -> Saturation | None:
        """What makes different outputs of the reader as good as one another."""
        return Saturation(self.scale.astype(np.float32), *self.limits) if self.limits else None

    def before_scale(self, gap: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """A difference behind the scale as one of the reader's output; dead outputs get 0.

        Args:
            gap: the difference.
            shape: of the scales beside it.
        """
        scale = self.scale.reshape(shape).astype(gap.dtype)
        alive = np.abs(scale) > 1e-3 * np.abs(scale).max()
        undone: np.ndarray = np.divide(gap, scale, out=np.zeros_like(gap), where=np.broadcast_to(alive, gap.shape))
        return undone


def look_behind(graph: Graph, reader: Reader, available: set[str]) -> Behind:
    """Follow a reader's output for as long as it has a single way to go.

    Args:
        graph: the network.
        reader: where to start.
        available: tensors that are known before the reader runs.
    """
    outputs = len(reader.output_scale)
    scale, shift, residual = np.ones(outputs), np.zeros(outputs), ""
    name, unknown = reader.layer.output, False
    while True:
        following = graph.consumers.get(name, ())
        limits = None
        if len(following) == 1 and name not in graph.outputs:
            node = following[0]
            limits = _limits(node, graph)
            stored = [n for n in node.inputs if graph.is_stored(n)]
            if reader.normalised and name == reader.layer.output:
                scale = reader.output_scale
                beta, mean = (graph.array(node.inputs[k]).astype(np.float64) for k in (2, 3))
                shift = beta - mean * scale
                name = node.outputs[0]
                continue
            if node.op == "Add" and stored:
                value = graph.array(stored[0])
                if reader.unfolding.kernel or value.shape != (outputs,):
                    return Behind(scale, shift, residual)
                shift = shift + value
                name = node.outputs[0]
                continue
            if node.op == "Add" and not residual and len(set(node.inputs)) == 2:
                other = next(n for n in node.inputs if n != name)
                residual, unknown = (other, unknown) if other in available else ("", True)
                name = node.outputs[0]
                if not unknown:
                    continue
            if node.op in ("Identity", "Dropout"):
                name = node.outputs[0]
                continue
        return Behind(scale, shift, residual, None if unknown else limits)


def _limits(node: Node, graph: Graph) -> tuple[float, float] | None:
    """Lower and upper limit of an operator that cuts values off."""
    if node.op == "Relu":
        return 0.0, np.inf
    if node.op == "Clip":
        given = [node.attributes.get("min"), node.attributes.get("max")]
        for k, name in enumerate(node.inputs[1:3]):
            given[k] = graph.array(name) if graph.is_stored(name) else None
        if given[0] is not None and given[1] is not None:
            return float(given[0]), float(given[1])
    return None


@dataclass(eq=False)
class Samples:
    """Rows of a fold kept as they are, for a fit that needs more than sums: as many as fit into a limit of memory.

    Attributes:
        saturation: the limiter behind the reader.
        shift: what is added in front of it.
        count: samples that will come, in all folds.
        width: bytes of a row with all that belongs to it.
        shelf: where the rows are kept.
        waiting: rows that are not yet enough for a part.
        parts: the (n, p) rows, and the (n, o) least and largest outputs that are as good as the original's.
        energy: of the original's outputs there.
        is_whole: whether all rows found room.
    """

    saturation: Saturation
    shift: np.ndarray
    count: int
    width: int
    shelf: Shelf
    waiting: Together
    parts: list[Shelved] = field(default_factory=list)
    together: int = 0
    energy: float = 0.0
    is_whole: bool = True

    @staticmethod
    def of(behind: Behind, reader: Reader, count: int, shelf: Shelf) -> Samples | None:
        """Room for a reader's rows; None where no limiter follows."""
        saturation = behind.saturation
        if saturation is None or len(reader.weights) != 1:
            return None
        width = 4 * (reader.width + 2 * len(behind.scale))
        return Samples(saturation, behind.shift.astype(np.float32), count, width, shelf, Together(reader.width))

    def add(
        self, numbers: np.ndarray, each: int, rows: np.ndarray, wanted: np.ndarray, shortcut: np.ndarray | None
    ) -> None:
        """Add a batch.

        Args:
            numbers: (n,) of the rows, among those of all samples: which are kept does not depend on the batches.
            each: rows of a sample.
            rows: (n, p).
            wanted: (n, o).
            shortcut: (n, o) what the pruned network's shortcut gives.
        """
        step = -(-self.count * each * self.width // _SAMPLE_BYTES)
        while math.gcd(step, each) > 1:  # else some positions of the samples would never be looked at
            step += 1
        chosen = numbers % step == 0
        self.is_whole &= step == 1
        self.together = self.count * each * self.width // step
        offset = np.broadcast_to(self.shift, wanted.shape) if shortcut is None else shortcut + self.shift
        self.energy += squared(wanted[chosen])
        self._keep(self.waiting.add(rows[chosen], *self.saturation.interval(wanted[chosen], offset[chosen])))

    def _keep(self, found: tuple[np.ndarray, ...] | None) -> None:
        if found:
            tensors = dict(zip(("rows", "least", "most"), found, strict=True))
            self.parts.append(self.shelf.put(tensors, self.together))

    def narrow(self, columns: np.ndarray) -> None:
        """Keep these columns of the rows only, of all that were added."""
        self._keep(self.waiting.take())
        for k, part in enumerate(self.parts):
            rows = self.shelf.get(part)["rows"]
            self.parts[k] = {**part, **self.shelf.put({"rows": rows[:, columns]}, self.together)}

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """The rows, and between what their outputs should be, part by part."""
        for part in self.parts:
            tensors = self.shelf.get(part)
            yield tensors["rows"], tensors["least"], tensors["most"]
