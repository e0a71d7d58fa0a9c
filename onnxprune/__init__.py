"""Channel pruning of ONNX models: a smaller dense model that costs less and computes nearly the same.

>>> import onnxprune
>>> result = onnxprune.prune("model.onnx", speedup=2, data="calibration.npz")  # doctest: +SKIP
>>> result.save("model.pruned.onnx")  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxprune.api import Result, collect, prune, prune_family
    from onnxprune.comparison import Comparison, compare
    from onnxprune.data import Preprocessing
    from onnxprune.errors import InputError, InternalError, OnnxPruneError, UnreachableTarget
    from onnxprune.gathered import Gathered
    from onnxprune.inspection import Inspection, analyze
    from onnxprune.plan import Plan
    from onnxprune.report import Report

_WHERE = {
    "prune": "api",
    "prune_family": "api",
    "analyze": "inspection",
    "Result": "api",
    "Inspection": "inspection",
    "collect": "api",
    "Gathered": "gathered",
    "compare": "comparison",
    "Comparison": "comparison",
    "Preprocessing": "data",
    "Plan": "plan",
    "Report": "report",
    "OnnxPruneError": "errors",
    "InputError": "errors",
    "UnreachableTarget": "errors",
    "InternalError": "errors",
}

__all__ = [
    "Comparison",
    "Gathered",
    "InputError",
    "Inspection",
    "InternalError",
    "OnnxPruneError",
    "Plan",
    "Preprocessing",
    "Report",
    "Result",
    "UnreachableTarget",
    "analyze",
    "collect",
    "compare",
    "prune",
    "prune_family",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that the command line's help answers at once."""
    if name not in _WHERE:
        raise AttributeError(f"module 'onnxprune' has no attribute {name!r}")
    return getattr(importlib.import_module(f"onnxprune.{_WHERE[name]}"), name)
