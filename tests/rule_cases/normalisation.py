"""Cases of normalisations, softmax and reductions."""

from __future__ import annotations

import numpy as np
from law import MS, Call, Draw, case

# --------------------------------------------------------------------------------------------------- normalisations


@case("BatchNormalization")
def _(d: Draw) -> Call:
    n, c, h = d.shape(0, 0, 0)
    vectors = [d.floats(c), d.floats(c), d.floats(c), d.floats(c, positive=True)]
    return Call("BatchNormalization", [d.floats(*d.of((n, c, h), (n, c), (n, c, h, 2))), *vectors], {}, (1, 2, 3, 4))


@case("InstanceNormalization")
def _(d: Draw) -> Call:
    n, c = d.shape(0, 0)
    return Call("InstanceNormalization", [d.floats(n, c, 4, 3), d.floats(c), d.floats(c)], {}, (1, 2))


@case("LayerNormalization")
def _(d: Draw) -> Call:
    a, b, c = d.shape(0, 0, 0)
    axis = d.of(-1, 2, 1)
    shape = (b, c) if axis == 1 else (c,)
    return Call("LayerNormalization", [d.floats(a, b, c), d.floats(*shape), d.floats(*shape)], {"axis": axis}, (1, 2))


for _op in ("Softmax", "LogSoftmax", "Hardmax"):
    case(_op)(lambda d, op=_op: Call(op, [d.floats(*d.shape(0, 0, 0))], {"axis": d.int(-2, 2)}))
    case(_op, "old")(lambda d, op=_op: Call(op, [d.floats(*d.shape(0, 0, 0))], {"axis": 1}, (), 1, 11))

for _op in [
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSum",
    "ReduceSumSquare",
]:

    @case(_op)
    def _(d: Draw, op: str = _op) -> Call:
        x = d.floats(*d.shape(0, 0, 0, low=3), positive=op == "ReduceLogSum")
        axes = d.of([1], [0, 2], [-1], [])
        keep = {"keepdims": d.int(0, 1)}
        opset = d.of(11, 18)
        if opset == 18 or op == "ReduceSum":
            return Call(op, [x, np.array(axes, np.int64)], keep, (1,), 1, 18)
        return Call(op, [x], keep | ({"axes": axes} if axes else {}), (), 1, opset)


for _op in ("AveragePool", "LpPool", "MaxPool"):

    @case(_op)
    def _(d: Draw, op: str = _op) -> Call:
        return Call(op, [d.floats(*d.shape(0, 0), 5, 6)], {"kernel_shape": [2, 3], "strides": [d.int(1, 2), 1]})


for _op in ("GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool"):
    case(_op)(lambda d, op=_op: Call(op, [d.floats(*d.shape(0, 0), 3, 2)]))


# ------------------------------------------------------------------------------------------------ more normalisations


@case("GroupNormalization")
def _(d: Draw) -> Call:
    g, c = d.shape(0, 0)
    opset = d.of(18, 21)
    size = g if opset == 18 else g * c
    inputs = [d.floats(2, g * c, 3, 2), d.floats(size), d.floats(size)]
    return Call("GroupNormalization", inputs, {"num_groups": g}, (1, 2), 1, opset)


@case("RMSNormalization")
def _(d: Draw) -> Call:
    a, b, c = d.shape(0, 0, 0)
    return Call("RMSNormalization", [d.floats(a, b, c), d.floats(c)], {"axis": -1}, (1,), 1, 23)


@case("SimplifiedLayerNormalization")
def _(d: Draw) -> Call:
    a, b, c = d.shape(0, 0, 0)
    return Call("SimplifiedLayerNormalization", [d.floats(a, b, c), d.floats(c)], {"axis": -1}, (1,))


@case("SkipLayerNormalization", domain=MS)
def _(d: Draw) -> Call:
    a, b, c = d.shape(0, 0, 0)
    inputs = [d.floats(a, b, c), d.floats(a, b, c), *(d.floats(c) for _ in range(d.int(2, 3)))]
    return Call("SkipLayerNormalization", inputs, {}, (2, 3, 4), domain=MS)


@case("SkipSimplifiedLayerNormalization", domain=MS)
def _(d: Draw) -> Call:
    a, b, c = d.shape(0, 0, 0)
    inputs = [d.floats(a, b, c), d.floats(a, b, c), d.floats(c)]
    return Call("SkipSimplifiedLayerNormalization", inputs, {}, (2,), domain=MS)


@case("MeanVarianceNormalization")
def _(d: Draw) -> Call:
    axes = d.of({}, {"axes": [1]}, {"axes": [2, 3]})
    return Call("MeanVarianceNormalization", [d.floats(*d.shape(0, 0, 0, 0, low=3))], axes, (), 1, 13)


@case("LpNormalization")
def _(d: Draw) -> Call:
    return Call("LpNormalization", [d.floats(*d.shape(0, 0, 0))], {"axis": d.int(-1, 2), "p": d.int(1, 2)})


@case("LRN")
def _(d: Draw) -> Call:
    return Call("LRN", [d.floats(2, d.int(4, 6), 3, 2)], {"size": 3, "alpha": 2.0})
