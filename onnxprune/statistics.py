"""Sums over calibration samples: all that selection and reconstruction need of the data.

For one reader, with ``X`` its unfolded input (rows: sampled output positions; columns: channels x kernel taps, then one
column of ones) and ``Y`` its target, kept are ``H = X'X``, ``B = X'Y`` and ``|Y|^2``. They add up over batches, so
memory does not grow with the number of samples. Products of some hundred to thousand rows are formed in the data's
precision and summed in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_TOGETHER = 256, 4096  # rows to be waited for, at least and at most: as many as there are columns
FOLDS = 2  # statistics are kept in two halves, so that a regularisation can be judged on samples it has not seen


@dataclass(eq=False)
class Statistics:
    """Gram matrix (p, p), cross products (p, o) and energy of the target (o,), in float64."""

    gram: np.ndarray
    cross: np.ndarray
    energy: np.ndarray
    rows: int = 0

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(
            self.gram + other.gram, self.cross + other.cross, self.energy + other.energy, self.rows + other.rows
        )

    @property
    def is_finite(self) -> bool:
        """Whether everything could be summed: nothing was NaN, infinite, or too large to be squared."""
        return all(bool(np.isfinite(array).all()) for array in (self.gram, self.cross, self.energy))

    def of(self, columns: np.ndarray) -> Statistics:
        """Of some of the columns alone."""
        return Statistics(self.gram[np.ix_(columns, columns)], self.cross[columns], self.energy, self.rows)

    def error(self, weights: np.ndarray) -> float:
        """Squared error |Y - XW|^2 of weights (p, o), summed over the outputs."""
        fit = np.einsum("po,po->", weights, self.gram @ weights) - 2.0 * np.einsum("po,po->", weights, self.cross)
        return float(max(fit + self.energy.sum(), 0.0))

    @staticmethod
    def of_linear(gram: np.ndarray, weights: np.ndarray, rows: int) -> Statistics:
        """Statistics of a target that is ``X @ weights`` itself, as in the original network."""
        with np.errstate(invalid="ignore", over="ignore"):  # `is_finite` says so
            cross = gram @ weights
            return Statistics(gram, cross, np.einsum("po,po->o", weights, cross), rows)


def squared(values: np.ndarray) -> float:
    """The sum of the squares: of a few thousand at a time in the values' own precision, then in float64."""
    flat, step = np.ravel(values, "K"), 1 << 12
    parts = [flat[k : k + step] for k in range(0, flat.size, step)]
    if values.dtype == np.float32:
        found = math.fsum(float(np.dot(part, part)) for part in parts)
        if np.isfinite(found):  # else squares were too large for it
            return found
    return sum(float(np.square(part, dtype=np.float64).sum()) for part in parts)


class Together:
    """Rows that come in parts, handed on as many together: of a few rows a product takes as long as of many.

    Args:
        columns: of what is to be made of them.
    """

    def __init__(self, columns: int) -> None:
        self._enough = int(np.clip(columns, *_TOGETHER))
        self._parts: list[tuple[np.ndarray, ...]] = []

    def add(self, *part: np.ndarray) -> tuple[np.ndarray, ...] | None:
        """Add arrays with as many rows each; gives all that waited, once they are enough."""
        self._parts.append(part)
        return self.take() if sum(len(arrays[0]) for arrays in self._parts) >= self._enough else None

    def take(self) -> tuple[np.ndarray, ...] | None:
        """All that waited; None if nothing did."""
        parts, self._parts = self._parts, []
        return tuple(a[0] if len(a) == 1 else np.concatenate(a) for a in zip(*parts, strict=True)) or None


class Gram:
    """``X'X`` of rows that come in parts."""

    def __init__(self, columns: int) -> None:
        self._total = np.zeros((columns, columns))
        self._waiting = Together(columns)

    def add(self, x: np.ndarray) -> None:
        """Add rows (rows, p)."""
        self._sum(self._waiting.add(x))

    def _sum(self, found: tuple[np.ndarray, ...] | None) -> None:
        if found and found[0].size:
            x = found[0] if found[0].flags.f_contiguous else np.ascontiguousarray(found[0])
            with np.errstate(invalid="ignore", over="ignore"):  # `is_finite` says so
                self._total += x.T @ x  # BLAS' syrk, and unlike with SciPy's, other threads may run meanwhile

    @property
    def value(self) -> np.ndarray:
        """The whole matrix (p, p), in float64."""
        self._sum(self._waiting.take())
        return self._total.copy()


class Sums:
    """Statistics in the making.

    Args:
        columns: of the unfolded input.
        outputs: of the target.
    """

    def __init__(self, columns: int, outputs: int) -> None:
        self._gram, self._rows, self._waiting = Gram(columns), 0, Together(columns)
        self._cross, self._energy = np.zeros((columns, outputs)), np.zeros(outputs)

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """Add a batch: ``x`` (rows, p), ``y`` (rows, o)."""
        self._sum(self._waiting.add(x, y))

    def _sum(self, found: tuple[np.ndarray, ...] | None) -> None:
        if found:
            x, y = found
            self._gram.add(x)
            self._cross += x.T @ y
            self._energy += np.einsum("ro,ro->o", y, y, dtype=np.float64)
            self._rows += len(x)

    @property
    def statistics(self) -> Statistics:
        """Of what came so far."""
        self._sum(self._waiting.take())
        return Statistics(self._gram.value, self._cross.copy(), self._energy.copy(), self._rows)
