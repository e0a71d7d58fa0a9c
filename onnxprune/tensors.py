"""Stored tensors: in the model's message, or in files beside it.

Protobuf holds two gigabytes at the most, and a model of that size should not be held several times. What a file keeps
outside stays outside: tensors are mapped into memory when they are looked at, and new values of such a tensor go to
files of their own until the model is written.
"""

from __future__ import annotations

import contextvars
import functools
import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxprune.errors import InputError

OUTSIDE = 1 << 16  # bytes from which on a tensor stays where it is
MESSAGE = (1 << 31) - (1 << 26)  # bytes of tensors that one message may hold
ALIGNED = 4096  # bytes: where a tensor begins in a file, so that it can be mapped
_CHUNK = 1 << 24
_WEIGHTS: dict[int, int] = {  # bytes of a number, of the types that NumPy knows and that no operator takes sizes in
    TensorProto.FLOAT: 4,
    TensorProto.DOUBLE: 8,
    TensorProto.FLOAT16: 2,
    TensorProto.INT8: 1,
    TensorProto.UINT8: 1,
}
_PACKED = frozenset({TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1, TensorProto.STRING})


def graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The main graph, and the bodies within it and within functions."""
    pending = [model.graph]
    pending += [body for function in model.functions for node in function.node for body in bodies(node)]
    while pending:
        graph = pending.pop()
        yield graph
        pending += [body for node in graph.node for body in bodies(node)]


def bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The bodies of one node."""
    for attribute in node.attribute:
        yield from [attribute.g] if attribute.HasField("g") else attribute.graphs


def nodes_within(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of the bodies within it."""
    for node in graph.node:
        yield node
        for body in bodies(node):
            yield from nodes_within(body)


def tensors_of(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    """Tensors that stand in a node's attributes."""
    for attribute in node.attribute:
        yield from [attribute.t] if attribute.HasField("t") else attribute.tensors


def every_tensor(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that a model stores."""
    for graph in graphs(model):
        yield from graph.initializer
        yield from (part for sparse in graph.sparse_initializer for part in (sparse.values, sparse.indices))
        for node in graph.node:
            yield from tensors_of(node)
    for function in model.functions:
        for node in function.node:
            yield from tensors_of(node)


# ------------------------------------------------------------------------------------------------ reading


def with_dense(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same with sparse tensors written out, so that they are weights like others; itself where there are none."""
    if not any(graph.sparse_initializer or any(map(_is_sparse, graph.node)) for graph in graphs(model)):
        return model
    dense = onnx.ModelProto()
    dense.CopyFrom(model)
    for graph in graphs(dense):
        graph.initializer.extend(map(_written_out, graph.sparse_initializer))
        del graph.sparse_initializer[:]
        for node in filter(_is_sparse, graph.node):
            (attribute,) = (a for a in node.attribute if a.HasField("sparse_tensor"))
            value = helper.make_attribute("value", _written_out(attribute.sparse_tensor))
            attribute.CopyFrom(value)
    return dense


def _is_sparse(node: onnx.NodeProto) -> bool:
    return any(attribute.HasField("sparse_tensor") for attribute in node.attribute)


def _written_out(tensor: onnx.SparseTensorProto) -> onnx.TensorProto:
    """Its indices count the elements, or name a place along every axis."""
    values, indices, shape = array_of(tensor.values), array_of(tensor.indices), tuple(tensor.dims)
    array = np.zeros(shape, values.dtype)
    array[np.unravel_index(indices, shape) if indices.ndim == 1 else tuple(indices.T)] = values
    return numpy_helper.from_array(array, tensor.values.name)


def is_outside(tensor: onnx.TensorProto) -> bool:
    """Whether the tensor's values are in another file."""
    return tensor.data_location == TensorProto.EXTERNAL


def is_attached(tensor: onnx.TensorProto) -> bool:
    """Whether it is known in which folder that file is."""
    return "basepath" in _entries(tensor)


def array_of(tensor: onnx.TensorProto) -> np.ndarray:
    """A tensor's values; those outside are mapped, not read."""
    if not is_outside(tensor):
        return numpy_helper.to_array(tensor)
    path, offset, length = _place(tensor)
    raw = np.memmap(path, np.uint8, "r", offset, (length,))
    return np.asarray(raw).view(helper.tensor_dtype_to_np_dtype(tensor.data_type)).reshape(tuple(tensor.dims))


def _entries(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _place(tensor: onnx.TensorProto) -> tuple[Path, int, int]:
    entries = _entries(tensor)
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    length = int(np.prod(tensor.dims, dtype=np.int64)) * np.dtype(dtype).itemsize
    return Path(entries["basepath"]) / entries["location"], int(entries.get("offset") or 0), length


def attach(model: onnx.ModelProto, path: Path) -> None:
    """Make the tensors known that a file keeps outside: large initializers stay there, others are read.

    Raises:
        InputError: a tensor's file is not within the model's folder, is not there, or is too short.
    """
    for tensor in model.graph.initializer:
        if is_outside(tensor):
            _attach(tensor, path, stays=tensor.data_type not in _PACKED)
    for tensor in every_tensor(model):
        if is_outside(tensor) and not is_attached(tensor):
            _attach(tensor, path, stays=False)


def files_of(path: Path) -> list[Path]:
    """Files that a model keeps tensors in; none where it cannot be read, of which whoever reads it has to speak."""
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception:  # protobuf's own errors share no base class
        return []
    names = {_entries(tensor).get("location", "") for tensor in every_tensor(model) if is_outside(tensor)} - {""}
    return [path.parent / name for name in sorted(names)]


def _attach(tensor: onnx.TensorProto, path: Path, *, stays: bool) -> None:
    root, location = path.parent.resolve(), _entries(tensor).get("location", "")
    target = (root / location).resolve()
    if not location or Path(location).is_absolute() or not target.is_relative_to(root):
        raise InputError(
            f"tensor {tensor.name!r} of {path} names external data outside the model's folder"
            f" ({location!r}); expected a file beside the model"
        )
    tensor.external_data.append(onnx.StringStringEntryProto(key="basepath", value=str(root)))
    try:
        _, offset, length = _place(tensor)
        if stays and offset + length > target.stat().st_size:
            raise OSError(f"{location} ends before tensor {tensor.name!r}")
        if stays and length >= OUTSIDE:
            return
        onnx.external_data_helper.load_external_data_for_tensor(tensor, str(root))
    except Exception as error:  # the machine's, and those of onnx
        raise InputError(f"the external data of {path} cannot be read: {error}") from error
    del tensor.external_data[:]
    tensor.data_location = TensorProto.DEFAULT


def detached(model: onnx.ModelProto, most: int | None = None) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A message without its large initializers, and their values, where the whole is outside or too large for one.

    Args:
        model: that may hold tensors itself, or name their places.
        most: bytes of tensors that the message may keep; if not given, what one message can hold.
    """
    most, inline = MESSAGE if most is None else most, sum(map(_held, model.graph.initializer))
    if inline <= most and not any(map(is_outside, model.graph.initializer)):
        return model, {}
    small, values = _but_initializers(model), {}
    for tensor in model.graph.initializer:
        if is_outside(tensor) or (inline > most and _held(tensor) >= OUTSIDE):
            values[tensor.name] = array_of(tensor)
            small.graph.initializer.append(_outside(tensor, "elsewhere", 0, values[tensor.name].nbytes))
        else:
            small.graph.initializer.append(tensor)
    return small, values


def _held(tensor: onnx.TensorProto) -> int:
    """Bytes of a tensor that its message holds as they are and that may be weights; they are not read to be counted."""
    size = _WEIGHTS.get(int(tensor.data_type), 0) if tensor.HasField("raw_data") else 0
    return size * int(np.prod(tensor.dims, dtype=np.int64))


def _but_initializers(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without the main graph's initializers, which are not copied on the way."""
    copy = onnx.ModelProto()
    for part, of, but in ((copy, model, "graph"), (copy.graph, model.graph, "initializer")):
        for field, value in of.ListFields():
            if field.name == but:
                continue
            if field.is_repeated:
                getattr(part, field.name).extend(value)
            elif field.message_type is not None:
                getattr(part, field.name).CopyFrom(value)
            else:
                setattr(part, field.name, value)
    return copy


def _outside(like: onnx.TensorProto, location: str, offset: int, length: int) -> onnx.TensorProto:
    """A tensor of the same name, type and shape that names its place."""
    tensor = TensorProto(name=like.name, data_type=like.data_type, dims=like.dims, doc_string=like.doc_string)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.append(onnx.StringStringEntryProto(key=key, value=value))
    return tensor


def size_of(model: onnx.ModelProto) -> int:
    """Bytes of the message, and of the tensors outside of it."""
    small, values = detached(model)
    return int(small.ByteSize()) + sum(array.nbytes for array in values.values())


def digest(model: onnx.ModelProto) -> str:
    """SHA-256 of the model's deterministic serialisation, and of the tensors outside of it; hexadecimal."""
    small, values = detached(model)
    found = hashlib.sha256(small.SerializeToString(deterministic=True))
    for array in values.values():
        raw = array.reshape(-1).view(np.uint8)
        for start in range(0, len(raw), _CHUNK):
            found.update(raw[start : start + _CHUNK].tobytes())
    return found.hexdigest()


# ------------------------------------------------------------------------------------- new values, for a while


class _Scratch:
    """A folder for new values, made when it is needed."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.count = 0

    def put(self, array: np.ndarray, location: str) -> Path:
        """Write the values to a file of that name in a folder of its own; returns the folder."""
        if self.folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix="onnxprune-"))
        self.count += 1
        folder = self.folder / str(self.count)
        target = folder / location
        target.parent.mkdir(parents=True)
        np.ascontiguousarray(array).tofile(target)
        return folder

    def keep(self, results: Sequence[object], models: Sequence[onnx.ModelProto]) -> None:
        """Remove what the models do not refer to now, and the rest with the last of the results."""
        if self.folder is None:
            return
        used = {_entries(t)["basepath"] for model in models for t in model.graph.initializer if is_outside(t)}
        for folder in self.folder.iterdir():
            if str(folder) not in used:
                shutil.rmtree(folder, ignore_errors=True)
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        for result in results:
            weakref.finalize(result, id, self)  # which holds this until the result goes

    def close(self) -> None:
        """Remove everything."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


_CURRENT: contextvars.ContextVar[_Scratch | None] = contextvars.ContextVar("scratch", default=None)
_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


def with_scratch(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Give a function a place for the new values of tensors outside.

    The files that ``model`` of its result, or of each of a tuple of results, refers to stay as long as a result does;
    the others go at the end.
    """

    @functools.wraps(function)
    def wrapped(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        scratch = _Scratch()
        token = _CURRENT.set(scratch)
        try:
            result = function(*args, **kwargs)
            several: tuple[Any, ...] = result if isinstance(result, tuple) else (result,)
            kept = [each for each in several if isinstance(getattr(each, "model", None), onnx.ModelProto)]
            if kept:
                scratch.keep(kept, [each.model for each in kept])
            else:
                scratch.close()
            return result
        except BaseException:
            scratch.close()
            raise
        finally:
            _CURRENT.reset(token)

    return wrapped


def stored(array: np.ndarray, like: onnx.TensorProto) -> onnx.TensorProto:
    """New values of a tensor: beside the message where the tensor was, if there is a place for them."""
    scratch = _CURRENT.get()
    if scratch is None or not is_outside(like) or array.nbytes < OUTSIDE:
        new = numpy_helper.from_array(np.asarray(array, order="C"), like.name)
        new.doc_string = like.doc_string
        return new
    entries = _entries(like)
    folder = scratch.put(array, entries["location"])
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    shape = TensorProto(name=like.name, data_type=kind, dims=array.shape, doc_string=like.doc_string)
    new = _outside(shape, entries["location"], 0, array.nbytes)
    origin = entries.get("origin", entries["basepath"])  # where the model keeps the file that must not be overwritten
    for key, value in (("basepath", str(folder)), ("origin", origin)):
        new.external_data.append(onnx.StringStringEntryProto(key=key, value=value))
    return new


# ------------------------------------------------------------------------------------------------ writing


def layout(
    model: onnx.ModelProto, path: Path, taken: Collection[Path] = ()
) -> tuple[onnx.ModelProto, dict[Path, list[np.ndarray]]]:
    """The message to write, and what goes into files beside it, each value aligned.

    Tensors that were outside go to files of the same names beside the new one, or to one named after it where those are
    the files that they come from, those of another model there, or places that are ``taken``.
    """
    small, values = detached(model)
    if not values:
        return model, {}
    origin = {t.name: t for t in model.graph.initializer}
    outside = [_entries(t) for t in model.graph.initializer if is_outside(t)]
    taken = {*taken, *((Path(e.get("origin", e["basepath"])) / e["location"]).resolve() for e in outside)}
    replaced = files_of(path)
    files: dict[Path, list[np.ndarray]] = {}
    ends: dict[Path, int] = {}
    for tensor in small.graph.initializer:
        if tensor.name not in values:
            continue
        location = _entries(origin[tensor.name]).get("location", f"{path.name}.data")
        target = path.parent / location
        if target.resolve() in taken or (target.exists() and target not in replaced):
            location = f"{path.name}.data"
            target = path.parent / location
        start = -(-ends.get(target, 0) // ALIGNED) * ALIGNED
        array = values[tensor.name]
        files.setdefault(target, []).append(array)
        ends[target] = start + array.nbytes
        tensor.CopyFrom(_outside(tensor, location, start, array.nbytes))
    return small, files
