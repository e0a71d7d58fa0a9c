"""Kept units exchanged one for one, for as long as the least-squares error falls by it: OSSCAR's local search.

Elimination never takes back what it took out. An exchange does: of all pairs of a unit that is gone and one that is
kept, the best is found exactly, from the inverse Gram matrix of what is kept (Meng et al. 2024, *OSSCAR: One-Shot
Structured Pruning in Vision and Language Models with Combinatorial Optimization*).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxprune.select.greedy import damped, inverse_of
from onnxprune.select.problem import Problem

_WORTH = 1e-3  # of the error: exchanges that gain less are not made


def swapped(problems: Sequence[Problem], kept: np.ndarray) -> np.ndarray:
    """As many units, none of which can be exchanged for another with more than a thousandth of the error to gain.

    Args:
        problems: one per reader of the group; all have the same units.
        kept: indices of the units to begin with, sorted.
    """
    units = len(problems[0].columns)
    for _ in range(units):
        gone = np.setdiff1d(np.arange(units), kept)
        if not len(gone) or not len(kept):
            break
        states = [_Kept(problem, kept) for problem in problems]
        gains = np.sum([state.gains(gone) for state in states], axis=0)  # (gone, kept)
        out, back = np.unravel_index(np.argmax(gains), gains.shape)
        if not gains[out, back] > _WORTH * sum(state.error for state in states):
            break
        kept = np.sort(np.append(np.delete(kept, back), gone[out]))
    return kept


class _Kept:
    """The fit of one reader to what the kept units give.

    Attributes:
        error: scaled squared error that it leaves.
    """

    def __init__(self, problem: Problem, kept: np.ndarray) -> None:
        self.columns, self.scale = problem.columns, problem.scale
        self.gram, self.cross = damped(problem)
        self.left = np.setdiff1d(np.arange(len(self.gram)), np.delete(problem.columns, kept, axis=0).ravel())
        place = np.zeros(len(self.gram), np.int64)
        place[self.left] = np.arange(len(self.left))
        self.kept = place[problem.columns[kept]]  # (k, b) where the kept units' columns stand
        self.inverse = inverse_of(self.gram[np.ix_(self.left, self.left)])
        self.weights = self.inverse @ self.cross[self.left]
        self.error = self.scale * problem.statistics.of(self.left).error(self.weights)

    def gains(self, gone: np.ndarray) -> np.ndarray:
        """What it saves to take in each of these units for each of the kept ones: (gone, kept), scaled.

        With the columns of a unit taken in the inverse is known by its Schur complement; from it follows what the
        removal of any other unit costs then, as in elimination.
        """
        columns = self.columns[gone]  # (g, b)
        between = self.gram[self.left[:, None], columns.ravel()]  # (p, g * b)
        projected = self.inverse @ between
        diagonal = self.inverse[self.kept[:, :, None], self.kept[:, None, :]]  # (k, b, b)
        mine = self.weights[self.kept]  # (k, b, o)
        squares = mine @ mine.transpose(0, 2, 1)  # (k, b, b): only these are looked at, whatever the number of outputs
        found = np.empty((len(gone), len(self.kept)))
        for k, unit in enumerate(columns):
            part = slice(k * columns.shape[1], (k + 1) * columns.shape[1])
            seen, shadow = between[:, part], projected[:, part]
            missing = self.cross[unit] - seen.T @ self.weights  # (b, o)
            schur = self.gram[np.ix_(unit, unit)] - seen.T @ shadow
            both = np.linalg.solve(schur, np.concatenate([missing, shadow[self.kept.ravel()].T], axis=1))
            taken = both[:, : missing.shape[1]]  # the weights of what is taken in
            moved = shadow[self.kept]  # (k, b, b')
            turned = both[:, missing.shape[1] :].T.reshape(moved.shape)
            blocks = diagonal + turned @ moved.transpose(0, 2, 1)
            mixed = (mine @ taken.T) @ moved.transpose(0, 2, 1)
            left = squares - mixed - mixed.transpose(0, 2, 1) + moved @ (taken @ taken.T) @ moved.transpose(0, 2, 1)
            costs = np.trace(np.linalg.solve(blocks, left), axis1=1, axis2=2)
            found[k] = np.einsum("bo,bo->", missing, taken) - costs
        return self.scale * found
