"""Cases of operators that sum over an axis: convolutions, products, recurrent cells, attention, quantisation."""

from __future__ import annotations

from typing import Any

import numpy as np
from law import MS, Call, Draw, case

# ------------------------------------------------------------------------------------------------------ contractions


def _conv(d: Draw, group: int, c: int, o: int, constant: tuple[int, ...] = (1, 2)) -> Call:
    rank = d.of(1, 2)
    k = [d.int(1, 3) for _ in range(rank)]
    x = d.floats(2, group * c, *(d.int(4, 6) for _ in k))
    attributes = {"group": group, "strides": [d.int(1, 2) for _ in k], "pads": [1] * (2 * rank)}
    inputs = [x, d.floats(group * o, c, *k)] + ([d.floats(group * o)] if d.of(True, False) else [])
    return Call("Conv", inputs, attributes, tuple(i for i in constant if i < len(inputs)))


case("Conv", "dense")(lambda d: _conv(d, 1, d.int(2, 4), d.int(2, 4)))
case("Conv", "grouped")(lambda d: _conv(d, d.int(2, 3), d.int(2, 3), d.int(2, 3)))
case("Conv", "depthwise")(lambda d: _conv(d, d.int(2, 5), 1, d.int(1, 3)))
case("Conv", "computed-weights")(lambda d: _conv(d, 1, d.int(2, 4), d.int(2, 4), ()))


def _conv_transpose(d: Draw, group: int, c: int, o: int) -> Call:
    k = [d.int(1, 3), d.int(1, 3)]
    inputs = [d.floats(2, group * c, 3, 4), d.floats(group * c, o, *k)] + (
        [d.floats(group * o)] if d.of(True, False) else []
    )
    return Call("ConvTranspose", inputs, {"group": group, "strides": [d.int(1, 2), 2]}, tuple(range(1, len(inputs))))


case("ConvTranspose", "dense")(lambda d: _conv_transpose(d, 1, d.int(2, 4), d.int(2, 4)))
case("ConvTranspose", "grouped")(lambda d: _conv_transpose(d, d.int(2, 3), d.int(2, 3), d.int(2, 3)))
case("ConvTranspose", "depthwise")(lambda d: _conv_transpose(d, d.int(2, 4), 1, 1))


def _gemm(d: Draw, constant: tuple[int, ...]) -> Call:
    m, k, n = d.shape(0, 0, 0)
    ta, tb = d.int(0, 1), d.int(0, 1)
    bias = d.of(None, (n,), (1, n), (m, n), (m, 1), (1,))
    inputs = [d.floats(k, m) if ta else d.floats(m, k), d.floats(n, k) if tb else d.floats(k, n)]
    if bias:
        inputs.append(d.floats(*bias))
    return Call("Gemm", inputs, {"transA": ta, "transB": tb, "alpha": 0.5, "beta": 2.0}, constant)


case("Gemm", "weights")(lambda d: _gemm(d, (1, 2)))
case("Gemm", "activations")(lambda d: _gemm(d, ()))


def _matmul(d: Draw, kind: str) -> Call:
    b, h, m, k, n = d.shape(0, 0, 0, 0, 0)
    left, right = {
        "weights": d.of([(b, m, k), (k, n)], [(m, k), (k, n)], [(m, k), (b, k, n)]),
        "activations": d.of([(b, h, m, k), (b, h, k, n)], [(b, 1, m, k), (h, k, n)], [(1, k), (b, k, n)]),
        "vector": d.of([(k,), (b, k, n)], [(b, m, k), (k,)], [(k,), (k,)]),
    }[kind]
    return Call("MatMul", [d.floats(*left), d.floats(*right)], {}, () if kind == "activations" else (d.int(0, 1),))


for _kind in ("weights", "activations", "vector"):
    case("MatMul", _kind)(lambda d, kind=_kind: _matmul(d, kind))


# ---------------------------------------------------------------------------------------------------------- recurrent


def _recurrent(d: Draw, op: str) -> Call:
    gates = {"RNN": 1, "GRU": 3, "LSTM": 4}[op]
    direction = d.of("forward", "reverse", "bidirectional")
    n = 2 if direction == "bidirectional" else 1
    s, b, i, h = d.int(3, 4), d.int(2, 3), d.int(2, 3), d.int(2, 4)
    inputs: list[np.ndarray | None] = [d.floats(s, b, i), d.floats(n, gates * h, i), d.floats(n, gates * h, h)]
    inputs.append(d.of(None, d.floats(n, 2 * gates * h)))
    inputs.append(d.of(None, d.rng.integers(1, s + 1, b).astype(np.int32)))
    inputs.append(d.of(None, d.floats(n, b, h)))
    if op == "LSTM":
        inputs += [d.of(None, d.floats(n, b, h)), d.of(None, d.floats(n, 3 * h))]
    attributes: dict[str, Any] = {"hidden_size": h, "direction": direction}
    if op == "GRU":
        attributes["linear_before_reset"] = d.int(0, 1)
    return Call(op, inputs, attributes, (1, 2, 3, 7), 3 if op == "LSTM" else 2)


for _op in ("RNN", "GRU", "LSTM"):
    case(_op)(lambda d, op=_op: _recurrent(d, op))


# ------------------------------------------------------------------------------------------------------ more products

EQUATIONS = {
    "weights": ("btd,dhe->bthe", (1,)), "left": ("oc,bct->bot", (0,)), "attention": ("bhqd,bhkd->bhqk", ()),
    "implicit": ("ij,jk", (1,)), "ellipsis": ("...d,de->...e", (1,)), "capital": ("Bhd,dK->BhK", (1,)),
    "outer": ("i,j->ij", ()), "three": ("bi,ij,jk->bk", (1, 2)),
}  # fmt: skip


def _einsum(d: Draw, equation: str, constant: tuple[int, ...]) -> Call:
    sizes = {x: d.int(2, 4) for x in sorted(set(equation) - set(",.->"))}
    shapes = [[sizes[x] for x in word.replace("...", "")] for word in equation.split("->")[0].split(",")]
    if "..." in equation:
        shapes[0] = [2, 3, *shapes[0]]
    return Call("Einsum", [d.floats(*shape) for shape in shapes], {"equation": equation}, constant)


for _name, (_equation, _constant) in EQUATIONS.items():
    case("Einsum", _name)(lambda d, e=_equation, c=_constant: _einsum(d, e, c))


@case("FusedConv", domain=MS)
def _(d: Draw) -> Call:
    call = _conv(d, d.int(1, 3), d.int(2, 3), d.int(2, 3))
    inputs = [call.inputs[0], call.inputs[1], d.floats(call.inputs[1].shape[0])]
    call = Call("FusedConv", inputs, call.attributes | {"activation": "Relu"}, (1, 2), domain=MS)
    if d.of(True, False):
        call.inputs.append(d.floats(*call.run()[0].shape))
    return call


@case("FusedGemm", domain=MS)
def _(d: Draw) -> Call:
    call = _gemm(d, (1, 2))
    return Call("FusedGemm", call.inputs, call.attributes | {"activation": "Relu"}, (1, 2), domain=MS)


for _op in ("FusedMatMul", "TransposeMatMul"):

    @case(_op, domain=MS)
    def _(d: Draw, op: str = _op) -> Call:
        b, m, k, n = d.shape(0, 0, 0, 0)
        ta, tb = d.int(0, 1), d.int(0, 1)
        inputs = [d.floats(b, k, m) if ta else d.floats(b, m, k), d.floats(n, k) if tb else d.floats(k, n)]
        return Call(op, inputs, {"transA": ta, "transB": tb, "alpha": 0.5}, d.of((), (1,)), domain=MS)


for _op in ("Gelu", "QuickGelu"):
    case(_op, domain=MS)(lambda d, op=_op: Call(op, [d.floats(*d.shape(0, 0, 0))], domain=MS))
for _op in ("BiasGelu", "FastGelu"):

    @case(_op, domain=MS)
    def _(d: Draw, op: str = _op) -> Call:
        a, b, c = d.shape(0, 0, 0)
        return Call(op, [d.floats(a, b, c), d.floats(c)], {}, (1,), domain=MS)


# --------------------------------------------------------------------------------------------------------- attention


@case("Attention")
def _(d: Draw) -> Call:
    b, k, r, s, t, e, v = d.shape(0, 0, 0, 0, 0, 0, 0)
    causal = {"is_causal": d.int(0, 1)} if s == t else {}
    mask = d.of(None, d.floats(s, t), d.floats(b, k * r, s, t))
    if d.of(True, False):
        inputs = [d.floats(b, k * r, s, e), d.floats(b, k, t, e), d.floats(b, k, t, v)]
        return Call("Attention", [*inputs, mask], causal, (), 1, 23)
    inputs = [d.floats(b, s, k * r * e), d.floats(b, t, k * e), d.floats(b, t, k * v)]
    heads = {"q_num_heads": k * r, "kv_num_heads": k}
    return Call("Attention", [*inputs, mask], causal | heads, (), 1, 23)


@case("RotaryEmbedding")
def _(d: Draw) -> Call:
    b, h, s, e = d.shape(0, 0, 0, 4)
    caches = [d.floats(8, 2), d.floats(8, 2)]
    if d.of(True, False):
        caches = [d.floats(b, s, 2), d.floats(b, s, 2)]
        return Call("RotaryEmbedding", [d.floats(b, h, s, e), *caches], {}, (), 1, 23)
    positions = d.rng.integers(0, 8, (b, s)).astype(np.int64)
    return Call("RotaryEmbedding", [d.floats(b, s, h * e), *caches, positions], {"num_heads": h}, (), 1, 23)


@case("RotaryEmbedding", domain=MS)
def _(d: Draw) -> Call:
    b, h, s, e = d.shape(0, 0, 0, 4)
    more = [np.array([0], np.int64), d.floats(8, 2), d.floats(8, 2)]
    if d.of(True, False):
        return Call("RotaryEmbedding", [d.floats(b, h, s, e), *more], {}, (1, 2, 3), domain=MS)
    return Call("RotaryEmbedding", [d.floats(b, s, h * e), *more], {"num_heads": h}, (1, 2, 3), domain=MS)


@case("Attention", domain=MS)
def _(d: Draw) -> Call:
    b, s, i, h, e = d.shape(0, 0, 0, 0, 0)
    inputs = [d.floats(b, s, i), d.floats(i, 3 * h * e), d.floats(3 * h * e)]
    return Call("Attention", inputs, {"num_heads": h}, (1, 2), domain=MS)


@case("MultiHeadAttention", domain=MS)
def _(d: Draw) -> Call:
    b, s, t, h, e = d.shape(0, 0, 0, 0, 0)
    inputs: list[np.ndarray | None] = [d.floats(b, s, h * e), d.floats(b, t, h * e), d.floats(b, t, h * e)]
    if d.of(True, False):
        inputs += [None, None, d.of(d.floats(b, h, s, t), d.floats(1, 1, s, t))]
    return Call("MultiHeadAttention", inputs, {"num_heads": h}, (), domain=MS)


@case("MultiHeadAttention", "bias", domain=MS)
def _(d: Draw) -> Call:
    b, s, t, h, e = d.shape(0, 0, 0, 0, 0)
    inputs = [d.floats(b, s, h * e), d.floats(b, t, h * e), d.floats(b, t, h * e), d.floats(3 * h * e)]
    return Call("MultiHeadAttention", inputs, {"num_heads": h}, (3,), domain=MS)


# ----------------------------------------------------------------------------------------------------- quantisation


def _quantised(d: Draw, op: str, domain: str) -> Call:
    shape = d.shape(0, 0, 0)
    axis = d.int(-3, 2)
    scale, point = d.of(((), ()), ((shape[axis],), (shape[axis],)), ((), None), ((shape[axis],), None))
    x = d.floats(*shape) if op == "QuantizeLinear" else d.rng.integers(0, 255, shape).astype(np.uint8)
    inputs: list[np.ndarray | None] = [x, d.floats(*scale, positive=True) / np.float32(20)]
    inputs[1] = np.asarray(inputs[1], np.float32)
    if point is not None or domain:
        inputs.append(np.asarray(d.rng.integers(100, 120, scale), np.uint8))
    attributes = {"axis": axis} if scale else {}
    return Call(op, inputs, attributes, (1, 2), domain=domain)


for _op in ("QuantizeLinear", "DequantizeLinear"):
    for _domain in ("", MS):
        case(_op, domain=_domain)(lambda d, op=_op, domain=_domain: _quantised(d, op, domain))


@case("DequantizeLinear", "blocks")
def _(d: Draw) -> Call:
    shape, axis = list(d.shape(0, 0)), d.int(0, 1)
    blocks = list(shape)
    shape[axis] *= 4
    x = d.rng.integers(-100, 100, shape).astype(np.int8)
    inputs = [x, d.floats(*blocks, positive=True), d.rng.integers(-5, 5, blocks).astype(np.int8)]
    return Call("DequantizeLinear", inputs[: d.int(2, 3)], {"axis": axis, "block_size": 4}, (1, 2), opset=21)
