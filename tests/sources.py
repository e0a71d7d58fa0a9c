"""Calibration data to be loaded, and what was loaded of them."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
from PIL import Image

from onnxprune.data import Calibration, InputSpec

RNG = np.random.default_rng(0)
N = None


def spec(*shape, name="x", dtype="float32"):
    return InputSpec(name, shape, np.dtype(dtype))


NCHW = spec(N, 3, 4, 5)
NHWC = spec(N, 4, 5, 3)
GREY = spec(N, 1, 4, 5)
FLAT = spec(N, 7)
DYNAMIC = spec(N, 3, N, N)
PIXELS = RNG.integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)
FLOATS = RNG.standard_normal((6, 7)).astype(np.float32)


def everything(data: Calibration) -> dict[str, np.ndarray]:
    """All records in one, when they may be concatenated."""
    return data.feeds(range(len(data)))


def unshuffled(data: Calibration, name: str = "x") -> np.ndarray:
    """The samples in the order of the source."""
    return everything(data)[name][np.argsort(data._order)]


def save_images(folder: Path, images: dict[str, Image.Image], **options) -> Path:
    for name, image in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name, **options)
    return folder


def picture(size=(5, 4), mode="RGB", seed=0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def save_tensors(folder: Path, arrays, names=()) -> Path:
    folder.mkdir(parents=True)
    for k, (array, name) in enumerate(zip(arrays, itertools.chain(names, itertools.repeat("")), strict=False)):
        (folder / f"input_{k}.pb").write_bytes(onnx.numpy_helper.from_array(array, name).SerializeToString())
    return folder
