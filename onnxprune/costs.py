"""What kept counts cost: one interface for every unit that a budget is given in.

Multiply-accumulates, parameters and bytes are sums of products of axis sizes, and axis sizes are linear in the numbers
of units that the groups keep. The peak of the activations' memory is the largest of such sums.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence

import numpy as np
from onnx.helper import tensor_dtype_to_np_dtype
from scipy.sparse import csr_array

from onnxprune.analysis import Analysis
from onnxprune.graph import FLOATS
from onnxprune.macs import AxisId, Part


class Cost(ABC):
    """A cost as a function of the number of units that every group keeps."""

    @abstractmethod
    def along(self, kept: np.ndarray, group: int, candidates: np.ndarray) -> np.ndarray:
        """The cost of the whole model as one group's count runs over the candidates, (candidates,)."""

    @abstractmethod
    def total(self, kept: np.ndarray) -> float:
        """The cost of the whole model for these kept counts, shape (groups,)."""

    def pressure(self, kept: np.ndarray, group: int, candidates: np.ndarray) -> np.ndarray:
        """What a price is put on while a budget is searched for: the cost itself, or a smooth bound of it."""
        return self.along(kept, group, candidates)


class AxisSizes:
    """Sizes of axes as linear functions of the kept counts: ``base + slope @ kept``.

    Attributes:
        index: row of every axis that some group shrinks; the row behind the last is the constant one.
        base: positions that always stay.
        slope: positions per unit, by axis and group.
    """

    def __init__(self, analysis: Analysis) -> None:
        groups = [g.group for g in analysis.groups]
        self.index: dict[AxisId, int] = {}
        for group in groups:
            for axis in group.axes:
                self.index.setdefault((axis.tensor, axis.axis), len(self.index))
        self.slope = np.zeros((len(self.index) + 1, len(groups)))
        self.base = np.ones(len(self.index) + 1)
        for group in groups:
            for axis in group.axes:
                held = (axis.tensor, axis.axis)
                # of an axis with a dynamic factor, as many more positions as it is longer here
                longer = analysis.nominal.size(*held) / analysis.shapes.size(*held)
                self.slope[self.index[held], group.index] += axis.positions.shape[1] * longer
        units = np.array([g.units for g in groups], dtype=np.float64)
        for (tensor, place), row in self.index.items():
            self.base[row] = analysis.nominal.size(tensor, place) - self.slope[row] @ units

    def of(self, kept: np.ndarray) -> np.ndarray:
        """Size of every axis for these kept counts."""
        result: np.ndarray = self.base + self.slope @ np.asarray(kept, dtype=np.float64)
        return result


class Products:
    """Terms that are each a coefficient times the sizes of some axes."""

    def __init__(self, analysis: Analysis, terms: Sequence[Part]) -> None:
        self.sizes = AxisSizes(analysis)
        index = self.sizes.index
        self.coefficient = np.array(
            [
                coefficient * float(np.prod([analysis.nominal.size(*a) for a in axes if a not in index]))
                for coefficient, axes in terms
            ]
        )
        self.rows = np.full((len(terms), max((len(axes) for _, axes in terms), default=0)), len(index))
        for k, (_, axes) in enumerate(terms):
            for j, place in enumerate(axes):
                self.rows[k, j] = index.get(place, len(index))

    def each(self, kept: np.ndarray) -> np.ndarray:
        """Every term for these kept counts, (terms,)."""
        result: np.ndarray = self.coefficient * self.sizes.of(kept)[self.rows].prod(axis=1)
        return result

    def varied(self, kept: np.ndarray, group: int, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which terms follow a group, (terms,), and those terms for every candidate, (candidates, following)."""
        kept = np.asarray(kept, dtype=np.float64)
        slope = self.sizes.slope[:, group]
        touched = (slope != 0)[self.rows].any(axis=1)
        shift = slope * (np.asarray(candidates, dtype=np.float64)[:, None] - kept[group])
        sizes = self.sizes.of(kept) + shift
        return touched, sizes[:, self.rows[touched]].prod(axis=2) * self.coefficient[touched]


class CostModel(Cost):
    """A sum of products of axis sizes; of multiply-accumulates unless other terms are given."""

    def __init__(self, analysis: Analysis, terms: Sequence[Part] | None = None) -> None:
        self.products = Products(
            analysis, [(t.coefficient, t.axes) for t in analysis.terms] if terms is None else terms
        )

    def per_term(self, kept: np.ndarray) -> np.ndarray:
        """Every term for these kept counts, (terms,)."""
        return self.products.each(kept)

    def along(self, kept: np.ndarray, group: int, candidates: np.ndarray) -> np.ndarray:
        """The sum as one group's count runs over the candidates."""
        touched, varied = self.products.varied(kept, group, candidates)
        result: np.ndarray = self.products.each(kept)[~touched].sum() + varied.sum(axis=1)
        return result

    def total(self, kept: np.ndarray) -> float:
        """The sum for these kept counts."""
        return float(self.products.each(kept).sum())


def parameters(analysis: Analysis, copies: Collection[str] = ()) -> CostModel:
    """Floating-point numbers that the file stores.

    Args:
        analysis: of the model.
        copies: stored tensors that the written file holds only once, under another name.
    """
    graph = analysis.graph
    terms = [
        (1.0, tuple((name, axis) for axis in range(len(graph.stored(name).dims))))
        for name in dict.fromkeys(graph.stored_names())
        if graph.stored(name).data_type in FLOATS and name not in copies
    ]
    return CostModel(analysis, terms)


def item_bytes(kind: int) -> float:
    """Bytes of one element of an ONNX type."""
    return float(np.dtype(tensor_dtype_to_np_dtype(kind)).itemsize)


class PeakMemory(Cost):
    """The most bytes of activations that are alive while any node runs, in the file's order.

    While a node runs, its inputs, its outputs and everything that a later node reads are alive; the graph's outputs
    stay to the end. Weights are not counted, and no buffer is taken to be used in place: a runtime may do with less.
    """

    NORM = 16.0  # the price is put on this norm over the nodes, which lies above the peak and has no corners

    def __init__(self, analysis: Analysis) -> None:
        graph, stored = analysis.graph, set(analysis.graph.stored_names())
        constant = graph.computed_from_constants
        born: dict[str, int] = {spec.name: 0 for spec in graph.inputs}
        dies: dict[str, int] = dict(born)
        for node in graph.nodes:
            for name in (*node.inputs, *node.captured):
                dies[name] = node.index
            for name in node.outputs:
                if name not in constant:
                    born[name] = dies[name] = node.index
        dies |= dict.fromkeys(graph.outputs, len(graph.nodes) - 1)
        names = [n for n in born if n and n not in stored and analysis.nominal.shape(n) is not None]
        spans = [np.arange(born[n], dies[n] + 1) for n in names]
        columns = np.repeat(np.arange(len(names)), [len(s) for s in spans])
        where = np.concatenate([*spans, np.empty(0, np.int64)]).astype(np.int64)
        size = (max(len(graph.nodes), 1), len(names))
        self.alive = csr_array((np.ones(len(where)), (where, columns)), shape=size)
        types = analysis.nominal.probes[0].types
        self.products = Products(
            analysis,
            [(item_bytes(types[n]), tuple((n, k) for k in range(len(analysis.nominal.shape(n) or ())))) for n in names],
        )

    def _at_nodes(self, kept: np.ndarray, group: int, candidates: np.ndarray) -> np.ndarray:
        """Bytes alive at every node, (nodes, candidates)."""
        touched, varied = self.products.varied(kept, group, candidates)
        rest = self.alive @ np.where(touched, 0.0, self.products.each(kept))
        result: np.ndarray = rest[:, None] + self.alive[:, np.flatnonzero(touched)] @ varied.T
        return result

    def along(self, kept: np.ndarray, group: int, candidates: np.ndarray) -> np.ndarray:
        """The peak as one group's count runs over the candidates."""
        result: np.ndarray = self._at_nodes(kept, group, candidates).max(axis=0)
        return result

    def pressure(self, kept: np.ndarray, group: int, candidates: np.ndarray) -> np.ndarray:
        """A norm of the bytes over the nodes: nodes that are alike in need fall together."""
        found = self._at_nodes(kept, group, candidates)
        top = max(float(found.max(initial=0.0)), 1e-300)
        result: np.ndarray = top * ((found / top) ** self.NORM).sum(axis=0) ** (1.0 / self.NORM)
        return result

    def total(self, kept: np.ndarray) -> float:
        """The peak for these kept counts."""
        return float((self.alive @ self.products.each(kept)).max(initial=0.0))


class Several(Cost):
    """Several costs at once, each as a share of its limit: all are met where the largest share is at most one."""

    def __init__(self, costs: Sequence[Cost], limits: Sequence[float], weights: Sequence[float]) -> None:
        self.parts = list(zip(costs, limits, weights, strict=True))

    def shares(self, kept: np.ndarray) -> np.ndarray:
        """Every cost over its limit."""
        return np.array([cost.total(kept) / limit for cost, limit, _ in self.parts])

    def along(self, kept: np.ndarray, group: int, candidates: np.ndarray) -> np.ndarray:
        """The largest share as one group's count runs over the candidates."""
        result: np.ndarray = np.max([c.along(kept, group, candidates) / limit for c, limit, _ in self.parts], axis=0)
        return result

    def pressure(self, kept: np.ndarray, group: int, candidates: np.ndarray) -> np.ndarray:
        """The weighted sum of the shares."""
        found = [w * c.pressure(kept, group, candidates) / limit for c, limit, w in self.parts]
        result: np.ndarray = np.sum(found, axis=0)
        return result

    def total(self, kept: np.ndarray) -> float:
        """The largest share."""
        return float(self.shares(kept).max())
