"""Concrete shapes of every tensor, found by running the model.

Symbolic shape inference stops at the first operator that computes a shape; running the model does not. Models with
dynamic dimensions are run at two sizes: a dimension that comes out alike at both is static, and a relation between
dimensions is believed only where it holds at both. No size is ever one, because there every reshape looks like the
identity.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
import onnxruntime as ort

from onnxprune.errors import InputError
from onnxprune.graph import Graph, symbol
from onnxprune.inference import infer
from onnxprune.memory import bounded
from onnxprune.runtime import Runtime, expose

Feeds = Mapping[str, np.ndarray]

# what they give has a size that depends on values: one run says nothing about another
COUNTING = frozenset({"Compress", "If", "Loop", "NonMaxSuppression", "NonZero", "SequenceMap", "Unique"})
_TENSOR = re.compile(r"tensor\((\w+)\)")  # as onnxruntime names types
_NO_MEMORY = ("Failed to allocate memory", "bad allocation", "bad_alloc")  # what onnxruntime says
_OPSET = 17  # of Shape nodes in a model that has no operators of the default domain
_KEEP_VALUES = 4096  # elements: shapes, indices and sizes are short; activations are not kept

Sizes = tuple[int, int, int, int]  # (batch, height, width, any other dynamic dimension)

# pairs that are tried first: prime to most channel counts, unlike each other, and cheap
_PAIRS: tuple[tuple[Sizes, Sizes], ...] = (
    ((3, 64, 96, 12), (5, 96, 160, 20)),
    ((3, 224, 256, 33), (2, 256, 320, 47)),
    ((2, 320, 352, 64), (3, 416, 384, 128)),
    ((2, 512, 576, 128), (3, 640, 512, 256)),
    ((2, 16, 24, 1000), (3, 24, 16, 2000)),
    ((1, 224, 224, 16), (1, 256, 256, 32)),
)
# single sizes for models that run at few: one is searched for, then a second one around it
_BATCHES = (3, 2, 1, 8)  # 8: a multiple of the frames of a clip
_SPATIAL = (
    (32, 32),
    (64, 64),
    (28, 28),
    (128, 128),
    (224, 224),
    (48, 320),
    (320, 320),
    (256, 256),
    (512, 512),
    (640, 640),
)
_OTHERS = (7, 24, 50, 77, 100, 256, 400, 512, 1000, 2048, 4096, 16000, 48000)


@dataclass(frozen=True, eq=False)
class Probe:
    """One run of the model: the feeds, the shape and ONNX type of every tensor, and the values of the short ones."""

    feeds: Feeds
    shapes: Mapping[str, tuple[int, ...]]
    values: Mapping[str, np.ndarray]
    types: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class Shapes:
    """Shapes of every tensor of the main graph, at one or two sizes of the dynamic dimensions.

    Attributes:
        probes: the runs.
        static_sizes: tensors that follow from shapes and constants alone, and hold the same at every probe: a number of
            channels, half of it, a Reshape's target without dynamic sizes.
        turns: multiply-accumulates of bodies that run several times, per node, where they were counted.
    """

    probes: tuple[Probe, ...]
    static_sizes: frozenset[str] = frozenset()
    turns: Mapping[int, float] = field(default_factory=dict)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The tensor's shape at the first probe; None where it never came to be."""
        return self.probes[0].shapes.get(name)

    def size(self, name: str, axis: int) -> int:
        """Size of an axis at the first probe; one where the tensor never came to be."""
        shape = self.shape(name)
        return shape[axis] if shape is not None else 1

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
    counting = any(node.op in COUNTING for node in graph.nodes)
    probes: list[Probe] = []
    if data is not None:
        try:
            probes.append(prober.run(data))
        except Exception as failure:
            sizes = ", ".join(f"{name} as {list(array.shape)}" for name, array in data.items())
            raise InputError(
                f"onnxruntime cannot run the model on the calibration data, fed with {sizes} ({_first_line(failure)});"
                " if it takes other sizes only, give records of such: one more axis in front, over the records"
            ) from failure
        if not dynamic and not counting:
            return _shapes(graph, probes)
    try:
        search = _Search(graph, prober, seed)
        found = search.pair() if dynamic else search.fixed(2 if counting else 1)
    except Exception as failure:  # onnxruntime's errors share no public base class
        if probes:
            return _shapes(graph, probes)
        raise InputError(
            f"onnxruntime cannot run the model on random inputs of any size tried ({_first_line(failure)}); give real"
            " inputs with --data"
        ) from failure
    return _shapes(graph, [probes[0], _other(probes[0], found)] if probes else found)


def _first_line(failure: Exception) -> str:
    return next(iter(str(failure).splitlines()), type(failure).__name__)[:200]


def _shapes(graph: Graph, probes: Sequence[Probe]) -> Shapes:
    inside = size_nodes(graph, probes)[1]
    names = {name for index in inside for name in graph.nodes[index].outputs if name}
    same = {n for n in names if all(np.array_equal(probes[0].values[n], p.values[n]) for p in probes[1:])}
    return Shapes(tuple(probes), frozenset(same))


def size_nodes(graph: Graph, probes: Sequence[Probe]) -> tuple[dict[str, int], set[int]]:
    """The part of a graph that follows from shapes and constants alone.

    Returns:
        the nodes that read a shape, by their output, and the indices of all nodes of the part.
    """
    constant = graph.computed_from_constants
    roots: dict[str, int] = {}
    known: set[str] = set()
    inside: set[int] = set()
    for node in graph.nodes:
        if node.domain or node.captured or not all(n in p.values for n in node.outputs if n for p in probes):
            continue
        if node.op in ("Shape", "Size") and node.inputs[0] not in constant:
            roots[node.outputs[0]] = node.index
        else:
            traced = all(n in known or n in constant for n in node.inputs if n)
            if not traced or not any(n in known for n in node.inputs) or node.op.startswith("Random"):
                continue
        known.update(node.outputs)
        inside.add(node.index)
    return roots, inside


class _Search:
    """Looks for two sizes of the dynamic dimensions at which the model runs."""

    def __init__(self, graph: Graph, prober: _Prober, seed: int) -> None:
        self.graph = graph
        self.prober = prober
        self.seed = seed
        self.error: Exception | None = None
        self.too_large: list[Sizes] = []  # for the memory that there is
        self.inner_batch = False
        dynamic = [(spec, axis) for spec in graph.inputs for axis, dim in enumerate(spec.shape) if dim is None and axis]
        kinds = {_spatial(spec.shape, axis) for spec, axis in dynamic}
        self.spatial, self.other = _SPATIAL if kinds & {1, 2} else _SPATIAL[:1], _OTHERS if 3 in kinds else _OTHERS[:1]
        # [layers, batch, …]: the state of a recurrent network
        self.may_be_inner = any(axis == 1 and spec.shape[0] is not None for spec, axis in dynamic)

    def pair(self) -> list[Probe]:
        """One probe, or two where a second size runs too."""
        for pair in _PAIRS:
            found = [self.run(sizes) for sizes in pair]
            if all(found):
                return [probe for probe in found if probe]
        for inner in (False, True) if self.may_be_inner else (False,):
            self.inner_batch = inner
            for sizes in self.singles():
                first = self.run(sizes)
                if first:
                    second = next((p for near in self.around(sizes) if (p := self.run(near))), None)
                    return [first, second] if second else [first]
        assert self.error is not None
        raise self.error

    def fixed(self, count: int) -> list[Probe]:
        """Runs at the sizes that the model states, as many as it takes, on unlike inputs."""
        runs = [self.prober.run(random_feeds(self.graph, _PAIRS[0][0], self.seed))]
        for seed in range(self.seed + 1, self.seed + count):
            try:
                runs.append(self.prober.run(random_feeds(self.graph, _PAIRS[0][0], seed)))
            except Exception:  # nothing was found in these inputs, say: a model may not run on that
                continue
        return runs

    def run(self, sizes: Sizes) -> Probe | None:
        """A probe at these sizes; None where the model does not run, or takes more memory than there is."""
        if any(all(a >= b for a, b in zip(sizes[1:], large[1:], strict=True)) for large in self.too_large):
            return None
        try:
            feeds = random_feeds(self.graph, sizes, self.seed, inner_batch=self.inner_batch)
            return self.prober.run(feeds, guessed=True)
        except Exception as failure:
            self.error = failure
            if isinstance(failure, MemoryError) or any(said in str(failure) for said in _NO_MEMORY):
                self.too_large.append(sizes)
            return None

    def singles(self) -> Iterator[Sizes]:
        """Sizes of every order of magnitude, small ones first."""
        for other in self.other:
            for height, width in self.spatial:
                for batch in _BATCHES:
                    yield batch, height, width, other

    @staticmethod
    def around(sizes: Sizes) -> Iterator[Sizes]:
        """Sizes near by, those that change most dimensions first."""
        batch, height, width, other = sizes
        for more in (batch + 2, batch):
            for spatial in (
                (height * 2, width * 3),
                (height * 2, width * 2),
                (height + 32, width + 64),
                (height, width),
            ):
                for longer in (other * 5 // 4, other * 3 // 2, other * 2, other - 1, other + 1, other):
                    if (more, *spatial, longer) != sizes:
                        yield more, *spatial, longer


def _other(first: Probe, found: list[Probe]) -> Probe:
    """The probe whose input sizes differ most from the first one's."""

    def alike(probe: Probe) -> int:
        return sum(a == b for name in first.feeds for a, b in zip(first.shapes[name], probe.shapes[name], strict=True))

    return min(found, key=alike)


def random_feeds(graph: Graph, sizes: Sizes, seed: int = 0, *, inner_batch: bool = False) -> dict[str, np.ndarray]:
    """Random inputs: standard normal floats, zeros and ones for integers, true for booleans.

    ``sizes`` are (batch, height, width, other) for the dynamic dimensions; equal symbols get equal sizes, and a
    dimension that the layer reading it fixes gets that one. ``inner_batch`` takes the second axis for the batch where
    the first is static.
    """
    rng = np.random.default_rng(seed)
    symbols: dict[str, int] = {}
    feeds = {}
    protos = {v.name: v for v in graph.model.graph.input}
    for spec in graph.inputs:
        shape: list[int] = []
        fixed = _read_by_weights(graph, spec.name)
        for axis, dim in enumerate(spec.shape):
            if dim is None:
                param = symbol(protos[spec.name].type.tensor_type.shape.dim[axis])
                batch = axis == 0 or (inner_batch and axis == 1 and spec.shape[0] is not None)
                guess = sizes[0] if batch else sizes[_spatial(spec.shape, axis)]
                guess = fixed.get(axis - len(spec.shape), guess)
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
    if len(shape) == 4 and len(dynamic) >= 2:  # the last two, should the channels be dynamic as well
        return 1 + dynamic[-2:].index(axis) if axis in dynamic[-2:] else 3
    return 3


def _read_by_weights(graph: Graph, name: str) -> dict[int, int]:
    """Sizes of an input's axes (from the end) that the weights of the layer which reads it state."""
    seen = set()
    while name not in seen:
        seen.add(name)
        for node in graph.consumers.get(name, ()):
            other = node.inputs[1] if len(node.inputs) > 1 and node.inputs[0] == name else ""
            dims = tuple(graph.stored(other).dims) if other and graph.is_stored(other) else ()
            if node.op == "Conv" and dims:
                return {1 - len(dims): dims[1] * int(node.attributes.get("group", 1))}
            if node.op == "MatMul" and len(dims) == 2:
                return {-1: dims[0]}
            if node.op == "Gemm" and len(dims) == 2 and not node.attributes.get("transA", 0):
                return {-1: dims[1 if node.attributes.get("transB", 0) else 0]}
            if node.op in ("Cast", "Identity", "Sub", "Div", "Mul", "Add", "BatchNormalization"):
                name = node.outputs[0]
                break
    return {}


class _Prober:
    """Runs that show every tensor's shape and type, and the values of the short ones.

    Each costs two runs of the model, and what these hold: one has Shape nodes on all tensors, so that none of them is
    kept; the other gives those that came out short.
    """

    def __init__(self, graph: Graph, runtime: Runtime) -> None:
        self.graph = graph
        self.runtime = replace(runtime, provider="cpu")
        self.declared = {n: t.elem_type for n, t in infer(graph.model).items()} if runtime.as_float32 else {}
        self.float32 = {name for name, kind in self.declared.items() if kind == onnx.TensorProto.FLOAT}
        self._last: tuple[list[str], ort.InferenceSession] | None = None  # short tensors, and what gives them

    @functools.cached_property
    def computed(self) -> dict[str, int]:
        """Types in which the tensors are computed; sequences and the like have none."""
        names = [name for node in self.graph.nodes for name in node.outputs if name]
        session = self.runtime.session(expose(self.graph.model, names), optimise=False)
        found = {}
        for value in session.get_outputs():
            kind = _TENSOR.fullmatch(value.type)
            if kind is not None:
                found[value.name] = int(onnx.TensorProto.DataType.Value(kind[1].upper()))
        return found

    @functools.cached_property
    def _sizes(self) -> ort.InferenceSession:
        model = expose(self.graph.model, [])
        if not {"", "ai.onnx"} & {opset.domain for opset in model.opset_import}:
            model.opset_import.append(onnx.helper.make_opsetid("", _OPSET))
        for name, size in self._shown.items():
            model.graph.node.append(onnx.helper.make_node("Shape", [name], [size]))
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(size))
        return self.runtime.session(model, optimise=False)

    @functools.cached_property
    def _shown(self) -> dict[str, str]:
        """Every tensor's name, to that of its shape."""
        prefix, graph = "/onnxprune/shape", self.graph
        taken = [*graph.producer, *graph.stored_names(), *(spec.name for spec in graph.inputs)]
        while any(name.startswith(prefix) for name in taken):
            prefix += "_"
        return {name: f"{prefix}{k}" for k, name in enumerate(self.computed)}

    def run(self, feeds: Feeds, *, guessed: bool = False) -> Probe:
        """A probe; memory is bounded at sizes that nobody asked for (a GPU's driver reserves addresses as it likes)."""
        guard = bounded if guessed and self.runtime.provider == "cpu" else contextlib.nullcontext
        given = self.runtime.feeds(feeds)
        shapes = {name: tuple(array.shape) for name, array in feeds.items()}
        shapes |= {name: tuple(t.dims) for name in self.graph.stored_names() for t in (self.graph.stored(name),)}
        types = {name: int(onnx.helper.np_dtype_to_tensor_dtype(array.dtype)) for name, array in feeds.items()}
        types |= {name: self.graph.stored(name).data_type for name in self.graph.stored_names()}
        short = []
        session, names = self._sizes, list(self._shown.values())
        with guard():
            sizes = session.run(names, given)
        for name, size in zip(self._shown, sizes, strict=True):
            shapes[name] = tuple(int(n) for n in size)
            computed = self.computed[name]
            # computed in float32 for want of kernels: its values are not those that the model has
            own = not self.runtime.as_float32 or computed != onnx.TensorProto.FLOAT or name in self.float32
            types[name] = computed if own else self.declared.get(name, computed)
            if own and math.prod(shapes[name]) <= _KEEP_VALUES and computed in _READABLE:
                short.append(name)
        if self._last is None or self._last[0] != short:
            self._last = short, self.runtime.session(expose(self.graph.model, short), optimise=False)
        with guard():
            values = dict(zip(short, self._last[1].run(short, given), strict=True)) if short else {}
        return Probe(feeds, shapes, values, types)


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
