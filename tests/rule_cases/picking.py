"""Cases of operators that pick elements and place them."""

from __future__ import annotations

import numpy as np
import onnx
from law import Call, Draw, case
from onnx import helper

# ---------------------------------------------------------------------------------------------- picking and placing


for _op in ("CumSum", "CumProd"):

    @case(_op)
    def _(d: Draw, op: str = _op) -> Call:
        options = {"exclusive": d.int(0, 1), "reverse": d.int(0, 1)}
        x = d.floats(*d.shape(0, 0, 0))
        return Call(op, [x, np.array(d.int(-1, 2))], options, (1,), 1, 26 if op == "CumProd" else 17)


for _op in ("ArgMax", "ArgMin"):

    @case(_op)
    def _(d: Draw, op: str = _op) -> Call:
        options = {"axis": d.int(-1, 2), "keepdims": d.int(0, 1)}
        return Call(op, [d.floats(*d.shape(0, 0, 0, low=3))], options)


@case("TopK")
def _(d: Draw) -> Call:
    x = d.floats(*d.shape(0, 0, 0, low=3))
    return Call("TopK", [x, np.array([2], np.int64)], {"axis": d.int(-1, 2)}, (1,), 2)


@case("Compress", "stored")
def _(d: Draw) -> Call:
    shape, axis = d.shape(0, 0, 0, low=3), d.int(0, 2)
    condition = np.array([d.of(True, False) for _ in range(d.int(2, shape[axis]))] + [True])[: shape[axis]]
    condition[d.int(0, len(condition) - 1)] = True
    return Call("Compress", [d.floats(*shape), condition], {"axis": axis}, (1,))


@case("Compress", "given")
def _(d: Draw) -> Call:
    return Call("Compress", [d.floats(*d.shape(0, 0, 0, low=3)), np.array([True, False, True])], {"axis": d.int(-3, 2)})


@case("Compress", "flat")
def _(d: Draw) -> Call:
    return Call("Compress", [d.floats(*d.shape(0, 0, low=3)), np.array([True, False, True, True])], {}, (1,))


@case("GatherElements")
def _(d: Draw) -> Call:
    a, b, c = d.shape(0, 0, 0)
    axis = d.int(0, 2)
    shape = [a, b, c]
    size = shape[axis]
    shape[axis] = d.int(2, 5)
    index = d.rng.integers(0, size, shape)
    return Call("GatherElements", [d.floats(a, b, c), index], {"axis": axis})


for _op in ("ScatterElements", "Scatter"):

    @case(_op)
    def _(d: Draw, op: str = _op) -> Call:
        a, b, c = d.shape(0, 0, 0)
        axis = d.int(0, 2)
        index = np.argsort(d.rng.random((a, b, c)), axis=axis)  # no place is written to twice
        data, updates = d.floats(a, b, c), d.floats(a, b, c)
        return Call(op, [data, index, updates], {"axis": axis}, (), 1, 9 if op == "Scatter" else 17)


@case("GatherND")
def _(d: Draw) -> Call:
    a, b, c, e = d.shape(0, 0, 0, 0)
    batch, depth = d.of((0, 1), (0, 2), (1, 1))
    inner = [a, b, c][batch : batch + depth]
    shape = [a, e] if batch else [e, 2]
    index = np.stack([d.rng.integers(0, size, shape) for size in inner], axis=-1)
    return Call("GatherND", [d.floats(a, b, c), index], {"batch_dims": batch})


@case("ScatterND")
def _(d: Draw) -> Call:
    a, b, c = d.shape(0, 0, 0)
    depth = d.int(1, 2)
    index = np.stack([d.rng.permutation(a)[:2]] * depth, axis=-1) % min(a, b)
    index = np.unique(index, axis=0)
    updates = d.floats(len(index), *([a, b, c][depth:]))
    return Call("ScatterND", [d.floats(a, b, c), index, updates])


@case("ScatterND", "block")
def _(d: Draw) -> Call:
    a, b, c = d.shape(0, 0, 0)
    rows = [np.arange(a), np.arange(d.int(1, b - 1), b), np.arange(c)][: d.int(2, 3)]
    index = np.stack(np.meshgrid(*rows, indexing="ij"), axis=-1)
    updates = d.floats(*index.shape[:-1], *([c] if len(rows) == 2 else []))
    return Call("ScatterND", [d.floats(a, b, c), index, updates], {}, (1,))


@case("OneHot")
def _(d: Draw) -> Call:
    index = d.rng.integers(0, 3, d.shape(0, 0))
    return Call("OneHot", [index, np.array(3), np.array([0.0, 1.0], np.float32)], {"axis": d.int(-1, 2)}, (1, 2))


@case("ReverseSequence")
def _(d: Draw) -> Call:
    a, b, c = d.shape(0, 0, 0, low=3)
    time, batch = d.of((0, 1), (1, 0))
    lengths = d.rng.integers(2, (a, b)[time] + 1, (a, b)[batch])
    return Call("ReverseSequence", [d.floats(a, b, c), lengths], {"time_axis": time, "batch_axis": batch})


@case("Trilu")
def _(d: Draw) -> Call:
    return Call("Trilu", [d.floats(*d.shape(0, 0, 0, low=3))], {"upper": d.int(0, 1)})


@case("Det")
def _(d: Draw) -> Call:
    return Call("Det", [d.floats(*d.shape(0, 0), 3, 3)])


@case("GridSample")
def _(d: Draw) -> Call:
    n, c = d.shape(0, 0)
    return Call("GridSample", [d.floats(n, c, 4, 5), d.floats(n, 3, 2, 2)])


@case("RoiAlign")
def _(d: Draw) -> Call:
    c, r = d.shape(0, 0)
    start = d.rng.uniform(0, 3, (r, 2))
    rois = np.concatenate([start, start + d.rng.uniform(1, 4, (r, 2))], 1).astype(np.float32)
    options = {"output_height": 2, "output_width": 3, "mode": d.of("avg", "max"), "sampling_ratio": 2}
    return Call("RoiAlign", [d.floats(2, c, 8, 8), rois, d.rng.integers(0, 2, r)], options)


@case("MaxRoiPool")
def _(d: Draw) -> Call:
    c, r = d.shape(0, 0)
    start = d.rng.integers(0, 3, (r, 2))
    corners = [d.rng.integers(0, 2, (r, 1)), start, start + d.rng.integers(1, 4, (r, 2))]
    rois = np.concatenate(corners, 1).astype(np.float32)
    return Call("MaxRoiPool", [d.floats(2, c, 8, 8), rois], {"pooled_shape": [2, 2]})


@case("Col2Im")
def _(d: Draw) -> Call:
    n, c = d.shape(0, 0)
    inputs = [d.floats(n, c * 4, 4), np.array([4, 4]), np.array([2, 2])]
    return Call("Col2Im", inputs, {"strides": [2, 2]}, (1, 2), 1, 18)


@case("DeformConv")
def _(d: Draw) -> Call:
    g, c, o = d.int(1, 3), d.int(2, 3), d.int(2, 3)
    inputs = [d.floats(2, g * c, 4, 4), d.floats(g * o, c, 3, 3), d.floats(2, 18, 4, 4), d.floats(g * o)]
    return Call("DeformConv", inputs, {"group": g, "pads": [1] * 4}, (1, 3), 1, 19)


@case("ConstantOfShape")
def _(d: Draw) -> Call:
    value = helper.make_tensor("v", onnx.TensorProto.FLOAT, [1], [2.0])
    return Call("ConstantOfShape", [np.array(d.shape(0, 0, 0))], {"value": value}, (0,))
