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
import hashlib
import importlib
import re
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from onnxprune.arrays import from_arrays
from onnxprune.errors import InputError
from onnxprune.images import (
    IMAGE_SUFFIXES,
    Array,
    InputSpec,
    Preprocessing,
    convert_values,
    find_images,
    fits,
    model_layout,
    open_images,
    shape_text,
)
from onnxprune.items import from_items, from_test_data, test_data_sets
from onnxprune.records import (
    DEFAULT,
    Calibration,
    Request,
    as_array,
    count_text,
    keys_of,
    matched,
    quoted,
    unused_in_images,
    unused_options,
)

__all__ = ["Calibration", "InputSpec", "Preprocessing", "load_calibration"]

_CALLABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_RANDOM_RECORDS = 64
_KINDS = "an .npy or .npz file, a folder of images or of ONNX test data, or module:function"


def load_calibration(
    source: object,
    inputs: Sequence[InputSpec],
    *,
    model_path: Path | None = None,
    samples: int | None = None,
    seed: int = 0,
    preprocessing: Preprocessing = DEFAULT,
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
    if not isinstance(preprocessing, Preprocessing):
        raise InputError(
            f"preprocessing: expected an onnxprune.Preprocessing, found {type(preprocessing).__name__}; try "
            "Preprocessing(mean=..., std=...)"
        )
    if not inputs:
        raise InputError("calibration data: expected a model with inputs, found one without; there is nothing to feed")
    for spec in inputs:
        if not (spec.is_float or spec.dtype.kind in "iub"):
            raise InputError(
                f"model's input '{spec.name}': expected floats, integers or booleans, found {spec.dtype}; "
                "try to cut that part off the model"
            )
    request = Request(tuple(inputs), samples, seed, preprocessing)
    if source is None:
        return _from_neighbours(model_path, request, dynamic or {})
    if isinstance(source, str | Path):
        return _from_text(source, request)
    return _from_object(source, "calibration data", "", request)


def _from_text(source: str | Path, request: Request) -> Calibration:
    if source == "":  # as a path, this would be the working directory
        raise InputError(f"calibration data: expected {_KINDS}, found an empty path; is a variable not set?")
    path = Path(source)
    where = f"calibration data {source}"
    if path.is_dir():
        return _from_folder(_named(path), where, request)
    if path.is_file():
        return _from_file(path, where, request)
    if isinstance(source, str) and _CALLABLE.fullmatch(source):
        with _working_directory_importable(), contextlib.redirect_stdout(sys.stderr):  # what it prints is no result
            return _from_object(_import(source, where), where, source, request)
    raise InputError(f"{where}: expected {_KINDS}, found no such file or folder; try to check the path")


def _from_object(source: object, where: str, name: str, request: Request) -> Calibration:
    """Take what Python holds; a callable is called once, and what it returns is taken instead."""
    if callable(source) and not hasattr(source, "__array__"):
        name = name or "callable"
        try:
            source = source()
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            raise InputError(f"{where}: expected a callable that yields data, found {error!r}; try it alone") from error
    if isinstance(source, Mapping):
        arrays, keys, warnings = matched(source, request, where)
        return from_arrays(arrays, keys, where, name or "arrays", request, warnings)
    if hasattr(source, "__array__"):
        spec = request.only_input(where, "a single array")
        return from_arrays({spec.name: as_array(source, where)}, {}, where, name or "array", request)
    if isinstance(source, str | bytes) or not hasattr(source, "__iter__"):
        path, called = ("", "an") if name else ("a path, ", "a callable or")  # what a callable gives is not opened
        raise InputError(
            f"{where}: expected {path}an array, a mapping of arrays, or {called} iterable that yields them, "
            f"found {type(source).__name__}; try a NumPy array"
        )
    if isinstance(source, list | tuple):
        items: Iterator[tuple[str, object]] = ((f"record {i}", source[i]) for i in request.choose(len(source), None))
    else:
        items = ((f"record {i}", item) for i, item in enumerate(source))
    return from_items(items, where, name or "iterable", request)


def _from_file(path: Path, where: str, request: Request) -> Calibration:
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise InputError(f"{where}: expected {_KINDS}, found a single image; try the folder that holds it")
    try:
        with path.open("rb") as file:
            magic = file.read(6)
            file.seek(0)
            if magic.startswith(b"PK"):
                with np.load(file, allow_pickle=False) as archive:
                    keys, warnings = keys_of(archive.files, request, where)
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
    return from_arrays(arrays, keys, where, path.name, request, warnings)


def _from_folder(folder: Path, where: str, request: Request) -> Calibration:
    if sets := test_data_sets(folder, itself=True):
        return from_test_data(sets, where, folder.name, request)
    if paths := find_images(folder):
        return _from_images(folder, paths, where, request)
    found = "other files only" if any(folder.iterdir()) else "an empty folder"
    raise InputError(
        f"{where}: expected images ({', '.join(sorted(IMAGE_SUFFIXES))}) or test_data_set_*/input_*.pb, found {found}; "
        "try another folder"
    )


def _named(folder: Path) -> Path:
    """The same folder by a path that ends in its name, which "." and ".." do not."""
    return folder.resolve() if folder.name in ("", "..") else folder


def _from_neighbours(model_path: Path | None, request: Request, dynamic: Mapping[str, Sequence[int]]) -> Calibration:
    """Take what lies beside the model, else random numbers; test data there may belong to another model."""
    refused = []
    if model_path is not None:
        beside = model_path.with_suffix(".calib.npz")
        if beside.is_file():
            return _from_file(beside, f"calibration data {beside}", request)
        for folder in (model_path.with_suffix(""), model_path.parent):
            if sets := test_data_sets(folder, itself=False):
                try:
                    return from_test_data(sets, f"calibration data {folder}", _named(folder).name, request)
                except InputError as error:
                    refused.append(f"ONNX test data beside the model are not used: {error}")
    random = _random(request, dynamic)
    return replace(random, warnings=(*refused, *random.warnings))


def _from_images(folder: Path, paths: Sequence[Path], where: str, request: Request) -> Calibration:
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
        source=f"{folder.name}, {count_text(count, len(paths) // batch, batch, 'images')}",
        is_random=False,
        batchable=request.dynamic_batch,
        digest=images.digest,
        warnings=(*images.warnings, *unused_in_images(request, [spec])),
        _readers={spec.name: read},
        _order=tuple(range(count)),
    )


def _random(request: Request, dynamic: Mapping[str, Sequence[int]]) -> Calibration:
    names = [spec.name for spec in request.inputs]
    if unknown := [name for name in dynamic if name not in names]:
        raise InputError(
            f"dynamic shapes: expected the inputs {quoted(names)}, found {quoted(unknown)}; try those names"
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
            *unused_options(request, [np.dtype(np.float64)] * len(names)),  # numbers, and no images
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
    except (Exception, SystemExit) as error:  # a module of the user's may raise anything, or be a script
        raise InputError(
            f"{where}: expected a function that can be imported, found {type(error).__name__}: {error}; try it from "
            "the folder that holds the module"
        ) from error
    if not callable(found):
        raise InputError(f"{where}: expected a callable, found {type(found).__name__}; try to wrap it in a function")
    return found
