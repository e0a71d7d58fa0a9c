"""Cases of operators that move elements: reshapes, transposes, concatenations, slices."""

from __future__ import annotations

import numpy as np
from law import Call, Draw, case

# ---------------------------------------------------------------------------------------------------------- movement


def _reshape_shapes(d: Draw) -> tuple[list[int], list[int]]:
    factors = [d.int(2, 3) for _ in range(d.int(2, 4))]

    def grouped() -> list[int]:
        out = [factors[0]]
        for f in factors[1:]:
            if d.of(True, False):
                out.append(f)
            else:
                out[-1] *= f
        if d.of(True, False, False):
            out.insert(d.int(0, len(out)), 1)
        return out

    return grouped(), grouped()


@case("Reshape")
def _(d: Draw) -> Call:
    before, after = _reshape_shapes(d)
    target = list(after)
    if d.of(True, False):
        target[d.int(0, len(target) - 1)] = -1
    target = [
        0 if t != -1 and k < len(before) and before[k] == t and d.of(True, False) else t for k, t in enumerate(target)
    ]
    return Call("Reshape", [d.floats(*before), np.array(target, np.int64)], {}, (1,))


@case("Flatten")
def _(d: Draw) -> Call:
    return Call("Flatten", [d.floats(*d.shape(0, 0, 0, 0))], {"axis": d.int(0, 4)})


@case("Squeeze")
def _(d: Draw) -> Call:
    return Call(
        "Squeeze",
        [d.floats(d.int(2, 3), 1, d.int(2, 4), 1), np.array(d.of([1], [3], [1, 3], [-1]), np.int64)],
        {},
        (1,),
    )


@case("Squeeze", "attributes")
def _(d: Draw) -> Call:
    return Call("Squeeze", [d.floats(d.int(2, 3), 1, d.int(2, 4), 1)], {"axes": d.of([1], [1, 3])}, (), 1, 11)


@case("Unsqueeze")
def _(d: Draw) -> Call:
    return Call("Unsqueeze", [d.floats(*d.shape(0, 0)), np.array(d.of([1], [0, 3], [-1]), np.int64)], {}, (1,))


@case("Transpose")
def _(d: Draw) -> Call:
    x = d.floats(*d.shape(0, 0, 0, 0))
    return Call("Transpose", [x], d.of({}, {"perm": d.rng.permutation(4).tolist()}))


@case("Expand")
def _(d: Draw) -> Call:
    a, b, c = d.shape(0, 0, 0)
    shape, target = d.of(
        ((a, 1, c), (a, b, c)), ((a, 1, c), (1, b, 1)), ((b, c), (a, 1, c)), ((1, c), (a, b, 1)), ((a, b), (b,))
    )
    return Call("Expand", [d.floats(*shape), np.array(target, np.int64)], {}, (1,))


@case("Tile")
def _(d: Draw) -> Call:
    return Call("Tile", [d.floats(*d.shape(0, 0, 0)), np.array([d.int(1, 2) for _ in range(3)], np.int64)], {}, (1,))


@case("Resize")
def _(d: Draw) -> Call:
    n, c, h, w = d.shape(0, 0, 0, 0)
    attributes = {"mode": d.of("nearest", "linear"), "coordinate_transformation_mode": d.of("asymmetric", "half_pixel")}
    if d.of(True, False):
        inputs = [d.floats(n, c, h, w), None, np.array([1, 1, 2, 2], np.float32)]
    else:
        inputs = [d.floats(n, c, h, w), None, None, np.array([n, c, 2 * h, w + 1], np.int64)]
    return Call("Resize", inputs, attributes, (2, 3))


@case("Resize", "axes")
def _(d: Draw) -> Call:
    n, c, h, w = d.shape(0, 0, 0, 0)
    inputs = [d.floats(n, c, h, w), None, None, np.array([2 * h, 2 * w], np.int64)]
    return Call("Resize", inputs, {"axes": [2, 3], "mode": "nearest"}, (3,), 1, 18)


@case("Upsample")
def _(d: Draw) -> Call:
    x = d.floats(*d.shape(0, 0, 0, 0))
    return Call("Upsample", [x, np.array([1, 1, 2, 3], np.float32)], {"mode": d.of("nearest", "linear")}, (1,), 1, 9)


@case("Upsample", "attributes")
def _(d: Draw) -> Call:
    return Call("Upsample", [d.floats(*d.shape(0, 0, 0, 0))], {"scales": [1.0, 1.0, 2.0, 2.0]}, (), 1, 7)


@case("DepthToSpace")
def _(d: Draw) -> Call:
    block, n, c, h, w = d.int(2, 3), *d.shape(0, 0, 0, 0)
    return Call(
        "DepthToSpace", [d.floats(n, c * block * block, h, w)], {"blocksize": block, "mode": d.of("DCR", "CRD")}
    )


@case("SpaceToDepth")
def _(d: Draw) -> Call:
    block, n, c, h, w = d.int(2, 3), *d.shape(0, 0, 0, 0)
    return Call("SpaceToDepth", [d.floats(n, c, h * block, w * block)], {"blocksize": block})


@case("Concat")
def _(d: Draw) -> Call:
    shape, axis = list(d.shape(0, 0, 0)), d.int(-3, 2)
    parts = []
    for _ in range(d.int(1, 3)):
        shape[axis] = d.int(1, 4)
        parts.append(d.floats(*shape))
    return Call("Concat", parts, {"axis": axis})


@case("Split")
def _(d: Draw) -> Call:
    sizes, axis, shape = [d.int(1, 4) for _ in range(d.int(2, 3))], d.int(-3, 2), list(d.shape(0, 0, 0))
    shape[axis] = sum(sizes)
    return Call("Split", [d.floats(*shape), np.array(sizes, np.int64)], {"axis": axis}, (1,), len(sizes))


@case("Split", "even")
def _(d: Draw) -> Call:
    parts, each = d.int(2, 3), d.int(2, 3)
    opset = d.of(11, 13, 18)
    attributes = {"axis": 1} | ({"num_outputs": parts} if opset == 18 else {})
    return Call("Split", [d.floats(2, parts * each, 3)], attributes, (), parts, opset)


@case("Split", "attributes")
def _(d: Draw) -> Call:
    sizes = [d.int(1, 4), d.int(1, 4)]
    return Call("Split", [d.floats(2, sum(sizes), 3)], {"axis": 1, "split": sizes}, (), 2, 11)


@case("Slice")
def _(d: Draw) -> Call:
    shape = d.shape(0, 0, 0, low=3, high=7)
    axes = d.of([1], [0, 2], [-1], [1, 2])
    starts = [d.int(-shape[a], 1) for a in axes]
    ends = [d.of(shape[a], shape[a] - 1, -1, 2**31) for a in axes]
    steps = [d.of(1, 1, 2) for _ in axes]
    parts = [np.array(v, np.int64) for v in (starts, ends, axes, steps)]
    return Call("Slice", [d.floats(*shape), *parts], {}, (1, 2, 3, 4))


@case("Slice", "reversed")
def _(d: Draw) -> Call:
    size, axis = d.int(3, 7), d.of(1, -1)
    start, end = d.of((-1, -(2**31)), (size - 2, 0), (2**31, -size), (-2, -(2**31)), (-1, -size - 1))
    parts = [np.array(v, np.int64) for v in ([start], [end], [axis], [-1])]
    return Call("Slice", [d.floats(d.int(2, 4), size), *parts], {}, (1, 2, 3, 4))


@case("Slice", "strided")
def _(d: Draw) -> Call:
    step, count = d.int(2, 3), d.int(2, 4)
    size = step * count
    start = d.int(0, step - 1)
    ends = d.of(2**31, size, size - step + start + 1)
    parts = [np.array(v, np.int64) for v in ([d.of(start, start - size)], [ends], [d.of(1, -2)], [step])]
    return Call("Slice", [d.floats(2, size, 3), *parts], {}, (1, 2, 3, 4))


@case("Slice", "attributes")
def _(d: Draw) -> Call:
    return Call("Slice", [d.floats(2, d.int(3, 6), 4)], {"starts": [1, 0], "ends": [3, -1], "axes": [1, 2]}, (), 1, 9)


@case("Slice", "computed")
def _(d: Draw) -> Call:
    return Call("Slice", [d.floats(*d.shape(0, 0, 0)), np.array([0]), np.array([1]), np.array([1])], {}, (3,))


@case("Gather", "permutation")
def _(d: Draw) -> Call:
    shape = d.shape(0, 0, 0)
    axis = d.int(-3, 2)
    return Call("Gather", [d.floats(*shape), d.rng.permutation(shape[axis])], {"axis": axis}, (1,))


@case("Gather", "some")
def _(d: Draw) -> Call:
    shape, axis = d.shape(0, 0, 0, low=3), d.int(0, 2)
    return Call(
        "Gather", [d.floats(*shape), d.rng.integers(-shape[axis], shape[axis], d.int(2, 5))], {"axis": axis}, (1,)
    )


@case("Gather", "scalar")
def _(d: Draw) -> Call:
    return Call("Gather", [d.floats(*d.shape(0, 0, 0)), np.array(1)], {"axis": d.int(0, 2)}, (1,))


@case("Gather", "embedding")
def _(d: Draw) -> Call:
    return Call("Gather", [d.floats(*d.shape(0, 0)), d.rng.integers(0, 2, (2, 3))], {}, (0,))


@case("Gather", "table")
def _(d: Draw) -> Call:
    return Call("Gather", [d.floats(*d.shape(0, 0)), d.rng.integers(0, 2, (2, 3))], {"axis": 1}, (1,))


@case("Pad")
def _(d: Draw) -> Call:
    pads = [d.of(0, 1, 2) for _ in range(6)]
    value = [np.array(1.5, np.float32)] if d.of(True, False) else []
    return Call("Pad", [d.floats(*d.shape(0, 0, 0)), np.array(pads, np.int64), *value], {"mode": "constant"}, (1, 2))


@case("Pad", "crop")
def _(d: Draw) -> Call:
    pads = [0, d.of(-1, 1), 0, 0, d.of(0, -1), 0]
    return Call("Pad", [d.floats(2, d.int(4, 6), 3), np.array(pads, np.int64)], {}, (1,))


@case("Pad", "mode")
def _(d: Draw) -> Call:
    return Call(
        "Pad", [d.floats(2, 3, 4), np.array([0, 1, 2, 0, 1, 0], np.int64)], {"mode": d.of("reflect", "edge")}, (1,)
    )


@case("Pad", "axes")
def _(d: Draw) -> Call:
    inputs = [
        d.floats(*d.shape(0, 0, 0)),
        np.array([1, 0, 2, 1], np.int64),
        np.array(0.5, np.float32),
        np.array([-1, 1]),
    ]
    return Call("Pad", inputs, {}, (1, 2, 3), 1, 18)


@case("Pad", "attributes")
def _(d: Draw) -> Call:
    return Call("Pad", [d.floats(*d.shape(0, 0, 0))], {"pads": [0, d.int(0, 2), 1, 0, 1, 0]}, (), 1, d.of(7, 10))
