"""Greedy elimination of channel blocks, with exact least-squares errors.

From the inverse of the Gram matrix the cheapest block to remove is known at every step, and removing it updates the
inverse and the weights exactly: optimal brain surgeon (Hassibi and Stork 1993) over the columns of a channel, as in
OSSCAR (Meng et al. 2024). One sweep gives the error of the best weights for every width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
from scipy.linalg.blas import dgemm
from scipy.linalg.lapack import dpotrf, dpotri

from onnxprune.select.problem import DAMPING, Problem, Ranking, ordered

_SHARE = 8  # one in so many columns may be gone before they are left out
_AT_ONCE = 32  # of so many units that are left, one goes at a time; of a multiple as many more together
_CANDIDATES = 4  # times as many units as go are looked at for what goes together


def greedy(problems: list[Problem], floor: int = 0) -> Ranking:
    """Rank the units of a group by eliminating, one at a time, the one whose loss costs least.

    The cost of unit ``u`` is ``sum over readers of scale * tr(W_u' inv(inv(H)_uu) W_u)``: how much the squared error
    grows when its columns go and all others are fitted again. Where many units are left, several go before the costs
    of all are worked out anew: they are chosen one at a time, with exact costs, from the cheapest few.

    Args:
        problems: one per reader of the group; all have the same units.
        floor: stop when this many units are left (the order of the rest is by cost).

    Returns:
        nested sets, and the squared error (scaled, summed over readers) of each.
    """
    units = len(problems[0].columns)
    states = [_Elimination(p) for p in problems]
    alive = np.ones(units, bool)
    total = sum(s.error for s in states)
    errors = {units: total}
    gone: list[int] = []
    while len(gone) < units - floor:
        left = np.flatnonzero(alive)
        picked = _cheapest(states, left, min(max(len(left) // _AT_ONCE, 1), len(left) - floor))
        for s in states:
            s.remove(np.array([unit for unit, _ in picked]))
        for unit, cost in picked:
            alive[unit] = False
            gone.append(unit)
            total += cost
            errors[units - len(gone)] = total
    if floor and alive.any():
        left = np.flatnonzero(alive)
        costs = np.sum([s.costs(left) for s in states], axis=0)
        gone.extend(int(u) for u in left[np.argsort(costs)])
    return ordered(np.array(gone[::-1], dtype=np.int64), errors)


def _cheapest(states: Sequence[_Elimination], left: np.ndarray, count: int) -> list[tuple[int, float]]:
    """The units to remove next, in order, and what each costs once those before it are gone."""
    costs = np.sum([s.costs(left) for s in states], axis=0)
    if count == 1:
        pick = int(np.argmin(costs))
        return [(int(left[pick]), float(costs[pick]))]
    some = left[np.argsort(costs, kind="stable")[: _CANDIDATES * count]]
    among = [s.among(some) for s in states]
    picked: list[tuple[int, float]] = []
    while len(picked) < count:
        picked += _cheapest(among, some, 1)
        some = some[some != picked[-1][0]]
        for s in among:
            s.remove(np.array([picked[-1][0]]))
    return picked


class _Elimination:
    """The inverse Gram matrix and the fitted weights of one reader, shrinking."""

    def __init__(self, problem: Problem) -> None:
        self.columns = problem.columns
        self.scale = problem.scale
        gram, cross = damped(problem)
        self.inverse = inverse_of(gram)
        self.weights = self.inverse @ cross
        self.error = self.scale * problem.statistics.error(self.weights)
        self.place = np.arange(len(gram))  # where a column stands in the matrices
        self.gone = np.zeros(len(gram), bool)  # of what stands there

    def costs(self, units: np.ndarray) -> np.ndarray:
        """Growth of the scaled squared error when each of the units goes."""
        columns = self.place[self.columns[units]]  # (u, b)
        weights = self.weights[columns]  # (u, b, o)
        if columns.shape[1] == 1:
            solved = weights / self.inverse[columns, columns][:, :, None]
        else:
            solved = np.linalg.solve(self.inverse[columns[:, :, None], columns[:, None, :]], weights)
        growth: np.ndarray = np.einsum("ubo,ubo->u", weights, solved)
        return self.scale * growth

    def among(self, units: np.ndarray) -> _Elimination:
        """The same problem as far as it concerns some units: what the others cost is not kept up."""
        part = copy.copy(self)
        columns = self.place[self.columns[units]].ravel()
        part.place = np.zeros_like(self.place)
        part.place[self.columns[units].ravel()] = np.arange(len(columns))
        part.inverse, part.weights = self.inverse[np.ix_(columns, columns)], self.weights[columns]
        part.gone = np.zeros(len(columns), bool)
        return part

    def remove(self, units: np.ndarray) -> None:
        """Take the columns of some units out, all others fitted again."""
        columns = self.place[self.columns[units]].ravel()
        rows = self.inverse[columns]  # (b, p)
        gain = np.linalg.solve(rows[:, columns], rows)
        self.weights -= gain.T @ self.weights[columns]
        # in place: the matrix is symmetric, and its transpose has the order that BLAS wants
        self.inverse = dgemm(-1.0, gain, rows, 1.0, self.inverse.T, trans_a=True, overwrite_c=True).T
        # exact zeros, and a unit block that later steps never touch
        self.weights[columns] = 0.0
        self.inverse[columns, :], self.inverse[:, columns] = 0.0, 0.0
        self.inverse[columns, columns] = 1.0
        self.gone[columns] = True
        if self.gone.sum() * _SHARE >= len(self.gone):
            self._compact()

    def _compact(self) -> None:
        """Leave out what is gone, so that later steps cost less."""
        stays = np.flatnonzero(~self.gone)
        back = np.zeros(len(self.gone), np.int64)
        back[stays] = np.arange(len(stays))
        self.place = back[self.place]  # of columns that are gone nobody asks again
        self.inverse, self.weights = self.inverse[np.ix_(stays, stays)], self.weights[stays]
        self.gone = np.zeros(len(stays), bool)


def damped(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """The Gram matrix and the products with the target; what may not be used stands apart, with nothing to give.

    Both are drawn towards the weights as they are, so that few samples or dead channels change nothing; also the bias:
    with it free, as in the fits, SqueezeNet, whose activations are large, came out no better at 1.5x and worse at 2x.
    """
    gram = problem.statistics.gram.copy()
    ridge = DAMPING * (float(np.mean(np.diag(gram)[problem.active])) or 1.0)
    cross = problem.statistics.cross + ridge * problem.weights
    gram[np.diag_indices_from(gram)] += ridge
    dead = ~problem.active
    gram[dead, :], gram[:, dead], cross[dead] = 0.0, 0.0, 0.0
    gram[dead, dead] = 1.0
    return gram, cross


def inverse_of(gram: np.ndarray) -> np.ndarray:
    """The inverse of a symmetric matrix that is positive definite, or was but for rounding."""
    factor, failed = dpotrf(gram, lower=True)
    if failed:
        return np.linalg.inv(gram)
    lower = np.tril(dpotri(factor, lower=True, overwrite_c=True)[0])
    found: np.ndarray = lower + np.tril(lower, -1).T
    return found
