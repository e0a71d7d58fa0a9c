"""Records from what yields one at a time: iterables and callables of the user, ONNX test data sets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from onnxprune.errors import InputError
from onnxprune.images import Array, InputSpec, check_values, convert_values, fits, takes_images
from onnxprune.records import Calibration, Request, as_array, count_text, matched, quoted, unused_options


def from_items(items: Iterator[tuple[str, object]], where: str, name: str, request: Request) -> Calibration:
    """Keep the first items, under labels for messages.

    Each is a record, or in a fixed batch a sample; of a model that takes batches of any size a batch of records.
    """
    records: list[dict[str, Array]] = []
    pending: list[dict[str, Array]] = []
    shapes: set[tuple[str, tuple[int, ...]]] = set()
    warnings: dict[str, None] = {}
    for label, item in _guarded(items, where):
        arrays, ignored = _item(item, f"{where}, {label}", request)
        warnings.update(dict.fromkeys(ignored))
        single = all(arrays[spec.name].shape[:1] == (1,) for spec in request.inputs if spec.shape)
        group = single and request.batch > 1
        samples = _samples(arrays, request)
        for spec in request.inputs:
            wanted = replace(spec, shape=(1, *spec.shape[1:])) if group and spec.shape else spec
            array, here = arrays[spec.name], f"{where}, {label}, input '{spec.name}'"
            check_values(wanted, array.shape, array.dtype, request.preprocessing, here)
            shape = convert_values(spec, array, request.preprocessing, here).shape
            shapes.add((spec.name, (1, *shape[1:]) if len(samples) > 1 else shape))
        if group:
            pending.append(arrays)
            if len(pending) < request.batch:
                continue
            samples, pending = [_together(pending, request, where)], []
        records += samples
        if request.samples is not None and len(records) >= request.samples:
            del records[request.samples :]
            break
    if not records:
        found = f"{len(pending)} sample(s) for a batch of {request.batch}" if pending else "none"
        raise InputError(f"{where}: expected at least one record, found {found}; try a source that yields more")

    digest = hashlib.sha256(name.encode())
    for part in sorted(map(_record_digest, records)):  # whatever the order they were drawn in
        digest.update(part)

    def read(spec: InputSpec, index: int) -> Array:
        return convert_values(spec, records[index][spec.name], request.preprocessing, f"{where}, input '{spec.name}'")

    one_shape_each = len(shapes) == len(request.inputs)
    return Calibration(
        source=f"{name}, {count_text(len(records), len(records), 0)}",
        is_random=False,
        batchable=request.dynamic_batch and one_shape_each and all(shape[0] == 1 for _, shape in shapes),
        digest=digest.hexdigest(),
        warnings=(*warnings, *unused_options(request, [array.dtype for array in records[0].values()])),
        _readers={spec.name: partial(read, spec) for spec in request.inputs},
        _order=request.choose(len(records), None),
    )


def _samples(arrays: dict[str, Array], request: Request) -> list[dict[str, Array]]:
    """The records that an item holds: where inputs take batches of any size, one for every row of them all."""
    lengths = {len(array) for array in arrays.values()} if request.dynamic_batch else set()
    if len(lengths) != 1:
        return [arrays]
    return [{name: array[k : k + 1] for name, array in arrays.items()} for k in range(lengths.pop())]


def _record_digest(record: Mapping[str, Array]) -> bytes:
    digest = hashlib.sha256()
    for name, array in record.items():
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.digest()


def _guarded(items: Iterator[tuple[str, object]], where: str) -> Iterator[tuple[str, object]]:
    try:
        yield from items
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise InputError(f"{where}: expected an iterable that yields data, found {error!r}; try it alone") from error


def _item(item: object, where: str, request: Request) -> tuple[dict[str, Array], tuple[str, ...]]:
    """Give every input its array, copied (a loader may reuse its buffer) and with a batch axis; and warnings."""
    warnings: tuple[str, ...] = ()
    if isinstance(item, Mapping):
        arrays, _, warnings = matched(item, request, where)
    elif hasattr(item, "__array__"):
        arrays = {request.only_input(where, "a single array").name: as_array(item, where)}
    else:
        raise InputError(
            f"{where}: expected an array, or a dict of arrays by the names of the inputs "
            f"{quoted(s.name for s in request.inputs)}, found {type(item).__name__}; try to yield "
            f"{'dicts' if len(request.inputs) > 1 else 'the images without their labels'}"
        )
    return {spec.name: _with_batch_axis(spec, arrays[spec.name]).copy() for spec in request.inputs}, warnings


def _with_batch_axis(spec: InputSpec, array: Array) -> Array:
    """Add the missing axis to a single sample; a 3-D image has its 1, 3 or 4 channels first or last."""
    rank = len(spec.shape)
    if takes_images(spec, array.dtype):
        single = array.ndim == 2 or (array.ndim == 3 and {array.shape[0], array.shape[2]} & {1, 3, 4})
    else:
        single = rank > 0 and fits(spec.shape[1:], array.shape)
    return array[None] if single else array


def _together(parts: list[dict[str, Array]], request: Request, where: str) -> dict[str, Array]:
    try:
        return {
            spec.name: np.concatenate([part[spec.name] for part in parts]) if spec.shape else parts[0][spec.name]
            for spec in request.inputs
        }
    except ValueError as error:
        raise InputError(
            f"{where}: expected samples of one shape to make a batch of {request.batch}, found {error}; "
            f"try to yield whole batches"
        ) from error


def test_data_sets(folder: Path, *, itself: bool) -> list[Path]:
    """ONNX test data sets in a folder, in order; ``itself`` says that the folder may be one."""
    if itself and any(folder.glob("input_*.pb")):
        return [folder]
    return [path for path in _by_number(folder.glob("test_data_set_*")) if any(path.glob("input_*.pb"))]


def _by_number(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: (_number(path), path.name))


def _number(path: Path) -> int:
    digits = path.stem.rpartition("_")[2]
    return int(digits) if digits.isdecimal() else -1


def from_test_data(sets: Sequence[Path], where: str, name: str, request: Request) -> Calibration:
    """Feed from ONNX test data sets, a record each."""
    order = request.choose(len(sets), None)
    items = ((sets[i].name, _read_test_data(sets[i], request, where)) for i in order)
    return from_items(items, where, name, request)


def _read_test_data(folder: Path, request: Request, where: str) -> dict[str, Array]:
    """Read input_k.pb: for the input that the tensor is named after, else the model's input number k."""
    import onnx

    names = [spec.name for spec in request.inputs]
    arrays: dict[str, Array] = {}
    for path in _by_number(folder.glob("input_*.pb")):
        here = f"{where}, {folder.name}/{path.name}"
        try:
            tensor = onnx.TensorProto.FromString(path.read_bytes())
            array = onnx.numpy_helper.to_array(tensor)
        except Exception as error:  # protobuf's own classes, and what onnx raises for types it cannot hold
            raise InputError(
                f"{here}: expected an ONNX tensor, found a file that cannot be read as one ({error}); try an .npz file"
            ) from error
        number = _number(path)
        name = tensor.name if tensor.name in names else names[number] if 0 <= number < len(names) else None
        if name is None or name in arrays:
            raise InputError(
                f"{here}: expected one tensor for each of the inputs {quoted(names)}, found "
                f"{f'two for {name!r}' if name else 'one more'}; try to remove it"
            )
        arrays[name] = array
    return arrays
