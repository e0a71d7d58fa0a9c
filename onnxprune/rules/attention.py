"""Attention in one operator, of the default domain and of onnxruntime's. Heads go whole; so do head dimensions."""

from __future__ import annotations

import math

import numpy as np

from onnxprune.axes import Refusal, Relation, parse
from onnxprune.rules.base import FIRST, Clauses, Kept, OpView, Repair, Row, Table, add

MS = "com.microsoft"


def _mask(op: OpView, k: int, heads: str = "(k r)") -> str:
    """A mask or a bias on the scores, aligned at the right with their axes."""
    if not op.has(k):
        return ""
    shape = op.in_shape(k)
    names = ["b", heads, "s", "!t"][4 - len(shape) :]
    return " ".join("1" if size == 1 else name for size, name in zip(shape, names, strict=True))


def _attention(op: OpView) -> Relation | Refusal:
    """`b s (k r ~d), b !t (k ~d), b !t (k v) -> b s (k r v)`, or with four axes; without a cache"""
    if any(op.has(k) for k in range(4, 7)) or any(s is not None for s in op.out_sizes[1:]):
        return Refusal("Attention with a cache of past keys; export the model without one")
    s = "!s" if op.attributes.get("is_causal", 0) else "s"
    if len(op.in_shape(0)) == 4:
        text = f"b (k r) {s} ~d, b k !t ~d, b k !t v, {_mask(op, 3)} -> b (k r) {s} v"
    else:
        text = f"b {s} (k r ~d), b !t (k ~d), b !t (k v), {_mask(op, 3)} -> b {s} (k r v)"
    return parse(text)


def _heads(op: OpView) -> tuple[int, int]:
    """Heads of the queries, and of the keys and values."""
    if len(op.in_shape(0)) == 4:
        return op.in_shape(0)[1], op.in_shape(1)[1]
    return int(op.attributes["q_num_heads"]), int(op.attributes["kv_num_heads"])


def _attention_sizes(op: OpView) -> dict[str, int]:
    queries, keys = _heads(op)
    return {"k": keys, "r": queries // keys}


def _left(op: OpView, kept: Kept, k: int, heads: int) -> int:
    """How many heads are left of those side by side on the last axis of an operand."""
    left = kept.inputs[k][-1]
    return heads if left is None else len(np.unique(left // (op.in_shape(k)[-1] // heads)))


def _mend_attention(op: OpView, kept: Kept) -> Repair:
    """Numbers of heads, scale."""
    queries, keys = _heads(op)
    if len(op.in_shape(0)) == 4:
        return Repair(attributes={"scale": _scale(op, op.in_shape(0)[-1])})
    return Repair(
        attributes={
            "q_num_heads": _left(op, kept, 0, queries),
            "kv_num_heads": _left(op, kept, 1, keys),
            "scale": _scale(op, op.in_shape(0)[-1] // queries),
        }
    )


def _scale(op: OpView, size: int) -> float:
    """The scale stays what it was, whatever becomes of the head size that it is taken from by default."""
    return float(op.attributes.get("scale") or 1 / math.sqrt(size))


def _of_values(op: OpView) -> Clauses:
    return ((2,),)


def _packed_attention(op: OpView) -> Relation | Refusal:
    """`b !s i, i (!p h !d), (!p h !d) -> b !s (h !d)`, without a cache"""
    if any(op.has(k) for k in (4, 5, 6)) or any(s is not None for s in op.out_sizes[1:]):
        return Refusal("com.microsoft.Attention with a cache of past keys or a bias on the scores")
    if op.attributes.get("do_rotary", 0) or op.attributes.get("qkv_hidden_sizes"):
        return Refusal("com.microsoft.Attention with rotary embeddings or uneven sizes of q, k and v")
    i = "i" if op.constant[1] else "~i"
    return parse(f"b !s {i}, {i} (!p h !d), (!p h !d), * -> b !s (h !d)")


def _packed_sizes(op: OpView) -> dict[str, int]:
    return {"p": 3, "h": int(op.attributes["num_heads"])}


def _mend_packed(op: OpView, kept: Kept) -> Repair:
    """The number of heads."""
    heads = int(op.attributes["num_heads"])
    size = op.out_shape()[-1] // heads
    return Repair(attributes={"num_heads": kept.out_size(op, 0, 2) // size})


def _multi_head_attention(op: OpView) -> Relation | Refusal:
    """`b s (k ~d), b !t (k ~d), b !t (k v) -> b s (k v)`, with a bias whole heads only; without a cache"""
    if not op.has(1) or not op.has(2) or len(op.in_shape(1)) != 3 or len(op.in_shape(2)) != 3:
        return Refusal("MultiHeadAttention with packed keys and values")
    if any(op.has(k) for k in range(6, 10)) or any(s is not None for s in op.out_sizes[1:]):
        return Refusal("MultiHeadAttention with a cache of past keys; export the model without one")
    s = "!s" if op.attributes.get("unidirectional", 0) else "s"
    if op.has(3):  # those of queries, keys and values in a row
        if op.in_shape(0)[-1] != op.in_shape(2)[-1]:
            return Refusal("MultiHeadAttention with a bias, and values of another size than the keys")
        return parse(f"b {s} (k !d), b !t (k !d), b !t (k !d), (!p k !d), *, {_mask(op, 5, 'k')} -> b {s} (k !d)")
    return parse(f"b {s} (k ~d), b !t (k ~d), b !t (k v), , *, {_mask(op, 5, 'k')} -> b {s} (k v)")


def _multi_head_sizes(op: OpView) -> dict[str, int]:
    return {"k": int(op.attributes["num_heads"])} | ({"p": 3} if op.has(3) else {})


def _multi_head_zero(op: OpView) -> Clauses:
    return ((2, 3),) if op.has(3) else ((2,),)


def _mend_multi_head(op: OpView, kept: Kept) -> Repair:
    """The number of heads, the scale."""
    heads = int(op.attributes["num_heads"])
    return Repair(attributes={"num_heads": _left(op, kept, 0, heads), "scale": _scale(op, op.in_shape(0)[-1] // heads)})


def _rotary(op: OpView) -> Relation | Refusal:
    """`b s (h !d) -> b s (h !d)`, or with four axes"""
    heads = int(op.attributes.get("num_heads", 0))
    cache = "b s 1" if len(op.in_shape(1)) == 3 else "1 1"
    if len(op.in_shape(0)) == 4:
        return parse(f"b h s 1, {cache}, {cache}, b s -> b h s 1")
    if not heads:
        return Refusal("RotaryEmbedding that does not state its number of heads")
    return parse(f"b s (h !d), {cache}, {cache}, b s -> b s (h !d)")


def _rotary_of_microsoft(op: OpView) -> Relation | Refusal:
    """`b !s (h !d) -> b !s (h !d)`, or with four axes"""
    if len(op.in_shape(0)) == 4:
        return parse("b h !s 1, *, *, * -> b h !s 1")
    if not op.attributes.get("num_heads", 0):
        return Refusal("RotaryEmbedding that does not state its number of heads")
    return parse("b !s (h !d), *, *, * -> b !s (h !d)")


def _rotary_sizes(op: OpView) -> dict[str, int]:
    return {"h": int(op.attributes["num_heads"])} if len(op.in_shape(0)) == 3 else {}


def _mend_rotary(op: OpView, kept: Kept) -> Repair:
    """The number of heads."""
    if len(op.in_shape(0)) == 4:
        return Repair()
    heads = int(op.attributes["num_heads"])
    return Repair(attributes={"num_heads": _left(op, kept, 0, heads)})


def register(table: Table) -> None:
    """Add the rows of this file."""
    add(
        table,
        "Attention",
        Row(_attention, since=23, repair=_mend_attention, sizes=_attention_sizes, zero=_of_values),
    )
    add(table, "RotaryEmbedding", Row(_rotary, since=23, repair=_mend_rotary, sizes=_rotary_sizes))
    turned = Row(_rotary_of_microsoft, repair=_mend_rotary, sizes=_rotary_sizes, zero=FIRST)
    add(table, "RotaryEmbedding", turned, domain=MS)
    packed = Row(_packed_attention, repair=_mend_packed, sizes=_packed_sizes, weights=(1, 2), zero=((1, 2),))
    add(table, "Attention", packed, domain=MS)
    several = Row(
        _multi_head_attention,
        repair=_mend_multi_head,
        sizes=_multi_head_sizes,
        weights=(3,),
        zero=_multi_head_zero,
    )
    add(table, "MultiHeadAttention", several, domain=MS)
