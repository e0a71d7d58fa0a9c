"""Sums over calibration samples: all that selection and reconstruction need of the data.

For one reader, with ``X`` its unfolded input (rows: sampled output positions; columns: channels x kernel taps, then one
column of ones) and ``Y`` its target, kept are ``H = X'X``, ``B = X'Y`` and ``|Y|^2``. They add up over batches, so
memory does not grow with the number of samples. Products are formed and first summed in the data's precision, some
thousand rows at a time, and then in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg.blas import dsyrk, ssyrk

_TOGETHER = 4096  # rows that are summed in the data's precision
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

    def error(self, weights: np.ndarray) -> float:
        """Squared error |Y - XW|^2 of weights (p, o), summed over the outputs."""
        fit = np.einsum("po,po->", weights, self.gram @ weights) - 2.0 * np.einsum("po,po->", weights, self.cross)
        return float(max(fit + self.energy.sum(), 0.0))

    @staticmethod
    def of_linear(gram: np.ndarray, weights: np.ndarray, rows: int) -> Statistics:
        """Statistics of a target that is ``X @ weights`` itself, as in the original network."""
        cross = gram @ weights
        return Statistics(gram, cross, np.einsum("po,po->o", weights, cross), rows)


class Gram:
    """``X'X`` of rows that come in parts."""

    def __init__(self, columns: int) -> None:
        self._total = np.zeros((columns, columns), order="F")
        self._recent: np.ndarray | None = None
        self._rows = 0

    def add(self, x: np.ndarray) -> None:
        """Add rows (rows, p)."""
        if not len(x):
            return
        if not x.flags.f_contiguous:
            x = np.ascontiguousarray(x)
        if self._recent is None:
            self._recent = np.zeros(self._total.shape, x.dtype, order="F")
        kernel = ssyrk if x.dtype == np.float32 else dsyrk
        # one triangle, added to in place; BLAS takes the transpose of what C calls rows
        given, transposed = (x, 1) if x.flags.f_contiguous else (x.T, 0)
        self._recent = kernel(1.0, given, 1.0, self._recent, trans=transposed, lower=1, overwrite_c=1)
        self._rows += len(x)
        if self._rows >= _TOGETHER:
            self._settle()

    def _settle(self) -> None:
        if self._recent is not None:
            self._total += self._recent
            self._recent[:] = 0
            self._rows = 0

    @property
    def value(self) -> np.ndarray:
        """The whole matrix (p, p), in float64."""
        self._settle()
        lower = np.tril(self._total)
        found: np.ndarray = lower + np.tril(lower, -1).T
        return found


class Sums:
    """Statistics in the making.

    Args:
        columns: of the unfolded input.
        outputs: of the target.
    """

    def __init__(self, columns: int, outputs: int) -> None:
        self._gram, self._rows = Gram(columns), 0
        self._cross, self._energy = np.zeros((columns, outputs)), np.zeros(outputs)

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """Add a batch: ``x`` (rows, p), ``y`` (rows, o)."""
        self._gram.add(x)
        self._cross += x.T @ y
        self._energy += np.einsum("ro,ro->o", y, y, dtype=np.float64)
        self._rows += len(x)

    @property
    def statistics(self) -> Statistics:
        """Of what came so far."""
        return Statistics(self._gram.value, self._cross.copy(), self._energy.copy(), self._rows)
