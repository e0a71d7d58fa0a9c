"""LSTM, GRU and RNN: a hidden unit is a row of every gate, and a column of the recurrent weights."""

from __future__ import annotations

import numpy as np

from onnxprune.axes import Refusal, Relation, parse
from onnxprune.rules.base import Clauses, Kept, OpView, Repair, Row, Table, add

_OF_ZERO = {"tanh", "relu", "affine", "leakyrelu", "scaledtanh", "elu", "softsign", "thresholdedrelu"}  # f(0) = 0


def _recurrent(op: OpView) -> Relation | Refusal:
    """`s b i, d (!g h) i, d (!g h) h, d (!e h), b, d b h, d b h, d (!p h) -> !s !d b h, d b h, d b h`"""
    if op.attributes.get("layout", 0):
        return Refusal(f"{op.op} with the batch first (layout=1), which onnxruntime does not run; export with layout=0")
    i = "i" if op.constant[1] else "~i"
    state = "d b h"
    text = f"s b {i}, d (!g h) {i}, d (!g h) h, d (!e h), b, {state}, {state}, d (!p h) -> !s !d b h, {state}, {state}"
    return parse(text)


def _activations(op: OpView) -> list[str]:
    given = op.attributes.get("activations") or []
    return [(a.decode() if isinstance(a, bytes) else str(a)).lower() for a in given]


def _zero(op: OpView) -> Clauses:
    """A silenced unit stays at zero where it starts there, and its candidate activation maps zero to zero."""
    per_direction = {"RNN": 1, "GRU": 2, "LSTM": 3}[op.op]
    candidates = [a for k, a in enumerate(_activations(op)) if k % per_direction or per_direction == 1]
    starts = [op.value(k) for k in (5, 6) if op.has(k)]
    if not set(candidates) <= _OF_ZERO or any(v is None or np.any(v) for v in starts):
        return ()
    if "affine" in candidates and any(op.attributes.get("activation_beta", ())):
        return ()
    return ((1, 2, 3),)


def _mend(op: OpView, kept: Kept) -> Repair:
    """The hidden size."""
    return Repair(attributes={"hidden_size": kept.in_size(op, 2, 2)})


def register(table: Table) -> None:
    """Add the rows of this file."""
    add(table, "GRU LSTM RNN", Row(_recurrent, repair=_mend, weights=(1, 2, 3), zero=_zero))
