"""Sums over calibration samples: all that selection and reconstruction need of the data.

For one reader, with ``X`` its unfolded input (rows: sampled output positions; columns: channels x kernel taps, then one
column of ones) and ``Y`` its target, kept are ``H = X'X``, ``B = X'Y`` and ``|Y|^2``. They add up over batches, so
memory does not grow with the number of samples. Products are formed in the data's precision and summed in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FOLDS = 2  # statistics are kept in two halves, so that a regularisation can be judged on samples it has not seen


@dataclass(eq=False)
class Statistics:
    """Gram matrix (p, p), cross products (p, o) and energy of the target (o,), in float64."""

    gram: np.ndarray
    cross: np.ndarray
    energy: np.ndarray
    rows: int = 0

    @staticmethod
    def empty(columns: int, outputs: int) -> Statistics:
        """Sums over nothing."""
        return Statistics(np.zeros((columns, columns)), np.zeros((columns, outputs)), np.zeros(outputs))

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """Add a batch: ``x`` (rows, p), ``y`` (rows, o)."""
        self.gram += x.T @ x
        self.cross += x.T @ y
        self.energy += np.einsum("ro,ro->o", y, y, dtype=np.float64)
        self.rows += len(x)

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
