"""Calibration data from everywhere: arrays, files, folders, callables, the neighbours of the model.

Whatever the source, it becomes *records*: record r gives every input of the model an array. What a record
holds follows from the shapes of the inputs, for each input by the first rule that applies:

1. constant: the array has the input's own shape and the input's first dimension is fixed (``sr`` of shape
   [], a ``state`` of [2, 1, 128]): every record gets it whole.
2. whole: the array has one axis more than the input: record r gets ``array[r]``.
3. samples: the first axis counts samples: record r gets sample r where the input's first dimension is
   dynamic or 1, and samples rb to rb + b - 1 where all inputs have the same fixed first dimension b.

uint8 arrays for a 4-D input are images (`onnxprune.images`); floats are taken as preprocessed already. An
iterable or an ONNX test data set gives one record per item, of the input's own shape (a missing batch axis
of 1 is added); where the inputs have a fixed b > 1, items of batch 1 are put together b at a time.

Arrays in files are mapped or kept as stored, images are decoded when asked for: only `Calibration.feeds`
makes floats, of the records that it is asked for.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import mmap
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune.errors import InputError, InternalError
from onnxprune.images import (
    IMAGE_SUFFIXES,
    Array,
    InputSpec,
    Preprocessing,
    check_values,
    convert_values,
    find_images,
    fits,
    model_layout,
    open_images,
    shape_text,
    takes_images,
)

__all__ = ["Calibration", "InputSpec", "Preprocessing", "load_calibration"]

_LABELS = frozenset(
    ("label", "labels", "target", "targets", "y", "y_train", "y_test", "class", "classes", "names", "filenames", "ids")
)
_CALLABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_RANDOM_RECORDS = 64
_DEFAULT = Preprocessing()
_KINDS = "an .npy or .npz file, a folder of images or of ONNX test data, or module:function"


@dataclass(frozen=True, eq=False)
class Calibration:
    """Records to feed the model with, shuffled by the seed and read on demand.

    ``batchable`` says that a record is one sample and that several may be fed at once; otherwise each is
    fed by itself. ``digest`` is the SHA-256 of what the records were made from (names, types and content of
    the used part); both halves of a `split` keep the source and digest of the whole.
    """

    source: str
    is_random: bool
    batchable: bool
    digest: str
    warnings: tuple[str, ...]
    _readers: Mapping[str, Callable[[int], Array]] = field(repr=False)
    _order: tuple[int, ...] = field(repr=False)

    def __len__(self) -> int:
        """Count the records."""
        return len(self._order)

    def feeds(self, indices: Sequence[int]) -> dict[str, Array]:
        """Read the records of these positions: every input's name, with its type, concatenated on axis 0."""
        if len(indices) != 1 and not (self.batchable and len(indices)):
            raise InternalError(f"calibration: expected one record at a time of {self.source}, found {len(indices)}")
        chosen = [self._order[index] for index in indices]
        feeds = {}
        for name, read in self._readers.items():
            parts = [read(record) for record in chosen]
            feeds[name] = np.asarray(parts[0] if len(parts) == 1 else np.concatenate(parts), order="C")
        return feeds

    def split(self, held_out: int) -> tuple[Calibration, Calibration]:
        """Part the records into those to fit and, the last ones, those held out."""
        if not 0 <= held_out < len(self):
            raise InputError(
                f"calibration data {self.source}: expected more than the {held_out} records to hold out, found "
                f"{len(self)}; try more data"
            )
        cut = len(self) - held_out
        return replace(self, _order=self._order[:cut]), replace(self, _order=self._order[cut:])


@dataclass(frozen=True)
class _Request:
    """What the user wants, apart from the source."""

    inputs: tuple[InputSpec, ...]
    samples: int | None
    seed: int
    preprocessing: Preprocessing

    def choose(self, count: int, limit: int | None) -> tuple[int, ...]:
        return tuple(int(i) for i in np.random.default_rng(self.seed).permutation(count)[:limit])

    @property
    def batch(self) -> int:
        """The batch size that the model insists on; 1 where it does not, or where inputs disagree."""
        sizes = {spec.shape[0] for spec in self.inputs if spec.shape}
        return (sizes.pop() or 1) if len(sizes) == 1 else 1

    @property
    def dynamic_batch(self) -> bool:
        return all(spec.shape and spec.shape[0] is None for spec in self.inputs)

    def only_input(self, where: str, what: str) -> InputSpec:
        if len(self.inputs) > 1:
            raise InputError(
                f"{where}: expected data for the {len(self.inputs)} inputs {_names(s.name for s in self.inputs)}, "
                f"found {what}, which feeds one; try an .npz file with an array for each, or dicts from a callable"
            )
        return self.inputs[0]


def load_calibration(
    source: object,
    inputs: Sequence[InputSpec],
    *,
    model_path: Path | None = None,
    samples: int | None = None,
    seed: int = 0,
    preprocessing: Preprocessing = _DEFAULT,
    dynamic: Mapping[str, Sequence[int]] | None = None,
) -> Calibration:
    """Make records for the model's inputs from a source.

    ``source`` is a path (.npy, .npz, a folder of images, an ONNX ``test_data_set_0`` or a folder of them), a
    string ``package.module:function``, an array, a mapping of arrays, a callable without arguments, or an
    iterable of arrays or dicts. None looks beside the model ``m.onnx`` for ``m.calib.npz``,
    ``m/test_data_set_*`` and ``test_data_set_*``, and else takes random numbers: their shapes have 1 for a
    dynamic batch, 224 for other dynamic dimensions of images and 16 elsewhere, or are those of ``dynamic``
    (input's name to its shape).

    At most ``samples`` records are used, drawn with the seed (of an iterable: the first ones, shuffled). None
    means all, 64 of random data; an endless iterable needs a number. Raises `InputError` for data that do
    not suit the inputs.

    >>> images = np.zeros((5, 8, 8, 3), np.uint8)
    >>> data = load_calibration(images, [InputSpec("x", (None, 3, 8, 8), np.dtype("float32"))])
    >>> len(data), data.batchable, data.feeds([0, 1])["x"].shape
    (5, True, (2, 3, 8, 8))
    """
    if samples is not None and samples < 1:
        raise InputError(f"calibration data: expected at least 1 sample, found {samples}; try 256")
    if seed < 0:
        raise InputError(f"calibration data: expected a seed of 0 or more, found {seed}; try 0")
    if not inputs:
        raise InputError("calibration data: expected a model with inputs, found one without; there is nothing to feed")
    for spec in inputs:
        if not (spec.is_float or spec.dtype.kind in "iub"):
            raise InputError(
                f"model's input '{spec.name}': expected floats, integers or booleans, found {spec.dtype}; "
                "try to cut that part off the model"
            )
    request = _Request(tuple(inputs), samples, seed, preprocessing)
    if source is None:
        return _from_neighbours(model_path, request, dynamic or {})
    if isinstance(source, str | Path):
        return _from_text(source, request)
    return _from_object(source, "calibration data", "", request)


# ------------------------------------------------------------------------- from a source to records


def _from_text(source: str | Path, request: _Request) -> Calibration:
    path = Path(source)
    where = f"calibration data {source}"
    if path.is_dir():
        return _from_folder(path, where, request)
    if path.is_file():
        return _from_file(path, where, request)
    if isinstance(source, str) and _CALLABLE.fullmatch(source):
        with _working_directory_importable():
            return _from_object(_import(source, where), where, source, request)
    raise InputError(f"{where}: expected {_KINDS}, found no such file or folder; try to check the path")


def _from_object(source: object, where: str, name: str, request: _Request) -> Calibration:
    """Take what Python holds; a callable is called once, and what it returns is taken instead."""
    if callable(source) and not hasattr(source, "__array__"):
        name = name or "callable"
        try:
            source = source()
        except Exception as error:  # the user's code may raise anything
            raise InputError(f"{where}: expected a callable that yields data, found {error!r}; try it alone") from error
    if isinstance(source, Mapping):
        arrays, keys, warnings = _matched(source, request, where)
        return _from_arrays(arrays, keys, where, name or "arrays", request, warnings)
    if hasattr(source, "__array__"):
        spec = request.only_input(where, "a single array")
        return _from_arrays({spec.name: _array(source, where)}, {}, where, name or "array", request)
    if isinstance(source, str | bytes) or not hasattr(source, "__iter__"):
        raise InputError(
            f"{where}: expected a path, an array, a mapping of arrays, or a callable or iterable that yields them, "
            f"found {type(source).__name__}; try a NumPy array"
        )
    if isinstance(source, list | tuple):
        items: Iterator[tuple[str, object]] = ((f"record {i}", source[i]) for i in request.choose(len(source), None))
    else:
        items = ((f"record {i}", item) for i, item in enumerate(source))
    return _from_items(items, where, name or "iterable", request)


def _from_file(path: Path, where: str, request: _Request) -> Calibration:
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise InputError(f"{where}: expected {_KINDS}, found a single image; try the folder that holds it")
    try:
        with path.open("rb") as file:
            magic = file.read(6)
            file.seek(0)
            if magic.startswith(b"PK"):
                with np.load(file, allow_pickle=False) as archive:
                    keys, warnings = _match(archive.files, request, where)
                    arrays = {name: archive[key] for name, key in keys.items()}
            elif magic.startswith(b"\x93NUMPY"):
                spec = request.only_input(where, "a single array")
                keys, warnings = {}, ()
                arrays = {spec.name: np.load(path, mmap_mode="r", allow_pickle=False)}
            else:
                found = "other content" if magic else "an empty file"
                raise InputError(
                    f"{where}: expected {_KINDS}, found {found}; try numpy.save or numpy.savez to write it"
                )
    except InputError:
        raise
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"{where}: expected arrays of numbers written by numpy.save or numpy.savez, found a file that cannot be "
            f"read ({str(error) or type(error).__name__}); try to write it again"
        ) from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):  # a zip file of something else
            raise InputError(f"{where}: expected an array as '{keys[name]}', found other content; try numpy.savez")
    return _from_arrays(arrays, keys, where, path.name, request, warnings)


def _from_folder(folder: Path, where: str, request: _Request) -> Calibration:
    if sets := _test_data_sets(folder, itself=True):
        return _from_test_data(sets, where, folder.name, request)
    if paths := find_images(folder):
        return _from_images(folder, paths, where, request)
    found = "other files only" if any(folder.iterdir()) else "an empty folder"
    raise InputError(
        f"{where}: expected images ({', '.join(sorted(IMAGE_SUFFIXES))}) or test_data_set_*/input_*.pb, found {found}; "
        "try another folder"
    )


def _from_neighbours(model_path: Path | None, request: _Request, dynamic: Mapping[str, Sequence[int]]) -> Calibration:
    """Take what lies beside the model, else random numbers; test data there may belong to another model."""
    refused = []
    if model_path is not None:
        beside = model_path.with_suffix(".calib.npz")
        if beside.is_file():
            return _from_file(beside, f"calibration data {beside}", request)
        for folder in (model_path.with_suffix(""), model_path.parent):
            if sets := _test_data_sets(folder, itself=False):
                try:
                    return _from_test_data(sets, f"calibration data {folder}", folder.name, request)
                except InputError as error:
                    refused.append(f"ONNX test data beside the model are not used: {error}")
    random = _random(request, dynamic)
    return replace(random, warnings=(*refused, *random.warnings))


# ------------------------------------------------------------------------------------------- arrays


@dataclass(frozen=True)
class _Column:
    """The array that feeds one input, cut into records by the rules above."""

    spec: InputSpec
    values: Array
    batch: int  # samples per record; 0 where a record is a whole feed
    constant: bool
    preprocessing: Preprocessing
    where: str

    @property
    def records(self) -> int:
        return len(self.values) // (self.batch or 1)

    def raw(self, record: int) -> Array:
        if self.constant:
            return self.values
        part = self.values[slice(record * self.batch, (record + 1) * self.batch) if self.batch else record]
        mapped: Any = getattr(self.values, "_mmap", None)
        if not hasattr(mapped, "madvise"):
            return np.asarray(part)
        found = np.array(part)  # what is mapped would count as the process' own memory from now on
        mapped.madvise(mmap.MADV_DONTNEED)
        return found

    def read(self, record: int) -> Array:
        first = record * (self.batch or 1)
        last = f" to {first + self.batch - 1}" if self.batch > 1 else ""
        where = self.where if self.constant else f"{self.where}, sample {first}{last}"
        return convert_values(self.spec, self.raw(record), self.preprocessing, where)


def _column(spec: InputSpec, values: Array, request: _Request, where: str) -> _Column:
    """Find the rule that applies to an array, and refuse what does not suit the input."""
    rank = len(spec.shape)
    dynamic = rank > 0 and spec.shape[0] is None
    batch = (spec.shape[0] or 1) if rank else 0
    if dynamic and values.ndim == rank + 1 and values.shape[1] == 1:
        values = values[:, 0]  # feeds of one sample each are samples
    constant = not dynamic and fits(spec.shape, values.shape)
    if constant or values.ndim == rank + 1:
        wanted, found, batch = spec, values.shape[0 if constant else 1 :], 0
    elif rank and batch in (1, request.batch):
        wanted, found = replace(spec, shape=(None, *spec.shape[1:])), values.shape
    else:
        raise InputError(
            f"{where}: expected shape {shape_text(spec.shape)} for every record, or that with one leading axis more, "
            f"for input '{spec.name}', found {list(values.shape)}; try numpy.stack over the records"
        )
    if not constant and values.ndim and len(values) < max(batch, 1):
        raise InputError(
            f"{where}: expected at least {max(batch, 1)} sample(s), as many as a batch of input '{spec.name}' "
            f"{shape_text(spec.shape)}, found {len(values)}; try more data"
        )
    check_values(wanted, found, values.dtype, request.preprocessing, where)
    return _Column(spec, values, batch, constant, request.preprocessing, where)


def _from_arrays(
    arrays: Mapping[str, Array],
    keys: Mapping[str, str],
    where: str,
    name: str,
    request: _Request,
    warnings: Sequence[str] = (),
) -> Calibration:
    """Feed each input from one array; ``keys`` says under which key of the source it was found."""
    columns = [
        _column(spec, arrays[spec.name], request, f"{where}, key '{keys[spec.name]}'" if keys else where)
        for spec in request.inputs
    ]
    counts = {column.spec.name: column.records for column in columns if not column.constant}
    if len(set(counts.values())) > 1:
        text = ", ".join(f"{count} for '{name}'" for name, count in counts.items())
        raise InputError(f"{where}: expected as many records for every input, found {text}; try arrays of equal length")
    total = next(iter(counts.values()), 1)
    order = request.choose(total, request.samples)

    digest = hashlib.sha256(name.encode())
    for column in columns:
        digest.update(f"{column.where.removeprefix(where)} {column.values.dtype} {column.values.shape[1:]}".encode())
        for record in [0] if column.constant else sorted(order):
            digest.update(column.raw(record).tobytes())
            if not takes_images(column.spec, column.values.dtype):
                column.read(record)  # refuses NaN and what the input's type cannot hold

    batch = max(column.batch for column in columns)
    return Calibration(
        source=f"{name}{_key_text(keys)}, {_count_text(len(order), total, batch)}",
        is_random=False,
        batchable=request.dynamic_batch and all(column.batch for column in columns),
        digest=digest.hexdigest(),
        warnings=(*warnings, *_unused_options(request, [c.values.dtype for c in columns])),
        _readers={column.spec.name: column.read for column in columns},
        _order=order,
    )


# ------------------------------------------------------------------- iterables and ONNX test data sets


def _from_items(items: Iterator[tuple[str, object]], where: str, name: str, request: _Request) -> Calibration:
    """Keep the first items, each a record (or, in a fixed batch, a sample) under a label for messages."""
    records: list[dict[str, Array]] = []
    pending: list[dict[str, Array]] = []
    shapes: set[tuple[str, tuple[int, ...]]] = set()
    warnings: dict[str, None] = {}
    for label, item in _guarded(items, where):
        arrays, ignored = _item(item, f"{where}, {label}", request)
        warnings.update(dict.fromkeys(ignored))
        single = all(arrays[spec.name].shape[:1] == (1,) for spec in request.inputs if spec.shape)
        group = single and request.batch > 1
        for spec in request.inputs:
            wanted = replace(spec, shape=(1, *spec.shape[1:])) if group and spec.shape else spec
            array, here = arrays[spec.name], f"{where}, {label}, input '{spec.name}'"
            check_values(wanted, array.shape, array.dtype, request.preprocessing, here)
            shapes.add((spec.name, convert_values(spec, array, request.preprocessing, here).shape))
        if group:
            pending.append(arrays)
            if len(pending) < request.batch:
                continue
            arrays, pending = _together(pending, request, where), []
        records.append(arrays)
        if len(records) == request.samples:
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
        source=f"{name}, {_count_text(len(records), len(records), 0)}",
        is_random=False,
        batchable=request.dynamic_batch and one_shape_each and all(shape[0] == 1 for _, shape in shapes),
        digest=digest.hexdigest(),
        warnings=(*warnings, *_unused_options(request, [array.dtype for array in records[0].values()])),
        _readers={spec.name: partial(read, spec) for spec in request.inputs},
        _order=request.choose(len(records), None),
    )


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
    except Exception as error:  # the user's code may raise anything
        raise InputError(f"{where}: expected an iterable that yields data, found {error!r}; try it alone") from error


def _item(item: object, where: str, request: _Request) -> tuple[dict[str, Array], tuple[str, ...]]:
    """Give every input its array, copied (a loader may reuse its buffer) and with a batch axis; and warnings."""
    warnings: tuple[str, ...] = ()
    if isinstance(item, Mapping):
        arrays, _, warnings = _matched(item, request, where)
    elif hasattr(item, "__array__"):
        arrays = {request.only_input(where, "a single array").name: _array(item, where)}
    else:
        raise InputError(
            f"{where}: expected an array, or a dict of arrays by the names of the inputs "
            f"{_names(s.name for s in request.inputs)}, found {type(item).__name__}; try to yield the images without "
            "their labels"
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


def _together(parts: list[dict[str, Array]], request: _Request, where: str) -> dict[str, Array]:
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


def _test_data_sets(folder: Path, *, itself: bool) -> list[Path]:
    if itself and any(folder.glob("input_*.pb")):
        return [folder]
    return [path for path in _by_number(folder.glob("test_data_set_*")) if any(path.glob("input_*.pb"))]


def _by_number(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: (_number(path), path.name))


def _number(path: Path) -> int:
    digits = path.stem.rpartition("_")[2]
    return int(digits) if digits.isdecimal() else -1


def _from_test_data(sets: Sequence[Path], where: str, name: str, request: _Request) -> Calibration:
    order = request.choose(len(sets), None)
    items = ((sets[i].name, _read_test_data(sets[i], request, where)) for i in order)
    return _from_items(items, where, name, request)


def _read_test_data(folder: Path, request: _Request, where: str) -> dict[str, Array]:
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
                f"{here}: expected one tensor for each of the inputs {_names(names)}, found "
                f"{f'two for {name!r}' if name else 'one more'}; try to remove it"
            )
        arrays[name] = array
    return arrays


# ----------------------------------------------------------------------------------- folders of images


def _from_images(folder: Path, paths: Sequence[Path], where: str, request: _Request) -> Calibration:
    spec, batch = request.only_input(where, "a folder of images"), request.batch
    wanted = None if request.samples is None else request.samples * batch
    shuffled = [paths[i] for i in request.choose(len(paths), None)]
    images = open_images(folder, shuffled, wanted, spec, request.preprocessing, where)
    count = len(images.paths) // batch
    if not count:
        raise InputError(
            f"{where}: expected at least {batch} readable images, the model's batch size, found {len(images.paths)}; "
            "try more"
        )

    def read(record: int) -> Array:
        pixels = images.pixels(range(record * batch, (record + 1) * batch))
        return convert_values(spec, pixels, request.preprocessing, where)

    return Calibration(
        source=f"{folder.name}, {_count_text(count, len(paths) // batch, batch, 'images')}",
        is_random=False,
        batchable=request.dynamic_batch,
        digest=images.digest,
        warnings=images.warnings,
        _readers={spec.name: read},
        _order=tuple(range(count)),
    )


# -------------------------------------------------------------------------------------------- random


def _random(request: _Request, dynamic: Mapping[str, Sequence[int]]) -> Calibration:
    names = [spec.name for spec in request.inputs]
    if unknown := [name for name in dynamic if name not in names]:
        raise InputError(
            f"dynamic shapes: expected the inputs {_names(names)}, found {_names(unknown)}; try those names"
        )
    shapes = {spec.name: _random_shape(spec, dynamic.get(spec.name)) for spec in request.inputs}

    def read(position: int, spec: InputSpec, record: int) -> Array:
        rng = np.random.default_rng([request.seed, position, record])
        shape = shapes[spec.name]
        if spec.is_float:
            return np.asarray(rng.standard_normal(shape)).astype(spec.dtype)
        if spec.dtype.kind == "b":
            return np.ones(shape, spec.dtype)
        return np.asarray(rng.integers(0, 2, shape)).astype(spec.dtype)

    count = _RANDOM_RECORDS if request.samples is None else request.samples
    text = ", ".join(f"'{name}' {list(shape)}" for name, shape in shapes.items())
    types = ", ".join(str(spec.dtype) for spec in request.inputs)
    return Calibration(
        source=f"random numbers for {text}, {count} records",
        is_random=True,
        batchable=request.dynamic_batch and all(shape[0] == 1 for shape in shapes.values()),
        digest=hashlib.sha256(f"random {request.seed} {count} {text} {types}".encode()).hexdigest(),
        warnings=(
            "no calibration data: random numbers stand in for them, and nothing is promised about how faithful the "
            "pruned model is; give real data",
        ),
        _readers={spec.name: partial(read, position, spec) for position, spec in enumerate(request.inputs)},
        _order=tuple(range(count)),
    )


def _random_shape(spec: InputSpec, given: Sequence[int] | None) -> tuple[int, ...]:
    if given is not None:
        if not fits(spec.shape, tuple(given)) or min(given, default=1) < 1:
            raise InputError(
                f"dynamic shapes: expected {shape_text(spec.shape)} for input '{spec.name}', found {list(given)}; "
                "try the whole shape, with the fixed dimensions as they are"
            )
        return tuple(given)
    usual = [1] + [16] * len(spec.shape)
    if len(spec.shape) == 4:
        usual = [1, 3, 224, 224] if model_layout(spec.shape) == "NCHW" else [1, 224, 224, 3]
    return tuple(usual[axis] if size is None else size for axis, size in enumerate(spec.shape))


# ------------------------------------------------------------------------------------------- helpers


def _match(found: Sequence[str], request: _Request, where: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Find the key of every input, and warn of keys left over; labels are passed over in silence."""
    names = [spec.name for spec in request.inputs]
    keys = {name: name for name in names if name in found}
    others = [key for key in found if key not in names and key.lower() not in _LABELS]
    if len(names) == 1 and not keys:
        if "images" in others:
            keys = {names[0]: "images"}
        elif len(others) == 1:
            keys = {names[0]: others[0]}
    if missing := [name for name in names if name not in keys]:
        raise InputError(
            f"{where}: expected arrays named {_names(names)}, as the model's inputs, found {_names(found) or 'none'}"
            f"; try {_remedy(missing, others)}"
        )
    ignored = [key for key in others if key not in keys.values()]
    return keys, (f"{where}: {_names(ignored)} ignored: no input has that name",) if ignored else ()


def _matched(
    found: Mapping[Any, object], request: _Request, where: str
) -> tuple[dict[str, Array], dict[str, str], tuple[str, ...]]:
    values = {str(key): value for key, value in found.items()}
    keys, warnings = _match(list(values), request, where)
    return {name: _array(values[key], f"{where}, key '{key}'") for name, key in keys.items()}, keys, warnings


def _remedy(missing: Sequence[str], candidates: Sequence[str]) -> str:
    for name in missing:
        if close := difflib.get_close_matches(name, candidates, n=1):
            return f"to rename '{close[0]}' to '{name}'"
    return "the names of the inputs"


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _array(value: object, where: str) -> Array:
    try:
        if not (hasattr(value, "__array__") or isinstance(value, int | float)):
            raise TypeError(f"an object of type {type(value).__name__}")
        return np.asarray(value)
    except Exception as error:  # __array__ of other libraries: a tensor on a GPU, one that needs detach()
        raise InputError(f"{where}: expected a NumPy array, found {error}; try numpy.asarray first") from error


def _key_text(keys: Mapping[str, str]) -> str:
    return f", key{'s' if len(keys) > 1 else ''} {_names(keys.values())}" if keys else ""


def _count_text(used: int, total: int, batch: int, what: str = "samples") -> str:
    unit = (what if batch == 1 else "records").removesuffix("s" if total == 1 else "")
    unit += f" of {batch} {what}" if batch > 1 else ""
    return f"{used} {unit}" if used == total else f"{used} of {total} {unit}"


def _unused_options(request: _Request, dtypes: Iterable[np.dtype[Any]]) -> Iterator[str]:
    """Tell of preprocessing that was asked for and has nothing to act on."""
    options = request.preprocessing
    images = any(takes_images(spec, dtype) for spec, dtype in zip(request.inputs, dtypes, strict=True))
    if not images and options != _DEFAULT:
        yield "the preprocessing options are not applied: the data are not uint8 images"
    elif options.resize or options.crop:
        yield "resize and crop are not applied: the data are arrays, not a folder of image files"


@contextlib.contextmanager
def _working_directory_importable() -> Iterator[None]:
    entry = str(Path.cwd())
    sys.path.insert(0, entry)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(entry)


def _import(source: str, where: str) -> object:
    module, _, attributes = source.partition(":")
    try:
        found: object = importlib.import_module(module)
        for attribute in attributes.split("."):
            found = getattr(found, attribute)
    except Exception as error:  # a module of the user's may raise anything
        raise InputError(
            f"{where}: expected a function that can be imported, found {type(error).__name__}: {error}; try it from "
            "the folder that holds the module"
        ) from error
    if not callable(found):
        raise InputError(f"{where}: expected a callable, found {type(found).__name__}; try to wrap it in a function")
    return found
