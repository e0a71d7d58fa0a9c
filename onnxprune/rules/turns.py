"""Loops that are laid open: what a state is before and after a turn, it is before the first and after the last."""

from __future__ import annotations

from onnxprune.axes import Refusal, Relation
from onnxprune.rules.base import BODY, TURN, OpView, Row, Sizes, Table, add, relate


def _loop(op: OpView) -> Relation | Refusal:
    """States have the same axes before and after every turn; outputs that are put together have one in front."""
    return _turns(op, leading=2, scanned=())


def _scan(op: OpView) -> Relation | Refusal:
    """As of a Loop; what is scanned has one axis more than what a turn gets."""
    count = int(op.attributes["num_scan_inputs"])
    axes = op.attributes.get("scan_input_axes", [0] * count)
    return _turns(op, leading=0, scanned=tuple(int(axis) for axis in axes))


def _turns(op: OpView, leading: int, scanned: tuple[int, ...]) -> Relation | Refusal:
    if TURN not in op.attributes:
        return Refusal(f"{op.op} {BODY}")
    inputs, given = op.attributes[TURN]
    states = inputs - leading - len(scanned)
    first, last = inputs, inputs + given  # operands: what the node gets, what a turn gets, what a turn gives
    ins, outs = ["*" for _ in op.in_sizes], ["*" for _ in op.out_sizes]
    ends = last + (1 if leading else 0)
    for k in range(states):
        places = [leading + k, first + leading + k, ends + k]
        operands = [op.in_sizes[p] for p in places]
        text = _alike(f"s{k}x", [*operands, op.out_sizes[k]])
        for place in places:
            ins[place] = text
        outs[k] = text
    for k, axis in enumerate(scanned):
        place, whole = first + leading + states + k, op.in_sizes[leading + states + k]
        if whole is not None:
            axis %= len(whole)
            rest = [*whole[:axis], *whole[axis + 1 :]]
            ins[place] = _alike(f"i{k}x", [rest, op.in_sizes[place]])
            ins[leading + states + k] = _with_one(ins[place], axis)
    axes = op.attributes.get("scan_output_axes", []) if not leading else []
    for k in range(len(op.in_sizes) - ends - states):
        made, whole = op.in_sizes[ends + states + k], op.out_sizes[states + k]
        if made is not None and whole is not None:
            axis = int(axes[k]) % len(whole) if k < len(axes) else 0
            ins[ends + states + k] = _alike(f"o{k}x", [made, [*whole[:axis], *whole[axis + 1 :]]])
            outs[states + k] = _with_one(ins[ends + states + k], axis)
    return relate(ins, outs)


def _alike(prefix: str, operands: list[Sizes | None]) -> str:
    """A letter for every axis that is as long in all operands; nothing where their ranks differ."""
    known = [sizes for sizes in operands if sizes is not None]
    if len(known) < len(operands) or len({len(sizes) for sizes in known}) > 1:
        return "*"
    return " ".join(
        f"{prefix}{axis}" if all(sizes[axis] == known[0][axis] for sizes in known) else "1"
        for axis in range(len(known[0]))
    )


def _with_one(text: str, axis: int) -> str:
    """The operand with one more axis, which stays."""
    words = text.split()
    return text if text == "*" else " ".join([*words[:axis], "1", *words[axis:]])


def register(table: Table) -> None:
    """Add the rows of this file."""
    add(table, "Loop", Row(_loop))
    add(table, "Scan", Row(_scan))
