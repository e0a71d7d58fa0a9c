"""Which channels: statistics in, a kept set for every width out."""

from __future__ import annotations

from onnxprune.select.greedy import greedy
from onnxprune.select.lasso import lasso
from onnxprune.select.problem import DAMPING, Problem, Ranking, ordered
from onnxprune.select.swaps import swapped
from onnxprune.select.wanda import wanda

__all__ = ["DAMPING", "Problem", "Ranking", "greedy", "lasso", "ordered", "swapped", "wanda"]
