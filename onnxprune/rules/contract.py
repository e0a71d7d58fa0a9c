"""Operators that contract an axis: convolutions and matrix products. They hold the multiply-accumulates."""

from __future__ import annotations

import re
from collections.abc import Callable

from onnxprune.axes import Refusal, Relation, parse
from onnxprune.rules.base import EITHER, Clauses, Kept, OpView, Repair, Row, Table, add, broadcast

_FUSED_OF_ZERO = {"", "relu", "tanh", "leakyrelu"}  # activations of fused operators that map zero to zero


def _contracted(op: OpView, letter: str, *operands: int) -> str:
    """The letter that is summed over: taken out exactly with a stored weight, else only where an operand is zero."""
    return letter if any(op.constant[k] for k in operands) else f"~{letter}"


def _conv(op: OpView) -> Relation | Refusal:
    """`n (g c) *, (g o) c *, (g o) -> n (g o) *`"""
    c = _contracted(op, "c", 1)
    return parse(f"n (g {c}) *, (g o) {c} *, (g o) -> n (g o) *")


def _conv_transpose(op: OpView) -> Relation | Refusal:
    """`n (g c) *, (g c) o *, (g o) -> n (g o) *`"""
    c = _contracted(op, "c", 1)
    return parse(f"n (g {c}) *, (g {c}) o *, (g o) -> n (g o) *")


def _group(op: OpView) -> dict[str, int]:
    return {"g": int(op.attributes.get("group", 1))}


def mend_group(op: OpView, kept: Kept) -> Repair:
    """Whole groups went where input and output are narrower, and the weight is not within a group."""
    group = int(op.attributes.get("group", 1))
    whole = kept.inputs[0][1] is not None and kept.outputs[0][1] is not None and kept.inputs[1][1] is None
    if group == 1 or not whole:
        return Repair()
    per_group = op.in_shape(0)[1] // group
    return Repair(attributes={"group": kept.in_size(op, 0, 1) // per_group})


def _gemm(op: OpView) -> Relation | Refusal:
    """`m k, n k, n -> m n`, or transposed"""
    k = _contracted(op, "k", 0, 1)
    a = f"{k} m" if op.attributes.get("transA", 0) else f"m {k}"
    b = f"n {k}" if op.attributes.get("transB", 0) else f"{k} n"
    c = broadcast([op.in_shape(2)], op.out_shape())[0].replace("a0", "m").replace("a1", "n") if op.has(2) else ""
    return parse(f"{a}, {b}, {c} -> m n")


def _matmul(op: OpView) -> Relation | Refusal:
    """`... m k, ... k n -> ... m n`"""
    left, right, out = op.in_shape(0), op.in_shape(1), op.out_shape()
    k = _contracted(op, "k", 0, 1)
    m, n = ("" if len(shape) == 1 else letter for shape, letter in ((left, "m"), (right, "n")))
    batch = out[: len(out) - bool(m) - bool(n)]
    one, two = broadcast([left[:-2], right[:-2]], batch)
    names = " ".join(f"a{i}" for i in range(len(batch)))
    return parse(f"{one} {m} {k}, {two} {k} {n} -> {names} {m} {n}")


def _fused_conv(op: OpView) -> Relation | Refusal:
    """`n (g c) *, (g o) c *, (g o), n (g o) * -> n (g o) *`"""
    c = _contracted(op, "c", 1)
    return parse(f"n (g {c}) *, (g o) {c} *, (g o), n (g o) * -> n (g o) *")


def _fused_of_zero(clauses: Clauses) -> Callable[[OpView], Clauses]:
    """The clauses of the layer, where the activation that is fused into it maps zero to zero."""

    def zero(op: OpView) -> Clauses:
        name = op.attributes.get("activation", b"")
        name = name.decode() if isinstance(name, bytes) else str(name)
        return clauses if name.lower() in _FUSED_OF_ZERO else ()

    return zero


def _fused_matmul(op: OpView) -> Relation | Refusal:
    """`... m k, ... k n -> ... m n`, or transposed"""
    if op.attributes.get("transBatchA", 0) or op.attributes.get("transBatchB", 0):
        return Refusal(f"{op.op} with transposed batches")
    left, right = list(op.in_shape(0)), list(op.in_shape(1))
    if len(left) < 2 or len(right) < 2:
        return _matmul(op)
    batch = op.out_shape()[:-2]
    one, two = broadcast([tuple(left[:-2]), tuple(right[:-2])], batch)
    k = _contracted(op, "k", 0, 1)
    a = f"{k} m" if op.attributes.get("transA", 0) else f"m {k}"
    b = f"n {k}" if op.attributes.get("transB", 0) else f"{k} n"
    return parse(f"{one} {a}, {two} {b} -> {' '.join(f'a{i}' for i in range(len(batch)))} m n")


def _einsum(op: OpView) -> Relation | Refusal:
    """The equation itself; a letter that the output lacks is summed over."""
    equation = op.attributes["equation"]
    equation = (equation.decode() if isinstance(equation, bytes) else str(equation)).replace(" ", "")
    left, arrow, result = equation.partition("->")
    words = left.split(",")
    if not arrow:  # the letters that occur once, in alphabetical order
        once = sorted(x for x in set(left) - set(",.") if left.count(x) == 1)
        result = ("..." if "..." in left else "") + "".join(once)
    extra = len(op.out_shape()) - len(result.replace("...", "")) if "..." in result else 0
    if "..." in left and "..." not in result:
        return Refusal(f"Einsum {equation!r} sums over its ellipsis")
    made = set(result) - {"."}

    def axes(word: str, shape: tuple[int, ...] | None) -> str | None:
        names: list[str] = []
        for part in re.findall(r"\.\.\.|.", word):
            if part == "...":
                count = len(shape or op.out_shape()) - len(word.replace("...", ""))
                names += [f"e{k}" for k in range(extra - count, extra)]
            else:
                names.append(f"{'l' if part.islower() else 'u'}_{part.lower()}")
        if len(set(names)) != len(names):
            return None  # a diagonal
        out = []
        for k, name in enumerate(names):
            own = name[2:].upper() if name[0] == "u" else name[2:]
            summed = name[0] != "e" and own not in made
            fixed = any(own in other and op.constant[j] for j, other in enumerate(words))
            size = (shape or op.out_shape())[k]
            out.append("1" if size == 1 else f"~{name}" if summed and not fixed else name)
        return " ".join(out)

    operands = [axes(word, op.in_shape(k)) for k, word in enumerate(words)]
    output = axes(result, None)
    if output is None or any(o is None for o in operands):
        return Refusal(f"Einsum {equation!r} takes a diagonal")
    return parse(f"{', '.join(o or '' for o in operands)} -> {output}")


def _any_operand(op: OpView) -> Clauses:
    return tuple((k,) for k in range(len(op.in_sizes)))


def register(table: Table) -> None:
    """Add the rows of this file."""
    # an output channel is zero where its weights and its bias are
    add(table, "Conv", Row(_conv, repair=mend_group, sizes=_group, weights=(1, 2), zero=((1, 2),)))
    add(table, "ConvTranspose", Row(_conv_transpose, repair=mend_group, sizes=_group, weights=(1, 2), zero=((1, 2),)))
    add(table, "Gemm", Row(_gemm, weights=(0, 1, 2), zero=((0, 2), (1, 2))))
    add(table, "MatMul", Row(_matmul, weights=(0, 1), zero=EITHER))
    add(table, "Einsum", Row(_einsum, since=12, weights=(0, 1, 2), zero=_any_operand))
    # what onnxruntime's optimizer writes
    ms = "com.microsoft"
    silent = _fused_of_zero(((1, 2, 3),))
    add(table, "FusedConv", Row(_fused_conv, repair=mend_group, sizes=_group, weights=(1, 2), zero=silent), domain=ms)
    add(table, "FusedGemm", Row(_gemm, weights=(0, 1, 2), zero=_fused_of_zero(((0, 2), (1, 2)))), domain=ms)
    add(table, "FusedMatMul TransposeMatMul", Row(_fused_matmul, weights=(0, 1), zero=EITHER), domain=ms)
