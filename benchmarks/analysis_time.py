"""How long it takes to find what may be pruned, against the number of nodes: generated networks of growing depth.

    python benchmarks/analysis_time.py [--nodes 100 1000 3000] [--write]

Seconds of processor time, so that what else the machine does counts less. Columns: normalising the graph, running it
once or twice to know every size, the analysis itself (relations, units, groups), and a rewrite at half the width.
`--write` puts the table into `benchmarks/analysis_time.md`.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxprune.analysis import analyse
from onnxprune.graph import Graph
from onnxprune.normalise import normalise
from onnxprune.plan import Plan
from onnxprune.probe import probe
from onnxprune.rewrite import rewrite
from onnxprune.runtime import Runtime


class Net:
    """Nodes and random weights."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []

    def weight(self, *shape: int) -> str:
        """A random weight."""
        return self.const((self.rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32))

    def const(self, value: object) -> str:
        """A stored tensor."""
        self.tensors.append(numpy_helper.from_array(np.asarray(value), f"t{len(self.tensors)}"))
        return self.tensors[-1].name

    def add(self, op: str, *inputs: str, **attributes: object) -> str:
        """Add a node; returns its output."""
        name = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def model(self, x: list[int | str], y: str) -> onnx.ModelProto:
        """The model so far."""
        faces = [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)], [helper.make_empty_tensor_value_info(y)]
        graph = helper.make_graph(self.nodes, "generated", *faces, self.tensors)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
        return onnx.shape_inference.infer_shapes(model)


def resnext(blocks: int) -> onnx.ModelProto:
    """Bottlenecks of 64-128-64 channels in 8 groups, with a channel gate and a channel shuffle in each."""
    net = Net()

    def conv(x: str, o: int, c: int, k: int, group: int = 1) -> str:
        return net.add("Conv", x, net.weight(o, c // group, k, k), net.weight(o), group=group, pads=[k // 2] * 4)

    x = net.add("Relu", conv("x", 64, 3, 3))
    for _ in range(blocks):
        y = net.add("Relu", conv(x, 128, 64, 1))
        y = net.add("Reshape", y, net.const([0, 8, 16, 8, 8]))
        y = net.add("Reshape", net.add("Transpose", y, perm=[0, 2, 1, 3, 4]), net.const([0, 128, 8, 8]))
        y = net.add("Relu", conv(y, 128, 128, 3, group=8))
        gate = net.add("Relu", conv(net.add("GlobalAveragePool", y), 16, 128, 1))
        y = conv(net.add("Mul", y, net.add("Sigmoid", conv(gate, 128, 16, 1))), 64, 128, 1)
        x = net.add("Relu", net.add("Add", x, y))
    return net.model(["n", 3, 8, 8], conv(x, 10, 64, 1))


def vit(blocks: int) -> onnx.ModelProto:
    """Width 96, 6 heads from one packed projection, 4 times as wide in between, written out as exporters do."""
    net, d, heads = Net(), 96, 6

    def linear(x: str, o: int, c: int) -> str:
        return net.add("Add", net.add("MatMul", x, net.weight(c, o)), net.weight(o))

    def norm(x: str) -> str:
        return net.add("LayerNormalization", x, net.weight(d), net.weight(d))

    x = linear("x", d, 12)
    for _ in range(blocks):
        y = net.add("Reshape", linear(norm(x), 3 * d, d), net.const([0, 0, 3, heads, d // heads]))
        y = net.add("Transpose", y, perm=[2, 0, 3, 1, 4])
        q, k, v = (net.add("Gather", y, net.const(i), axis=0) for i in range(3))
        scores = net.add(
            "Mul", net.add("MatMul", q, net.add("Transpose", k, perm=[0, 1, 3, 2])), net.const(np.float32(0.25))
        )
        y = net.add("Transpose", net.add("MatMul", net.add("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
        x = net.add("Add", x, linear(net.add("Reshape", y, net.const([0, 0, d])), d, d))
        y = linear(norm(x), 4 * d, d)
        half = net.add(
            "Add", net.add("Erf", net.add("Div", y, net.const(np.float32(2**0.5)))), net.const(np.float32(1))
        )
        y = net.add("Mul", net.add("Mul", y, half), net.const(np.float32(0.5)))
        x = net.add("Add", x, linear(y, d, 4 * d))
    return net.model(["n", 17, 12], linear(norm(x), 10, d))


NETWORKS: dict[str, Callable[[int], onnx.ModelProto]] = {"ResNeXt-like": resnext, "ViT-like": vit}


def measure(model: onnx.ModelProto) -> tuple[int, int, int, list[float]]:
    """Nodes, positions, groups, and the seconds of every stage."""
    runtime, times = Runtime("cpu", 1), [time.process_time()]
    plain, _ = normalise(Graph(model), runtime)
    graph = Graph(plain)
    times.append(time.process_time())
    shapes = probe(graph, runtime)
    times.append(time.process_time())
    analysis = analyse(graph, shapes)
    times.append(time.process_time())
    rewrite(analysis, Plan("", {g.name: tuple(range(max(g.units // 2, 1))) for g in analysis.groups}))
    times.append(time.process_time())
    positions = sum(sum(shape) for shape in shapes.probes[0].shapes.values())
    return len(graph.nodes), positions, len(analysis.groups), np.diff(times).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[100, 300, 1000, 2000, 3000])
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    lines = [
        "| network | nodes | positions | groups | normalise | probe | analyse | rewrite | analyse, µs per node |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, make in NETWORKS.items():
        each_block = len(make(2).graph.node) - len(make(1).graph.node)
        for wanted in options.nodes:
            blocks = max(wanted // each_block, 1)
            model = make(blocks)
            nodes, positions, groups, times = min((measure(model) for _ in range(3)), key=lambda found: found[3][2])
            seconds = " | ".join(f"{each:.2f} s" for each in times)
            each = f"{1e6 * times[2] / nodes:.0f}"
            lines.append(f"| {name}, {blocks} blocks | {nodes} | {positions} | {groups} | {seconds} | {each} |")
            print(lines[-1], flush=True)
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread"
    when = datetime.datetime.now(tz=datetime.UTC).date()
    how = f"`python benchmarks/analysis_time.py --write`, {when}, {machine}; processor time, the best of three."
    if options.write:
        Path(__file__).with_suffix(".md").write_text("\n".join(["# Time of the analysis", "", how, "", *lines, ""]))


if __name__ == "__main__":
    main()
