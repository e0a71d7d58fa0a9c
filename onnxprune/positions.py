"""What operators state, in numbers: positions of axes that are the same one, that stay, or that are a product.

Every position of every axis of every tensor gets a number. A relation joins positions; a seed freezes some; an axis
that is a product of factors is a `Split`, which can be cut along one factor only.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from onnxprune.axes import BoundRelation, Refusal

AxisId = tuple[str, int]
VARYING = "a size that depends on the data"


@dataclass(frozen=True, eq=False)
class Statement:
    """What one operator says: its relation, bound, with the names of its operands."""

    node: str
    op: str
    relation: BoundRelation | Refusal
    inputs: tuple[str, ...]  # tensor names, empty where absent
    outputs: tuple[str, ...]
    seen: bool = True  # whether the shapes of all operands are known


class Kind(enum.StrEnum):
    """Kinds of reasons for which an axis is frozen."""

    INPUT = "input"  # of the graph
    OUTPUT = "output"  # of the graph
    ONE = "one"  # a size of one: nothing is lost
    DYNAMIC = "dynamic"  # a size that depends on the data
    CHOSEN = "chosen"  # not by --only or --exclude
    UNKNOWN = "unknown"  # no row for the operator
    REFUSED = "refused"  # the row says so
    UNSEEN = "unseen"  # a tensor whose shape never came to be known
    UNCLAIMED = "unclaimed"  # the row does not speak for this axis
    MIXED = "mixed"  # all values of the axis are needed
    NORMALISED = "normalised"  # a statistic of all values is needed, which fewer would give approximately
    SUMMED = "summed"  # summed up, and a silenced channel is not zero
    POLE = "pole"  # a silenced channel is zero, and what comes of that is not finite
    PRODUCT = "product"  # a product of factors of which another one is cut
    TOGETHER = "together"  # one unit, of which one has to stay
    SAMPLED = "sampled"  # readers choose among the channels instead
    STATED = "stated"  # a size is stated in a way that cannot be mended


@dataclass(frozen=True)
class Seed:
    """Why an axis is frozen."""

    kind: Kind
    reason: str
    node: str
    op: str
    tensor: str
    axis: int


@dataclass(eq=False)
class Split:
    """A relation with product axes: letters of which only some may shrink."""

    statement: Statement
    sizes: dict[str, int]
    axes: list[tuple[int, tuple[str, ...]]]  # (offset of the axis, its atoms, outermost first)
    alternatives: list[frozenset[str]]
    letters: frozenset[str] = frozenset()

    def positions(self, offset: int, atoms: tuple[str, ...], letter: str) -> np.ndarray:
        """Positions of the axis by index of the letter: (size of the letter, rest)."""
        shape = [self.sizes[a] for a in atoms]
        grid = offset + np.arange(int(np.prod(shape))).reshape(shape)
        return np.moveaxis(grid, atoms.index(letter), 0).reshape(self.sizes[letter], -1)


@dataclass(eq=False)
class Positions:
    """Numbers for every position of every axis."""

    offset: dict[AxisId, int] = field(default_factory=dict)
    size: dict[AxisId, int] = field(default_factory=dict)
    total: int = 0

    def add(self, tensor: str, shape: Sequence[int]) -> None:
        """Number the positions of a tensor's axes."""
        for axis, size in enumerate(shape):
            if (tensor, axis) not in self.offset:
                self.offset[tensor, axis] = self.total
                self.size[tensor, axis] = size
                self.total += size


class Edges:
    """Pairs of positions that are the same one."""

    def __init__(self, positions: int) -> None:
        self.positions = positions
        self.left: list[np.ndarray] = []
        self.right: list[np.ndarray] = []

    def join(self, left: np.ndarray, right: np.ndarray) -> None:
        """Position by position, these are the same."""
        self.left.append(left)
        self.right.append(right)

    def components(self) -> np.ndarray:
        """Component of every position."""
        left = np.concatenate([*self.left, np.empty(0, np.int64)])
        right = np.concatenate([*self.right, np.empty(0, np.int64)])
        return components(self.positions, left, right)


def components(count: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Component of every one of so many nodes, joined by edges from ``left`` to ``right``."""
    graph = coo_array((np.ones(len(left), np.int8), (left, right)), shape=(count, count))
    label: np.ndarray = connected_components(graph, directed=False)[1]
    return label


def earliest(label: np.ndarray, seed_of: np.ndarray) -> np.ndarray:
    """The earliest seed of every component, -1 where there is none."""
    none = np.iinfo(np.int64).max
    found = np.full(int(label.max(initial=-1)) + 1, none)
    marked = np.flatnonzero(seed_of >= 0)
    np.minimum.at(found, label[marked], seed_of[marked])
    earliest: np.ndarray = np.where(found == none, -1, found)
    return earliest


def spread(label: np.ndarray, seed_of: np.ndarray) -> np.ndarray:
    """The seed of every position's component: the earliest one that touches it, -1 where none does."""
    spread: np.ndarray = earliest(label, seed_of)[label]
    return spread
