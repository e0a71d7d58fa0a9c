"""Models that time a part of a network as it runs inside the network.

Alone, a part would be called from outside and given its input in the layout of the file. Inside, its input comes from
another layer, in whatever layout that layer made it, and a change of layout costs time. So the part stands behind small
convolutions that make its inputs, and several copies of it stand in one model, their results summed up; what a further
copy costs, less what a further small convolution costs, is the part. An input that comes in the layout of the file in
the network too is given from outside, to every copy another one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxprune.graph import FLOATS

COPIES = 3
_SEED = 16  # channels of what the small convolutions read
_SHORT = 1024  # elements of an integer tensor whose values tell what a node does


@dataclass(frozen=True, eq=False)
class Timed:
    """A time with its factor: that of a model, or what every copy adds where one model holds more of them."""

    factor: float
    model: onnx.ModelProto
    many: onnx.ModelProto | None = None

    def seconds(self, one: float, many: float | None) -> float:
        """The time, from those of the models."""
        return self.factor * (one if many is None else (many - one) / (COPIES - 1))

    def error(self, one: float, many: float | None) -> float:
        """The time's standard error, from those of the models' times."""
        return abs(self.factor) * (one if many is None else float(np.hypot(one, many)) / (COPIES - 1))

    def enough(self, error: float) -> float:
        """The standard error of a model's time that comes to one of the time itself."""
        return error / self.error(1.0, None if self.many is None else 1.0)


def chained(model: onnx.ModelProto, made: Sequence[str], summand: str = "", given: Sequence[str] = ()) -> list[Timed]:
    """What to time for a part with one output, an image of floats.

    Args:
        model: the part.
        made: its inputs that come in the layout that a convolution made them in, images of floats too.
        summand: its input that is added to the result, as by a residual sum; each copy takes the one before there.
        given: its inputs that come in the layout of the file.
    """
    parts = [Timed(1.0, *(copies(model, count, made, summand, given) for count in (1, COPIES)))]
    inputs = {value.name: value for value in model.graph.input}
    for name in made:
        if name == summand:  # made once, however many copies there are
            continue
        maker = _maker(inputs[name], model)
        parts.append(Timed(-1.0, copies(maker, 1), copies(maker, COPIES)))
    if not summand and model.graph.node[0].op_type != "Conv":  # into a convolution the sum is fused
        output = _shape_of_output(model)
        if output is not None:
            parts.append(Timed(-1.0, _sums(output, model, 1), _sums(output, model, COPIES)))
    return parts


def copies(
    model: onnx.ModelProto, count: int, made: Sequence[str] = (), summand: str = "", given: Sequence[str] = ()
) -> onnx.ModelProto:
    """A model in which the nodes stand ``count`` times, every copy with weights of its own and all of them used."""
    new = onnx.ModelProto(ir_version=model.ir_version)
    new.opset_import.extend(model.opset_import)
    new.graph.name = "copies"
    for value in model.graph.input:
        for k in range(count if value.name in given else 1):
            seed = new.graph.input.add()
            seed.CopyFrom(value)
            seed.name = f"{value.name}/{k}" if value.name in given else value.name
            if value.name in made:
                seed.type.tensor_type.shape.dim[1].dim_value = _SEED
    shared = {value.name for value in model.graph.input}
    (output,) = (value.name for value in model.graph.output)
    last = ""
    for k in range(count):
        names = {name: name for name in shared} | {"": ""}
        for value in model.graph.input:
            if value.name in given:
                names[value.name] = f"{value.name}/{k}"
            if value.name in made and not (value.name == summand and last):
                names[value.name] = f"{value.name}/{k}"
                new.graph.initializer.append(_small_weight(value, k))
                small = [value.name, f"{value.name}/{k}/w"]
                new.graph.node.append(helper.make_node("Conv", small, [names[value.name]]))
        if summand and last:
            names[summand] = last
        for tensor in model.graph.initializer:
            new.graph.initializer.append(_varied(tensor, k))
        fused = not summand and model.graph.node[0].op_type == "Conv"
        for index, node in enumerate(model.graph.node):
            twin = new.graph.node.add()
            twin.CopyFrom(node)
            twin.name = f"{index}/{k}"
            del twin.input[:], twin.output[:]
            twin.input.extend(names.get(name, f"{name}/{k}") for name in node.input)
            twin.output.extend(f"{name}/{k}" if name else "" for name in node.output)
            if index == 0 and fused and last:  # the sum stands where a residual sum would
                raw = f"{node.output[0]}/{k}"
                twin.output[0] = f"{raw}/raw"
                # where the part is more than the convolution, what is summed has the convolution's shape all the same
                new.graph.node.append(helper.make_node("Add", [f"{raw}/raw", last], [raw]))
        result = f"{output}/{k}"
        if fused or summand or not last:
            last = result
        else:
            new.graph.node.append(helper.make_node("Add", [result, last], [f"{result}/sum"]))
            last = f"{result}/sum"
    new.graph.output.append(helper.make_tensor_value_info(last, model.graph.output[0].type.tensor_type.elem_type, None))
    return new


def _varied(tensor: onnx.TensorProto, k: int) -> onnx.TensorProto:
    """A stored tensor of copy ``k``; of floats with other values, else a runtime may take the copies for one."""
    new = onnx.TensorProto()
    new.CopyFrom(tensor)
    if k and tensor.data_type in FLOATS and tensor.dims:
        array = numpy_helper.to_array(tensor)
        new = numpy_helper.from_array(array * array.dtype.type(1 + k / 64))
    new.name = f"{tensor.name}/{k}"
    return new


def _dims(value: onnx.ValueInfoProto) -> list[int]:
    return [d.dim_value for d in value.type.tensor_type.shape.dim]


def _small_weight(value: onnx.ValueInfoProto, k: int) -> onnx.TensorProto:
    """Weights of the 1 x 1 convolution that makes an input, of copy ``k``."""
    rng = np.random.default_rng(k)
    dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    array = (rng.standard_normal((_dims(value)[1], _SEED, 1, 1)) / _SEED).astype(dtype)
    return numpy_helper.from_array(array, f"{value.name}/{k}/w")


def _maker(value: onnx.ValueInfoProto, model: onnx.ModelProto) -> onnx.ModelProto:
    """One of the small convolutions by itself."""
    kind, shape = value.type.tensor_type.elem_type, _dims(value)
    weight = _small_weight(value, 0)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", weight.name], ["y"])],
        "maker",
        [helper.make_tensor_value_info("x", kind, [shape[0], _SEED, *shape[2:]])],
        [helper.make_tensor_value_info("y", kind, shape)],
        [weight],
    )
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _sums(shape: Sequence[int], model: onnx.ModelProto, count: int) -> onnx.ModelProto:
    """Sums one behind the other of images that convolutions make."""
    kind = model.graph.output[0].type.tensor_type.elem_type
    image = helper.make_tensor_value_info("a", kind, list(shape))
    pair = [helper.make_tensor_value_info(name, kind, [shape[0], _SEED, *shape[2:]]) for name in "ab"]
    weights = [_small_weight(image, k) for k in range(2)]
    nodes = [helper.make_node("Conv", [v.name, w.name], [f"{v.name}0"]) for v, w in zip(pair, weights, strict=True)]
    nodes.append(helper.make_node("Add", ["a0", "b0"], ["s0"]))  # this one is fused
    nodes += [helper.make_node("Add", [f"s{k}", "ab"[k % 2] + "0"], [f"s{k + 1}"]) for k in range(count)]
    output = helper.make_tensor_value_info(f"s{count}", kind, list(shape))
    graph = helper.make_graph(nodes, "sums", pair, [output], weights)
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _shape_of_output(model: onnx.ModelProto) -> list[int] | None:
    try:
        inferred = onnx.shape_inference.infer_shapes(model)
    except onnx.shape_inference.InferenceError:
        return None
    dims = _dims(inferred.graph.output[0])
    return dims if len(dims) == 4 and min(dims) > 0 else None


def signature(model: onnx.ModelProto) -> str:
    """SHA-256 of what a model's time depends on: its nodes, shapes and types, whatever the names and the weights."""
    numbers: dict[str, str] = {"": ""}
    words = [f"{entry.domain}:{entry.version}" for entry in model.opset_import]

    def number(name: str) -> str:
        return numbers.setdefault(name, str(len(numbers)))

    for value in model.graph.input:
        dims = [d.dim_value for d in value.type.tensor_type.shape.dim]
        words.append(f"in {number(value.name)} {value.type.tensor_type.elem_type} {dims}")
    stored = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        for name in node.input:
            if name in stored and name not in numbers:
                tensor = stored[name]
                short = tensor.data_type not in FLOATS and int(np.prod(tensor.dims)) <= _SHORT
                text = numpy_helper.to_array(tensor).tolist() if short else ""
                words.append(f"of {number(name)} {tensor.data_type} {list(tensor.dims)} {text}")
        attributes = sorted(a.SerializeToString(deterministic=True).hex() for a in node.attribute)
        operands = [number(n) for n in node.input], [number(n) for n in node.output]
        words.append(f"{node.domain}.{node.op_type} {operands} {attributes}")
    words.append(f"out {[number(value.name) for value in model.graph.output]}")
    return hashlib.sha256("\n".join(words).encode()).hexdigest()
