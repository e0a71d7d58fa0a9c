"""Test graphs in few lines, and the pipeline from a model to its pruned form.

>>> g = Builder()
>>> x = g.input("x", [2, 3, 8, 8])
>>> model = g.model(g.conv(g.Relu(g.conv(x, 4)), 5))
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from onnxprune.analysis import Analysis, analyse
from onnxprune.flat import Flat, forms
from onnxprune.graph import Graph
from onnxprune.plan import Plan
from onnxprune.probe import probe
from onnxprune.rewrite import rewrite
from onnxprune.runtime import Runtime
from onnxprune.verify import Proof, prove, prove_alike

RUNTIME = Runtime("cpu", 1)
IR = 10


class Builder:
    """Collects nodes and initializers; an operator's name is a method that adds a node and returns its output."""

    def __init__(self, opset: int = 17, ir: int = IR, seed: int = 0) -> None:
        self.opset = opset
        self.ir = ir
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.domains: dict[str, int] = {}
        self._count = 0

    def name(self, base: str) -> str:
        """A fresh name."""
        self._count += 1
        return f"{base}{self._count}"

    def input(self, name: str, shape: Sequence[int | str | None], dtype: int = TensorProto.FLOAT) -> str:
        """An input of the graph."""
        self.inputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def const(self, value: Any, name: str = "", dtype: Any = None) -> str:
        """An initializer with this value; integers become int64, floats float32."""
        array = np.asarray(value)
        if dtype is None:
            dtype = {"i": np.int64, "f": np.float32, "b": np.bool_}[array.dtype.kind]
        name = name or self.name("c")
        self.initializers.append(numpy_helper.from_array(array.astype(dtype), name))
        return name

    def weight(self, *shape: int, name: str = "", scale: float | None = None) -> str:
        """An initializer of random values, scaled so that activations keep their size."""
        fan = int(np.prod(shape[1:])) or 1
        scale = 1 / np.sqrt(fan) if scale is None else scale
        return self.const(self.rng.standard_normal(shape) * scale, name or self.name("w"))

    def node(self, op: str, *inputs: str, outputs: int = 1, domain: str = "", name: str = "", **attributes: Any) -> Any:
        """Add a node; returns its output's name, or a tuple of them."""
        name = name or self.name(op.lower())
        made = [name] if outputs == 1 else [f"{name}_{k}" for k in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), made, name=name, domain=domain, **attributes))
        if domain:
            self.domains.setdefault(domain, 1)
        return made[0] if outputs == 1 else tuple(made)

    def __getattr__(self, op: str) -> Callable[..., Any]:
        if not op[0].isupper():
            raise AttributeError(op)
        return functools.partial(self.node, op)

    def shape(self, tensor: str) -> list[int]:
        """The static shape of a tensor so far (0 where it is dynamic)."""
        for value in (*self.inputs, *onnx.shape_inference.infer_shapes(self.model(), data_prop=True).graph.value_info):
            if value.name == tensor:
                return [d.dim_value for d in value.type.tensor_type.shape.dim]
        raise KeyError(tensor)

    def conv(
        self, x: str, out: int, k: int = 3, *, group: int = 1, bias: bool = True, name: str = "", **attributes: Any
    ) -> str:
        """A 2-D convolution that keeps the resolution."""
        channels = self.shape(x)[1]
        inputs = [x, self.weight(out, channels // group, k, k)] + ([self.weight(out, scale=0.5)] if bias else [])
        attributes.setdefault("pads", [k // 2] * 4)
        return self.node("Conv", *inputs, name=name, group=group, **attributes)

    def gemm(self, x: str, out: int, name: str = "") -> str:
        """A fully connected layer (weights as [out, in])."""
        return self.node(
            "Gemm", x, self.weight(out, self.shape(x)[1]), self.weight(out, scale=0.5), name=name, transB=1
        )

    def linear(self, x: str, out: int, name: str = "", bias: bool = True) -> str:
        """MatMul and Add over the last axis."""
        y = self.node(
            "MatMul", x, self.const(self.rng.standard_normal((d := self.shape(x)[-1], out)) / np.sqrt(d)), name=name
        )
        return self.Add(y, self.weight(out, scale=0.5)) if bias else y

    def batch_norm(self, x: str, name: str = "") -> str:
        """A BatchNormalization with statistics that matter."""
        c = self.shape(x)[1]
        parts = [self.rng.uniform(0.5, 1.5, c), self.rng.standard_normal(c) * 0.3, self.rng.standard_normal(c) * 0.3]
        return self.node(
            "BatchNormalization", x, *map(self.const, parts), self.const(self.rng.uniform(0.5, 2, c)), name=name
        )

    def model(self, *outputs: str) -> onnx.ModelProto:
        """The model so far, with these outputs; their types are inferred."""
        inputs = list(self.inputs)
        if self.ir < 4:  # there every initializer is an input too
            inputs += [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in self.initializers]
        empty = [helper.make_empty_tensor_value_info(o) for o in outputs]
        graph = helper.make_graph(self.nodes, "test", inputs, empty, self.initializers)
        opsets = [helper.make_opsetid("", self.opset)] + [helper.make_opsetid(d, v) for d, v in self.domains.items()]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=self.ir)
        found = {o.name: o for o in onnx.shape_inference.infer_shapes(model).graph.output}
        for output in model.graph.output:
            output.CopyFrom(found[output.name])
            if not output.type.HasField("tensor_type"):  # what inference does not know is taken for float
                output.type.tensor_type.elem_type = TensorProto.FLOAT
        return model


def run(
    model: onnx.ModelProto, feeds: Mapping[str, np.ndarray], names: Sequence[str] | None = None
) -> list[np.ndarray]:
    """Run a model unoptimised on one thread."""
    session = RUNTIME.session(model, optimise=False)
    return session.run(list(names) if names else None, dict(feeds))


def analysed(model: onnx.ModelProto, **options: Any) -> tuple[Analysis, dict[str, str]]:
    """The analysis of the normalised model, and the constants that normalisation copied."""
    analysis, flat = laid_open(model, **options)
    return analysis, dict(flat.copies)


def laid_open(model: onnx.ModelProto, **options: Any) -> tuple[Analysis, Flat]:
    """The analysis of the normalised model, and how its branches are put back."""
    flat = forms(Graph(model), RUNTIME)[0]
    graph = Graph(flat.model)
    return analyse(graph, probe(graph, RUNTIME), copies=flat.copies, **options), flat


def random_plan(analysis: Analysis, seed: int = 0, share: float = 0.5) -> Plan:
    """Keep a random part of every group, one unit at least."""
    rng = np.random.default_rng(seed)
    kept = {}
    for group in analysis.groups:
        count = max(1, round(group.units * share))
        kept[group.name] = tuple(sorted(rng.choice(group.units, count, replace=False).tolist()))
    return Plan("test", kept)


def pruned(model: onnx.ModelProto, seed: int = 0, share: float = 0.5) -> tuple[onnx.ModelProto, Analysis, Plan, Proof]:
    """Analyse, plan at random, rewrite and prove."""
    analysis, flat = laid_open(model)
    plan = random_plan(analysis, seed, share)
    cut = rewrite(analysis, plan, copies=flat.copies)
    feeds = [p.feeds for p in analysis.shapes.probes]
    proof = prove(analysis, plan, cut, feeds, RUNTIME, flat.turning)
    new = flat.closed(cut)
    if flat.branches:
        prove_alike(flat.turning(cut), new, feeds, RUNTIME)
    ort.InferenceSession(new.SerializeToString(), providers=["CPUExecutionProvider"])  # with all optimisations
    if all(o.type.tensor_type.HasField("shape") for o in new.graph.output):  # else the builder could not infer it
        onnx.checker.check_model(new)
    return new, analysis, plan, proof


def table(analysis: Analysis) -> list[str]:
    """The groups as text: name, units x (positions of every weight's axis)."""
    stored = set(analysis.graph.stored_names())
    lines = []
    for info in analysis.groups:
        axes = [f"{a.tensor}.{a.axis}:{a.positions.shape[1]}" for a in info.group.axes if a.tensor in stored]
        lines.append(f"{info.name} x{info.units}: {' '.join(axes)}")
    return lines


def shapes_of(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Shapes of the initializers."""
    return {t.name: tuple(t.dims) for t in model.graph.initializer}
