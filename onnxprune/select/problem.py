"""The interface of selection: a group's problem, and the ranking that answers it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnxprune.statistics import Statistics

DAMPING = 1e-4  # of the Gram matrix, relative to the mean of its diagonal


@dataclass(frozen=True, eq=False)
class Problem:
    """One reader of a group.

    Attributes:
        statistics: H, B and |Y|^2 of the reader; the last column of H is the bias.
        weights: (p, o) the weights as they are, bias in the last row.
        columns: (units, columns per unit) the columns of every unit of the group.
        active: (p,) columns that may be used at all (others belong to units removed before).
        scale: weight of this reader's squared error in the group's.
    """

    statistics: Statistics
    weights: np.ndarray
    columns: np.ndarray
    active: np.ndarray
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Ranking:
    """A kept set for every width.

    Attributes:
        sets: (units + 1, units) booleans; row k keeps k units.
        errors: (units + 1,) squared error of the best weights for each set, or NaN where it was not computed.
    """

    sets: np.ndarray
    errors: np.ndarray

    def kept(self, count: int) -> np.ndarray:
        """Indices of the ``count`` kept units, sorted."""
        return np.flatnonzero(self.sets[count])


def ordered(order: np.ndarray, errors: Mapping[int, float] | None = None) -> Ranking:
    """A ranking whose sets are nested: ``order`` lists the units, the most important first."""
    units = len(order)
    place = np.empty(units, np.int64)
    place[order] = np.arange(units)
    curve = np.full(units + 1, np.nan)
    for count, error in (errors or {}).items():
        curve[count] = error
    return Ranking(place[None, :] < np.arange(units + 1)[:, None], curve)
