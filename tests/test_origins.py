"""Weights that a function turns before it reads them: the report names them as the file does."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from builder import run
from onnx import helper, numpy_helper, parser
from onnx.inliner import inline_local_functions

from onnxprune.api import prune
from onnxprune.graph import Graph
from onnxprune.origins import origins
from onnxprune.runtime import Runtime

# how the function comes from the weight of the first layer to a matrix of (8, 12), that weight's shape, what is named
WAYS: dict[str, tuple[str, tuple[int, ...], set[str]]] = {
    "as it is": ("m = Identity(w)", (8, 12), {"a", "b"}),
    "turned": ("m = Transpose<perm = [1, 0]>(w)", (12, 8), {"a", "b"}),
    "cast": ("d = Cast<to = 11>(w) t = Transpose(d) m = Cast<to = 1>(t)", (12, 8), {"a", "b"}),
    "unfolded": (
        "s = Constant<value = int64[2] {8, 12}>() t = Transpose<perm = [2, 0, 1]>(w) m = Reshape(t, s)",
        (3, 4, 8),
        {"b"},  # a channel is an element of two axes
    ),
    "squeezed": ("t = Transpose<perm = [2, 1, 0]>(w) f = Flatten<axis = 1>(t) m = Identity(f)", (12, 1, 8), {"a", "b"}),
    "put together": (
        "t = Transpose(w) p, q = Split<axis = 1>(t) m = Concat<axis = 1>(q, p)",
        (12, 8),
        {"a", "b"},
    ),
}


def network(way: str, shape: tuple[int, ...], *, both: bool = False) -> onnx.ModelProto:
    """Two layers in a function that is given their weights."""
    more = "u = Reshape(w, r) v = MatMul(x, u) z = Concat<axis = 1>(y, v)" if both else "z = Identity(y)"
    model = parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 17, "own" : 1]>
        g (float[5, 8] x) => (float[5, n] z) {{ z = own.network(x, a, b) }}
        <domain: "own", opset_import: ["" : 17]> network (x, w, b) => (z) {{
            {way} h = MatMul(x, m) e = Relu(h) t2 = Transpose(b) y = MatMul(e, t2)
            r = Constant<value = int64[2] {{8, 12}}>() {more}
        }}"""
    )
    rng = np.random.default_rng(0)
    for name, dims in (("a", shape), ("b", (4, 12))):
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(dims).astype(np.float32), name))
    return model


@pytest.mark.parametrize("name", WAYS)
def test_the_report_names_what_the_file_holds(name: str) -> None:
    way, shape, named = WAYS[name]
    model = network(way, shape)
    result = prune(model, speedup=1.5, select="l1", reconstruct=False, threads=1)
    removed = json.loads(result.report.to_json())["removed"]
    assert set(removed) == named
    silent = onnx.ModelProto()
    silent.CopyFrom(model)
    for tensor in silent.graph.initializer:
        array = numpy_helper.to_array(tensor).copy()
        for axis, gone in removed.get(tensor.name, {}).items():
            array[(slice(None),) * int(axis) + (gone,)] = 0
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    feeds = {"x": np.random.default_rng(1).standard_normal((5, 8)).astype(np.float32)}
    np.testing.assert_allclose(run(result.model, feeds)[0], run(silent, feeds)[0], rtol=1e-5, atol=1e-5)


def test_a_weight_that_is_read_elsewhere_too_is_not_named() -> None:
    model = network("m = Transpose(w)", (12, 8), both=True)
    result = prune(model, speedup=1.2, select="l1", reconstruct=False, threads=1, best_effort=True)
    assert set(result.report.removed) == {"b"}


def test_slices_of_tensors_that_are_computed_are_not_made_up() -> None:
    nodes = [helper.make_node("Neg", ["w"], ["t"]), helper.make_node("Transpose", ["v"], ["u"])]
    stored = [numpy_helper.from_array(np.ones((2, 3), np.float32), name) for name in "wv"]
    graph = helper.make_graph(nodes, "g", [], [helper.make_empty_tensor_value_info(n) for n in "tu"], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    found = origins(Graph(model), {"t": {0: (1,)}, "u": {0: (2,)}}, Runtime("cpu", 1))
    assert found == {"v": {1: (2,)}}


def test_what_a_function_stores_is_named_as_in_the_model_with_functions_inlined() -> None:
    """Each call has a copy of its own, which is cut by itself."""
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 17, "own" : 1]>
        g (float[5, 8] x) => (float[5, 8] z) { y = own.layer(x) r = Relu(y) z = own.layer(r) }
        <domain: "own", opset_import: ["" : 17]> layer (x) => (z) { w = Constant<value_int = 1>() z = MatMul(x, w) }"""
    )
    weight = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    model.functions[0].node[0].attribute[0].CopyFrom(helper.make_attribute("value", numpy_helper.from_array(weight)))
    result = prune(model, speedup=1.5, select="l1", reconstruct=False, threads=1)
    plain = inline_local_functions(model)
    first, second = (node.output[0] for node in plain.graph.node if node.op_type == "Constant")
    assert set(result.report.removed) == {first, second}
    assert set(result.report.removed[first]) == {1} and set(result.report.removed[second]) == {0}
