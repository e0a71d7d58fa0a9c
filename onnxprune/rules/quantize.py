"""QuantizeLinear and DequantizeLinear: element by element, with scales and zero points per tensor or per axis."""

from __future__ import annotations

from onnxprune.axes import Refusal, Relation
from onnxprune.rules.base import FIRST, OpView, Row, Table, add, letters, relate


def _quantize(op: OpView) -> Relation | Refusal:
    """The same axes; scales and zero points per tensor, along their axis, or per block of an axis, which stays."""
    names = letters(op.in_shape(0))
    scale = op.in_shape(1)
    if op.attributes.get("block_size", 0):
        names[op.axis(1)] = "1"
        text = " ".join(names)
        return relate([text, text, text if op.has(2) else ""], [text])
    if len(scale) > 1:
        return Refusal(f"{op.op} with a scale of several axes; quantise per tensor or per axis")
    along = ""
    if scale:
        along = "1" if scale[0] == 1 else names[op.axis(1)]
    text = " ".join(names)
    return relate([text, along, along if op.has(2) and op.in_shape(2) else ""], [text])


def register(table: Table) -> None:
    """Add the rows of this file."""
    for domain in ("", "com.microsoft"):
        add(table, "QuantizeLinear", Row(_quantize, zero=FIRST), domain=domain)
        add(table, "DequantizeLinear", Row(_quantize, weights=(0,), zero=FIRST), domain=domain)
