"""Concrete shapes of every tensor, found by running the model.

Symbolic shape inference stops at the first operator that computes a shape; running the model does not. Models with
dynamic dimensions are run at two sizes: a dimension that comes out alike at both is static, and a relation between
dimensions is believed only where it holds at both. No size is ever one, because there every reshape looks like the
identity.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort

from onnxprune.errors import InputError
from onnxprune.graph import Graph
from onnxprune.runtime import Runtime, expose

Feeds = Mapping[str, np.ndarray]

_KEEP_VALUES = 4096  # elements: shapes, indices and sizes are short; activations are not kept

# sizes for (batch, height, width, any other dynamic dimension), tried in turn until one pair runs
_CANDIDATES = (
    ((3, 64, 96, 12), (5, 96, 160, 20)),
    ((3, 224, 256, 33), (2, 256, 320, 47)),
    ((2, 320, 352, 64), (3, 416, 384, 128)),
    ((2, 512, 576, 128), (3, 640, 512, 256)),
    ((2, 16, 24, 1000), (3, 24, 16, 2000)),
    ((1, 224, 224, 16), (1, 256, 256, 32)),
)


@dataclass(frozen=True, eq=False)
class Probe:
    """One run of the model: the feeds, the shape of every tensor, and the values of the short ones."""

    feeds: Feeds
    shapes: Mapping[str, tuple[int, ...]]
    values: Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Shapes:
    """Shapes of every tensor of the main graph, at one or two sizes of the dynamic dimensions."""

    probes: tuple[Probe, ...]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The tensor's shape at the first probe; None where it never came to be."""
        return self.probes[0].shapes.get(name)

    def sizes(self, name: str) -> list[list[int]]:
        """Per axis the size at each probe."""
        return [list(axis) for axis in zip(*(p.shapes[name] for p in self.probes), strict=True)]

    def is_static(self, name: str, axis: int) -> bool:
        """Whether the axis has the same size at every probe."""
        return len({p.shapes[name][axis] for p in self.probes}) == 1

    def known(self, name: str) -> bool:
        """Whether the tensor was seen, with the same rank, at every probe."""
        return len({len(p.shapes[name]) if name in p.shapes else -1 for p in self.probes} | {-1}) == 2


def run_probe(graph: Graph, feeds: Feeds, runtime: Runtime) -> Probe:
    """Run the model once with all its tensors exposed."""
    return _Prober(graph, runtime).run(feeds)


def probe(graph: Graph, runtime: Runtime, data: Feeds | None = None, seed: int = 0) -> Shapes:
    """Find the shapes of all tensors.

    Args:
        graph: the model.
        runtime: how to run it.
        data: a batch of real inputs; its sizes are the first probe's.
        seed: of the random inputs.

    Raises:
        InputError: onnxruntime cannot run the model at any size that was tried.
    """
    prober = _Prober(graph, runtime)
    dynamic = any(dim is None for spec in graph.inputs for dim in spec.shape)
    probes: list[Probe] = []
    error: Exception | None = None
    if data is not None:
        try:
            probes.append(prober.run(data))
        except Exception as failure:
            raise InputError(f"onnxruntime cannot run the model on the calibration data: {failure}") from failure
        if not dynamic:
            return Shapes(tuple(probes))
    for first, second in _CANDIDATES:
        try:
            tried = (first, second) if dynamic else (first,)
            found = [prober.run(random_feeds(graph, sizes, seed)) for sizes in tried]
        except Exception as failure:  # onnxruntime's errors share no public base class; the last one is shown
            error = failure
            continue
        return Shapes(tuple((probes + found)[:2])) if not probes else Shapes((probes[0], _other(probes[0], found)))
    if probes:
        return Shapes(tuple(probes))
    raise InputError(
        f"onnxruntime cannot run the model on random inputs of any size tried ({str(error).splitlines()[0][:200]});"
        " give real inputs with --data"
    )


def _other(first: Probe, found: list[Probe]) -> Probe:
    """The probe whose input sizes differ most from the first one's."""

    def alike(probe: Probe) -> int:
        return sum(a == b for name in first.feeds for a, b in zip(first.shapes[name], probe.shapes[name], strict=True))

    return min(found, key=alike)


def random_feeds(graph: Graph, sizes: tuple[int, int, int, int], seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs: standard normal floats, zeros and ones for integers, true for booleans.

    ``sizes`` are (batch, height, width, other) for the dynamic dimensions; equal symbols get equal sizes.
    """
    rng = np.random.default_rng(seed)
    symbols: dict[str, int] = {}
    feeds = {}
    protos = {v.name: v for v in graph.model.graph.input}
    for spec in graph.inputs:
        shape = []
        for axis, dim in enumerate(spec.shape):
            if dim is None:
                param = protos[spec.name].type.tensor_type.shape.dim[axis].dim_param
                guess = sizes[0] if axis == 0 else sizes[_spatial(spec.shape, axis)]
                dim = symbols.setdefault(param, guess) if param else guess
            shape.append(dim)
        if spec.dtype.kind in "iu":
            feeds[spec.name] = rng.integers(0, 2, shape).astype(spec.dtype)
        elif spec.dtype.kind == "b":
            feeds[spec.name] = np.ones(shape, bool)
        else:
            feeds[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
    return feeds


def _spatial(shape: tuple[int | None, ...], axis: int) -> int:
    """Which of the sizes an inner dynamic dimension takes: height, width, or another."""
    dynamic = [k for k, dim in enumerate(shape) if dim is None and k > 0]
    if len(shape) == 4 and len(dynamic) == 2:
        return 1 + dynamic.index(axis)
    return 3


class _Prober:
    """A session that shows every tensor."""

    def __init__(self, graph: Graph, runtime: Runtime) -> None:
        self.graph = graph
        self.names = [name for node in graph.nodes for name in node.outputs if name]
        self.session = Runtime("cpu", runtime.threads).session(expose(graph.model, self.names), optimise=False)

    def run(self, feeds: Feeds) -> Probe:
        given = {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(a)) for name, a in feeds.items()}
        found = self.session.run_with_ort_values(self.names, given)
        shapes = {name: tuple(array.shape) for name, array in feeds.items()}
        shapes |= {name: tuple(t.dims) for name in self.graph.stored_names() for t in (self.graph.stored(name),)}
        values: dict[str, np.ndarray] = {}
        for name, value in zip(self.names, found, strict=True):
            if value is None or not value.has_value() or not value.is_tensor():
                continue
            shapes[name] = tuple(value.shape())
            if int(np.prod(shapes[name], dtype=np.int64)) <= _KEEP_VALUES and value.element_type() in _READABLE:
                values[name] = value.numpy()
        return Probe(feeds, shapes, values)


_READABLE = frozenset(
    {
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.DOUBLE,
        onnx.TensorProto.INT64,
        onnx.TensorProto.INT32,
        onnx.TensorProto.BOOL,
    }
)


def axes_of(shapes: Shapes, names: Iterator[str]) -> Iterator[tuple[str, int]]:
    """Every (tensor, axis) of the named tensors."""
    for name in names:
        for axis in range(len(shapes.shape(name) or ())):
            yield name, axis
