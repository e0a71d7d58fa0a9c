"""Small networks with readers of every kind, their data, and runs of them as a whole."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
from builder import Builder, analysed, run

from onnxprune.analysis import Analysis
from onnxprune.batches import Batches
from onnxprune.data import Calibration, load_calibration
from onnxprune.readers import Reader, find_readers
from onnxprune.runtime import expose

SAMPLES = 24

# ------------------------------------------------------------------------------------------------------ the networks

# per network: who is added to what a reader gives, and the scale on the way (by the name of a BatchNormalization)
RESIDUALS: dict[str, dict[str, tuple[str, str]]] = {}
MODELS: dict[str, Callable[[], onnx.ModelProto]] = {}


def network(**residuals: tuple[str, str]) -> Callable[[Callable[[Builder], str | tuple[str, ...]]], None]:
    """Register a network with the residual sums that its readers end in."""

    def register(make: Callable[[Builder], str | tuple[str, ...]]) -> None:
        def model() -> onnx.ModelProto:
            g = Builder(seed=5)
            outputs = make(g)
            return g.model(*([outputs] if isinstance(outputs, str) else outputs))

        MODELS[make.__name__] = model
        RESIDUALS[make.__name__] = residuals

    return register


def image(g: Builder, size: int = 6) -> str:
    return g.input("x", ["n", 3, size, size])


def head(g: Builder, x: str, outputs: int = 3) -> str:
    return g.gemm(g.Flatten(g.GlobalAveragePool(x)), outputs, name="head")


@network()
def chain(g: Builder) -> str:
    x = g.Relu(g.conv(g.Relu(g.conv(image(g), 6, name="a")), 5, name="b"))
    return head(g, g.Relu(g.conv(x, 6, name="c")))


@network(b1=("stem_out", ""), b2=("block1", ""))
def residual(g: Builder) -> str:
    x = g.Relu(g.conv(image(g), 4, name="stem"), name="stem_out")
    for k in (1, 2):
        branch = g.conv(g.Relu(g.conv(x, 6, name=f"a{k}")), 4, name=f"b{k}")
        x = g.Relu(g.Add(branch, x), name=f"block{k}")
    return head(g, x)


@network(b1=("stem_out", "n1"), b2=("block1", "n2"))
def residual_norm(g: Builder) -> str:
    x = g.Relu(g.conv(image(g), 4, name="stem"), name="stem_out")
    for k in (1, 2):
        branch = g.batch_norm(g.conv(g.Relu(g.conv(x, 6, name=f"a{k}")), 4, name=f"b{k}"), name=f"n{k}")
        x = g.Relu(g.Add(x, branch), name=f"block{k}")  # the other way round
    return head(g, x)


@network(short=("b", ""))  # the shortcut comes second, and knows what the branch gives
def projection(g: Builder) -> str:
    x = g.Relu(g.conv(g.Relu(g.conv(image(g), 5, name="stem")), 4, name="next"))
    branch = g.conv(g.Relu(g.conv(x, 6, name="a")), 5, name="b")
    return head(g, g.Relu(g.Add(branch, g.conv(x, 5, k=1, name="short"))))


@network(b=("pooled", ""))  # the shortcut stands behind the branch in the file, and can be known before it all the same
def late_shortcut(g: Builder) -> str:
    x = g.Relu(g.conv(g.Relu(g.conv(image(g), 5, name="stem")), 4, name="next"))
    branch = g.conv(g.Relu(g.conv(x, 6, name="a")), 4, name="b")
    pooled = g.AveragePool(x, kernel_shape=[3, 3], pads=[1] * 4, name="pooled")
    return head(g, g.Relu(g.Add(branch, pooled)))


@network()
def grouped(g: Builder) -> str:
    x = g.Relu(g.conv(image(g), 6, name="a"))
    x = g.Relu(g.conv(x, 4, group=2, name="b"))
    return head(g, x)


@network()
def two_readers(g: Builder) -> str:
    x = g.Relu(g.conv(image(g), 6, name="a"))
    one, two = g.conv(x, 4, name="b"), g.conv(x, 3, k=1, name="c")
    return head(g, g.Relu(g.Concat(one, two, axis=1)))


@network(down2=("block", ""))  # the bias is added on the way
def tokens(g: Builder) -> str:
    x = g.linear(g.input("x", ["n", 5, 4]), 4, name="stem")
    x = g.Add(g.linear(g.Relu(g.linear(x, 7, name="up1")), 4, name="down1"), g.Relu(x), name="block")
    x = g.Add(g.linear(g.Relu(g.linear(x, 7, name="up2")), 4, name="down2"), x)
    return g.linear(x, 3, name="out")


@network()
def flat(g: Builder) -> str:
    x = g.ConvTranspose(
        g.Relu(g.conv(image(g, 4), 4, name="a")), g.weight(4, 5, 2, 2), g.weight(5), name="b", strides=[2, 2]
    )
    x = g.Flatten(g.MaxPool(g.Relu(x), kernel_shape=[4, 4], strides=[4, 4]))
    x = g.Relu(g.node("Gemm", x, g.weight(20, 8), g.weight(8), name="c"))
    return g.gemm(x, 3, name="head")


@network()
def open_features(g: Builder) -> tuple[str, str]:
    """The features are an output, so that the head reads no group."""
    x = g.conv(g.Relu(g.conv(image(g), 6, name="a")), 4, name="b")
    features = g.Flatten(g.GlobalAveragePool(x), name="features")
    return g.gemm(features, 3, name="head"), features


# --------------------------------------------------------------------------------------------------------- harness


class Case:
    """A network, its readers, its data, and runs of it as a whole."""

    def __init__(self, name: str, batch: int = 7, seed: int = 0, samples: int = SAMPLES) -> None:
        self.name = name
        self.analysis: Analysis = analysed(MODELS[name]())[0]
        self.graph = self.analysis.graph
        self.readers = find_readers(self.analysis)
        shape = [d or 1 for d in self.graph.inputs[0].shape][1:]
        x = np.random.default_rng(1).standard_normal((samples, *shape)).astype(np.float32)
        self.data: Calibration = load_calibration(x, self.graph.inputs)
        self.batches = Batches(self.data, batch, seed)

    def tensors(self, arrays: Mapping[str, np.ndarray], names: Sequence[str], batch: int) -> dict[str, np.ndarray]:
        """Tensors of the network with these stored tensors, run as a whole."""
        model = expose(self.graph.model, names)
        for tensor in model.graph.initializer:
            if tensor.name in arrays:
                tensor.CopyFrom(onnx.numpy_helper.from_array(arrays[tensor.name].astype(np.float32), tensor.name))
        return dict(zip(names, run(model, self.batches.feeds(batch)), strict=True))

    def outputs(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        name = self.graph.outputs[0]
        return np.concatenate([self.tensors(arrays, [name], k)[name] for k in range(len(self.batches))])

    def norm(self, name: str) -> np.ndarray:
        node = next(n for n in self.graph.nodes if n.label == name)
        gamma, variance = self.graph.array(node.inputs[1]), self.graph.array(node.inputs[4])
        return gamma / np.sqrt(variance + 1e-5)

    def explicit(
        self, reader: Reader, arrays: Mapping[str, np.ndarray], compensated: bool = True
    ) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        """Per group and batch: what the pruned network reads, and the target Y1 + Y2 - Y1'."""
        other, norm = RESIDUALS[self.name].get(reader.layer.node.label, ("", "")) if compensated else ("", "")
        names = [reader.layer.data, reader.layer.output, *([other] if other else [])]
        found: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in reader.weights]
        for batch in range(len(self.batches)):
            old, new = self.tensors({}, names, batch), self.tensors(arrays, names, batch)
            target = old[reader.layer.output]
            if other:
                scale = self.norm(norm)[:, None, None] if norm else 1.0
                target = target + (old[other] - new[other]) / scale
            channels_last = not reader.unfolding.kernel
            out = target.shape[1:-1] if channels_last else target.shape[2:]
            positions = self.batches.positions(reader, batch, int(np.prod(out, dtype=np.int64)))
            rows = reader.unfolding.rows(new[reader.layer.data], positions, out)
            for part, x, y in zip(found, rows, reader.unfolding.targets(target, positions), strict=True):
                part.append((x.astype(np.float64), y.astype(np.float64)))
        return found


@functools.cache
def case_of(name: str) -> Case:
    return Case(name)
