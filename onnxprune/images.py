"""Arrays and images become the model's input: checks, layouts, preprocessing, decoding of image files.

Two layouts of images matter: that of the data (read off the array) and that of the model (read off its input's
shape). Everything in between is uint8 in the order NCHW. Preprocessing is a table of 256 entries per
channel, computed in float64 and rounded once to the model's type.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import math
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxprune.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

Array = npt.NDArray[Any]

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"})
_CHANNELS = (1, 3, 4)  # grey, RGB, RGBA
_CHANNEL_AXIS = {"NCHW": 1, "NHWC": 3}
NO_SHAPE = "to state the input's shape in the model, which states none or that of a single number"
_HIDDEN = (".", "__MACOSX")
_WARNED = 5  # unreadable images named one by one
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True)
class InputSpec:
    """One graph input of the model: its name, shape (None is a dynamic dimension) and NumPy type.

    ``stacks`` is false where the first axis is as long as another axis of an input has to be (the nodes of a graph, and
    its adjacency), so that several samples cannot be fed as one.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]
    stacks: bool = True

    @property
    def is_float(self) -> bool:
        """Whether the input holds real numbers."""
        return is_float(self.dtype)


@dataclass(frozen=True)
class Preprocessing:
    """How uint8 images become the model's input: ``(x * scale - mean) / std``, per channel.

    ``mean`` and ``std`` hold one number, or one per channel in the order of the *model's* channels: with
    ``bgr`` the channels are flipped first. ``resize`` (short side) and ``crop`` (centre square) are in
    pixels and apply to folders of images only. An input of type uint8 gets the pixels as they are.

    >>> Preprocessing(scale=1.0, mean=(104.0, 117.0, 123.0), bgr=True).bgr
    True
    """

    scale: float = 1 / 255
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    bgr: bool = False
    resize: int | None = None
    crop: int | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that could only give NaN, infinity or an empty image."""
        for option in ("mean", "std"):  # a number or a list is welcome, and becomes hashable
            if (given := getattr(self, option)) is not None:
                object.__setattr__(self, option, tuple(map(float, np.ravel(given))))
        if not math.isfinite(self.scale) or self.scale == 0:
            raise InputError(f"preprocessing: expected a finite scale other than 0, found {self.scale}; try 1/255")
        for option, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and not (values and all(map(math.isfinite, values))):
                raise InputError(f"preprocessing: expected finite numbers as {option}, found {values}")
        if self.std is not None and min(self.std) <= 0:
            raise InputError(f"preprocessing: expected numbers above 0 as std, found {self.std}; try std 1")
        for option, size in (("resize", self.resize), ("crop", self.crop)):
            if size is not None and size < 1:
                raise InputError(f"preprocessing: expected at least 1 pixel as {option}, found {size}")


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether a type holds real numbers, the 16-bit and 8-bit kinds of ml_dtypes included."""
    return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float"))


def shape_text(shape: tuple[int | None, ...]) -> str:
    """Print a shape for people: ``[N, 3, ?, ?]``."""
    return "[" + ", ".join(str(d) if d is not None else "?" if axis else "N" for axis, d in enumerate(shape)) + "]"


def fits(wanted: tuple[int | None, ...], found: tuple[int, ...]) -> bool:
    """Whether a shape has the wanted rank and static dimensions."""
    return len(wanted) == len(found) and all(w is None or w == f for w, f in zip(wanted, found, strict=True))


# -------------------------------------------------------------------------------------------- values


def check_values(
    spec: InputSpec, shape: tuple[int, ...], dtype: np.dtype[Any], preprocessing: Preprocessing, where: str
) -> None:
    """Refuse data of a shape or type that cannot become the input; its first dimension counts, too."""
    if 0 in shape:
        raise InputError(
            f"{where}: expected data for input '{spec.name}' {shape_text(spec.shape)}, found an empty array of shape "
            f"{list(shape)}; try to leave it out"
        )
    if takes_images(spec, dtype):
        if shape and spec.shape[0] not in (None, shape[0]):
            raise InputError(
                f"{where}: expected batches of {spec.shape[0]} images for input '{spec.name}' "
                f"{shape_text(spec.shape)}, found {shape[0]} in shape {list(shape)}; try to yield single samples"
            )
        _check_images(spec, shape, preprocessing, where)
        return
    same_kind = is_float(dtype) if spec.is_float else dtype.kind in ("b" if spec.dtype.kind == "b" else "iu")
    if not same_kind:
        hint = "; uint8 is taken as images by 4-D inputs only" if dtype == np.uint8 else ""
        raise InputError(
            f"{where}: expected {spec.dtype} for input '{spec.name}' {shape_text(spec.shape)}, found {dtype}{hint}; "
            f"try array.astype('{spec.dtype}')"
        )
    if not fits(spec.shape, shape):
        raise InputError(
            f"{where}: expected shape {shape_text(spec.shape)} for input '{spec.name}', found {list(shape)}; "
            f"try {_shape_remedy(spec.shape, shape)}"
        )


def _shape_remedy(wanted: tuple[int | None, ...], found: tuple[int, ...]) -> str:
    if not wanted:
        return NO_SHAPE
    if len(wanted) == len(found) == 4:
        for old, new, axes in (("NHWC", "NCHW", (0, 3, 1, 2)), ("NCHW", "NHWC", (0, 2, 3, 1))):
            if fits(wanted, tuple(found[axis] for axis in axes)):
                return f"array.transpose{axes}: the data are {old}, the model's layout is {new}"
    if fits(wanted[1:], found):
        return "array[None], for a single sample"
    return "to reshape or resize the data"


def convert_values(spec: InputSpec, values: Array, preprocessing: Preprocessing, where: str) -> Array:
    """Turn a batch that `check_values` let pass into the input's layout and type; refuses NaN and overflow."""
    if takes_images(spec, values.dtype):
        return _convert_images(spec, values, preprocessing, where)
    if spec.is_float:
        if not np.isfinite(values).all():
            raise InputError(
                f"{where}: expected finite numbers for input '{spec.name}', found NaN or infinity; try to remove them"
            )
        with np.errstate(over="ignore"):
            result = values.astype(spec.dtype, copy=False)
        fit = spec.dtype == values.dtype or bool(np.isfinite(result).all())
    else:
        result = values.astype(spec.dtype, copy=False)
        fit = spec.dtype == values.dtype or bool((result == values).all())
    if not fit:
        raise InputError(
            f"{where}: expected numbers within the range of {spec.dtype} for input '{spec.name}', found larger ones; "
            "try to scale the data"
        )
    return result


# ------------------------------------------------------------------------------------ layouts of images


def model_layout(shape: tuple[int | None, ...]) -> str:
    """``NCHW`` or ``NHWC``: where a 4-D input keeps its channels; NCHW, as in ONNX, when in doubt."""
    return "NHWC" if _channel_like(shape[3]) > _channel_like(shape[1]) else "NCHW"


def _channel_like(size: int | None) -> int:
    """Rank a dimension as one of channels: 1 and 3 before 4, which may be a small height as well."""
    return 2 if size in (1, 3) else 1 if size == 4 else 0


def _wanted_image(spec: InputSpec) -> tuple[int | None, int | None, int | None]:
    """Channels, height and width of a 4-D input; None where dynamic."""
    _, a, b, c = spec.shape
    return (c, a, b) if model_layout(spec.shape) == "NHWC" else (a, b, c)


def takes_images(spec: InputSpec, dtype: np.dtype[Any]) -> bool:
    """Whether data of this type count as images: uint8 for a 4-D input of floats, or of uint8 images."""
    if dtype != np.uint8 or len(spec.shape) != 4:
        return False
    return spec.is_float or (spec.dtype == np.uint8 and _wanted_image(spec)[0] in (*_CHANNELS, None))


def _image_size(layout: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    if layout == "NHW":
        return 1, shape[1], shape[2]
    return (shape[3], shape[1], shape[2]) if layout == "NHWC" else (shape[1], shape[2], shape[3])


def _data_layout(spec: InputSpec, shape: tuple[int, ...], where: str) -> str:
    """``NHW``, ``NHWC`` or ``NCHW``: the layout of uint8 images [N, ...]; what fits the model wins a tie."""
    if len(shape) == 3:
        return "NHW"
    layouts = sorted(
        (name for name, axis in _CHANNEL_AXIS.items() if len(shape) == 4 and shape[axis] in _CHANNELS),
        key=lambda name: (
            not _suits(spec, _image_size(name, shape)),
            -_channel_like(shape[_CHANNEL_AXIS[name]]),
            name != model_layout(spec.shape),
        ),
    )
    if not layouts:
        raise InputError(
            f"{where}: expected uint8 images as [N, H, W], [N, H, W, 1 or 3] or [N, 1 or 3, H, W] for input "
            f"'{spec.name}', found shape {list(shape)}; try floats of the model's own shape {shape_text(spec.shape)}"
        )
    return layouts[0]


def _suits(spec: InputSpec, size: tuple[int, int, int]) -> bool:
    channels, *wanted = _wanted_image(spec)
    return channels in (None, size[0], 3 if size[0] == 1 else None) and fits(tuple(wanted), size[1:])


def _check_images(spec: InputSpec, shape: tuple[int, ...], preprocessing: Preprocessing, where: str) -> None:
    """Refuse uint8 images of a shape that cannot become the model's input."""
    channels, height, width = _wanted_image(spec)
    found, *size = _image_size(_data_layout(spec, shape, where), shape)
    if channels not in (*_CHANNELS, None):
        raise InputError(
            f"{where}: expected data with {channels} channels for input '{spec.name}' {shape_text(spec.shape)}, found "
            "uint8 images, which have 1 or 3; try floats of the model's own shape"
        )
    if found != channels and channels is not None and not (found == 1 and channels == 3):
        remedy = "drop the alpha channel" if found == 4 else "convert the images to grey" if channels == 1 else None
        raise InputError(
            f"{where}: expected images with {channels} channel(s) for input '{spec.name}' "
            f"{shape_text(spec.shape)}, found {found} in shape {list(shape)}; "
            f"try to {remedy or 'save them with the channels of the model'}"
        )
    if not fits((height, width), tuple(size)):
        remedy = "resize them, or give a folder of image files, which are resized as they are read"
        if len(shape) == 3 and {shape[0], shape[2]} & {*_CHANNELS}:  # more likely one image than many grey ones
            remedy = f"give a single image, of shape {list(shape)}, as array[None]"
        raise InputError(
            f"{where}: expected images of {height or '?'}x{width or '?'} pixels (height x width) for input "
            f"'{spec.name}', found {size[0]}x{size[1]}; try to {remedy}"
        )
    _check_channels(preprocessing, channels or found)


def _check_channels(preprocessing: Preprocessing, channels: int) -> None:
    """Refuse a mean or std that is neither one number nor one per channel."""
    for option, values in (("mean", preprocessing.mean), ("std", preprocessing.std)):
        if values is not None and len(values) not in (1, channels):
            raise InputError(
                f"preprocessing: expected 1 or {channels} numbers as {option}, one per channel of the model's "
                f"input, found {len(values)}"
            )


# ----------------------------------------------------------------------------------------- conversion


@lru_cache(maxsize=16)
def _table(preprocessing: Preprocessing, channels: int, dtype: np.dtype[Any]) -> Array:
    """[channels, 256]: what each of the 256 levels becomes."""
    mean, std = (
        np.broadcast_to(np.asarray(values, np.float64), (channels,))[:, None]
        for values in (preprocessing.mean or (0.0,), preprocessing.std or (1.0,))
    )
    with np.errstate(over="ignore"):
        table = ((np.arange(256) * preprocessing.scale - mean) / std).astype(dtype)
    if not np.isfinite(table).all():
        raise InputError(
            f"preprocessing: expected numbers within the range of {dtype}, found larger ones; try a smaller scale"
        )
    return table


def _convert_images(spec: InputSpec, images: Array, preprocessing: Preprocessing, where: str) -> Array:
    """Turn uint8 images that `_check_images` let pass into the model's layout and type."""
    layout = _data_layout(spec, images.shape, where)
    nchw = images[:, None] if layout == "NHW" else np.moveaxis(images, -1, 1) if layout == "NHWC" else images
    channels = _wanted_image(spec)[0] or nchw.shape[1]
    if nchw.shape[1] == 1:
        nchw = np.broadcast_to(nchw, (len(nchw), channels, *nchw.shape[2:]))
    if preprocessing.bgr and channels > 1:
        nchw = nchw[:, [2, 1, 0, 3][:channels]]
    if spec.dtype == np.uint8:
        result = nchw
    else:
        table = _table(preprocessing, channels, spec.dtype)
        result = np.stack([table[c][nchw[:, c]] for c in range(channels)], axis=1)
    return np.ascontiguousarray(np.moveaxis(result, 1, -1) if model_layout(spec.shape) == "NHWC" else result)


# ------------------------------------------------------------------------------------ folders of images


class _Unreadable(Exception):
    """A file that no image can be read from; its text is the reason."""


@dataclass(frozen=True)
class ImageFolder:
    """The readable ones of the chosen images, all of one size, decoded again each time they are asked for."""

    spec: InputSpec
    preprocessing: Preprocessing
    where: str
    paths: tuple[Path, ...]
    size: tuple[int, ...]  # height, width, channels
    digest: str
    warnings: tuple[str, ...]

    def pixels(self, positions: Iterable[int]) -> Array:
        """Decode images to uint8 [n, H, W, C]."""
        return np.stack([self._read(self.paths[position]) for position in positions])

    def _read(self, path: Path) -> Array:
        try:
            pixels = _read_image(path.read_bytes(), self.spec, self.preprocessing, f"{self.where}, image {path.name}")
            if pixels.shape != self.size:
                raise _Unreadable("it has another size")
            return pixels
        except (_Unreadable, OSError) as error:
            raise InputError(
                f"{self.where}: expected image {path.name} as it was when first read, found it changed ({error}); "
                "try again, and leave the folder alone meanwhile"
            ) from error


def find_images(folder: Path) -> list[Path]:
    """List the image files below a folder, sorted; hidden files and folders do not count.

    Links to folders are followed (classes are often chosen by links), unless they lead back to where they are.
    """
    found: list[Path] = []
    for name, inner, files in os.walk(folder, followlinks=True):
        place = Path(name)
        inner[:] = [each for each in inner if not each.startswith(_HIDDEN) and not _leads_back(place / each)]
        found += [place / each for each in files if not each.startswith(_HIDDEN)]
    return sorted(path for path in found if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def _leads_back(folder: Path) -> bool:
    return folder.is_symlink() and folder.resolve() in {parent.resolve() for parent in folder.absolute().parents}


def open_images(
    folder: Path, paths: Iterable[Path], wanted: int | None, spec: InputSpec, preprocessing: Preprocessing, where: str
) -> ImageFolder:
    """Decode images once until as many as wanted are good, so that reading them later meets no surprise."""
    _check_folder(spec, preprocessing, where)
    good: list[Path] = []
    bad: list[str] = []
    hashes: dict[str, bytes] = {}
    size: tuple[int, ...] = ()
    for path in paths:
        if len(good) == wanted:
            break
        name = path.relative_to(folder).as_posix()
        try:
            content = path.read_bytes()
            pixels = _read_image(content, spec, preprocessing, f"{where}, image {name}")
        except (_Unreadable, OSError) as error:
            bad.append(f"{name} ({error})")
            continue
        size = size or pixels.shape
        if pixels.shape != size:
            raise InputError(
                f"{where}: expected images of one size for input '{spec.name}' {shape_text(spec.shape)}, found "
                f"{size[0]}x{size[1]} and {pixels.shape[0]}x{pixels.shape[1]} pixels (height x width, image {name}); "
                "try --resize and --crop, such as --resize 256 --crop 224"
            )
        good.append(path)
        hashes[name] = hashlib.sha256(content).digest()
    if not good:
        raise InputError(f"{where}: expected images, found {len(bad)} unreadable, such as {bad[0]}; try others")
    _check_images(spec, (1, *size), preprocessing, where)

    digest = hashlib.sha256(folder.name.encode())
    for name, content in sorted(hashes.items()):
        digest.update(name.encode() + content)
    warned = [f"unreadable image {text} skipped" for text in bad[:_WARNED]]
    if len(bad) > _WARNED:
        warned.append(f"{len(bad) - _WARNED} more unreadable images skipped")
    return ImageFolder(spec, preprocessing, where, tuple(good), size, digest.hexdigest(), tuple(warned))


def _check_folder(spec: InputSpec, preprocessing: Preprocessing, where: str) -> None:
    """Refuse a model that images cannot feed, or options that contradict its size, before any file is read."""
    if importlib.util.find_spec("PIL") is None:
        raise InputError(f"{where}: expected the package Pillow, to read images, found none; try pip install pillow")
    if len(spec.shape) != 4 or not (spec.is_float or spec.dtype == np.uint8):
        raise InputError(
            f"{where}: expected a model with a 4-D input of floats or uint8 for a folder of images, found input "
            f"'{spec.name}' {shape_text(spec.shape)} of {spec.dtype}; try an .npz file or a callable"
        )
    channels, height, width = _wanted_image(spec)
    if channels not in (*_CHANNELS, None):
        raise InputError(
            f"{where}: expected a model with 1 or 3 channels for a folder of images, found input '{spec.name}' "
            f"{shape_text(spec.shape)} with {channels}; try an .npz file of floats"
        )
    crop = preprocessing.crop
    if crop is not None and not fits((height, width), (crop, crop)):
        raise InputError(
            f"preprocessing: expected a crop of {height or '?'}x{width or '?'} pixels (height x width), the size of "
            f"the model's input '{spec.name}', found {crop}; try without --crop"
        )
    _check_channels(preprocessing, channels or 3)


def _read_image(data: bytes, spec: InputSpec, preprocessing: Preprocessing, where: str) -> Array:
    """Decode an image file to uint8 [H, W, C] with the model's channels and, where fixed, its size.

    Raises `_Unreadable` when the bytes are no image, `InputError` when the size does not suit.
    """
    channels, height, width = _wanted_image(spec)
    image = _decode(data, _MODES[channels or 3])
    image = _resize_and_crop(image, height, width, preprocessing, where)
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _decode(data: bytes, mode: str) -> Image.Image:
    from PIL import Image, ImageOps

    # Pillow's plugins raise whatever a broken file makes them stumble on, and warn of what is handled here.
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as opened:
            opened.load()
            deep = opened.mode.startswith("I;16") or (opened.mode == "I" and opened.format == "PNG")
            image = ImageOps.exif_transpose(opened)
            if deep:  # 16 bits per pixel: keep the upper eight, where Pillow would clip
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode in ("I", "F"):
                raise _Unreadable("its pixels are 32-bit numbers without a known range")
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            return image.convert(mode)
    except _Unreadable:
        raise
    except Exception as error:
        if not data:
            raise _Unreadable("the file is empty") from error
        text = str(error).split(" <")[0]  # without the address of the buffer
        raise _Unreadable(text or type(error).__name__) from error


def _resize_and_crop(
    image: Image.Image, height: int | None, width: int | None, preprocessing: Preprocessing, where: str
) -> Image.Image:
    """Resize by the short side and cut the centre; on its own to the model's size when that is fixed."""
    from PIL.Image import Resampling

    resize, crop = preprocessing.resize, preprocessing.crop
    size = image.size  # width, height, as Pillow has it
    if resize is not None:
        size = (resize, resize * size[1] // size[0]) if size[0] <= size[1] else (resize * size[0] // size[1], resize)
    elif crop is None and height is not None and width is not None:
        ratio = max(width / size[0], height / size[1])
        size = max(width, round(size[0] * ratio)), max(height, round(size[1] * ratio))
    if size != image.size:
        image = image.resize(size, Resampling.BILINEAR)

    target = (crop, crop) if crop is not None else (width or size[0], height or size[1])
    if target[0] > size[0] or target[1] > size[1]:
        raise InputError(
            f"{where}: expected an image of at least {target[1]}x{target[0]} pixels (height x width) to crop, found "
            f"{size[1]}x{size[0]}; try --resize {max(target)} or more"
        )
    left, top = round((size[0] - target[0]) / 2), round((size[1] - target[1]) / 2)
    return image if target == size else image.crop((left, top, left + target[0], top + target[1]))
