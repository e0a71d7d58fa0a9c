"""The table of operators: what each says about the axes of its operands, and how it is repaired.

One row per (domain, operator) and opset range. A row is a specification in the notation of `onnxprune.axes`, or a pure
function from an `OpView` to a `Relation` or a `Refusal`. A row never sees a neighbour and never changes anything.
"""

from __future__ import annotations

from onnxprune.rules import (
    attention,
    contract,
    movement,
    normalize,
    pointwise,
    quantize,
    recurrent,
    refused,
    scatter,
    turns,
)
from onnxprune.rules.base import TABLE, Kept, OpView, Repair, Row, describe, refusal

__all__ = ["TABLE", "Kept", "OpView", "Repair", "Row", "describe", "refusal"]

for _module in (contract, pointwise, movement, normalize, scatter, recurrent, attention, quantize, refused, turns):
    _module.register(TABLE)
