"""What stands behind a reader: a BatchNormalization, a residual sum, a limiter such as Relu."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from onnxprune.graph import Graph, Node
from onnxprune.readers import Reader
from onnxprune.reconstruct import Saturation
from onnxprune.statistics import FOLDS

_SAMPLE_BYTES = 256 << 20  # rows kept for one reader


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
            if limits is None and node.op == "BatchNormalization" and name == reader.layer.output and len(stored) == 4:
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
    """Rows kept as they are, for a fit that needs more than sums: as many as fit into a limit of memory."""

    saturation: Saturation
    shift: np.ndarray
    per_batch: int
    rows: list[np.ndarray] = field(default_factory=list)
    wanted: list[np.ndarray] = field(default_factory=list)
    offset: list[np.ndarray] = field(default_factory=list)

    @staticmethod
    def of(behind: Behind, reader: Reader, batches: int) -> Samples | None:
        """Room for a reader's rows; None where no limiter follows."""
        if behind.limits is None or len(reader.weights) != 1:
            return None
        width = 4 * (reader.width + 2 * len(behind.scale))
        saturation = Saturation(behind.scale.astype(np.float32), *behind.limits)
        return Samples(saturation, behind.shift.astype(np.float32), max(_SAMPLE_BYTES // width // (FOLDS * batches), 1))

    def add(self, rows: np.ndarray, wanted: np.ndarray, shortcut: np.ndarray | None) -> None:
        """Add a batch: (rows, p), (rows, o), and what the pruned network's shortcut gives."""
        step = -(-len(rows) // self.per_batch)
        self.rows.append(rows[::step].copy())
        self.wanted.append(wanted[::step].copy())
        offset = np.broadcast_to(self.shift, wanted.shape) if shortcut is None else shortcut + self.shift
        self.offset.append(offset[::step].copy())

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All of it: (rows, p), (rows, o), (rows, o)."""
        return np.concatenate(self.rows), np.concatenate(self.wanted), np.concatenate(self.offset)
