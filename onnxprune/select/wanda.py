"""Weights by the size of what they meet (Sun et al. 2023, *A Simple and Effective Pruning Approach for Large Language
Models*): |W_ij| |X_j|, added up over all weights that read a unit."""

from __future__ import annotations

import numpy as np

from onnxprune.select.problem import Problem, Ranking, ordered


def wanda(problems: list[Problem]) -> Ranking:
    """Rank the units of a group by ``sum over readers, columns j and outputs i of sqrt(scale) |W_ij| |X_j|``."""
    total = np.zeros(len(problems[0].columns))
    for problem in problems:
        norms = np.sqrt(np.maximum(np.diag(problem.statistics.gram), 0.0))
        per_column = norms * np.abs(problem.weights).sum(axis=1)
        total += np.sqrt(problem.scale) * per_column[problem.columns].sum(axis=1)
    return ordered(np.argsort(-total, kind="stable"))
