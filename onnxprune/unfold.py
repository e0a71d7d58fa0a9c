"""A layer as a matrix product: rows of its unfolded input, its weights as a matrix.

Columns are ordered channel by channel, the kernel taps of a channel side by side, and a column of ones last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Geometry:
    """How a convolution reads its input; a matrix product is one with no spatial axes."""

    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()  # befores, then afters
    dilations: tuple[int, ...] = ()
    group: int = 1

    @property
    def taps(self) -> int:
        """Kernel taps per channel."""
        return int(np.prod(self.kernel, dtype=np.int64))


def conv_geometry(attributes: Mapping[str, Any], kernel: tuple[int, ...], in_shape: tuple[int, ...]) -> Geometry:
    """Geometry of a Conv from its attributes, ``auto_pad`` resolved for an input of this shape."""
    rank = len(kernel)
    strides = tuple(attributes.get("strides") or [1] * rank)
    dilations = tuple(attributes.get("dilations") or [1] * rank)
    auto = attributes.get("auto_pad", "NOTSET")
    auto = auto.decode() if isinstance(auto, bytes) else auto
    pads = tuple(attributes.get("pads") or [0] * (2 * rank))
    if auto == "VALID":
        pads = (0,) * (2 * rank)
    elif auto in ("SAME_UPPER", "SAME_LOWER"):
        before, after = [], []
        for size, k, s, d in zip(in_shape[2:], kernel, strides, dilations, strict=True):
            total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
            small, large = total // 2, total - total // 2
            before.append(small if auto == "SAME_UPPER" else large)
            after.append(large if auto == "SAME_UPPER" else small)
        pads = (*before, *after)
    return Geometry(tuple(kernel), strides, pads, dilations, int(attributes.get("group", 1)))


def out_spatial(geometry: Geometry, spatial: tuple[int, ...]) -> tuple[int, ...]:
    """Spatial output size of a convolution."""
    rank = len(geometry.kernel)
    return tuple(
        (spatial[a] + geometry.pads[a] + geometry.pads[a + rank] - (geometry.kernel[a] - 1) * geometry.dilations[a] - 1)
        // geometry.strides[a]
        + 1
        for a in range(rank)
    )


def sample_positions(total: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Flat output positions to look at: all of them where ``count`` covers them, else a sorted random draw."""
    if count >= total:
        return np.arange(total)
    return np.sort(rng.choice(total, count, replace=False))


def conv_rows(x: np.ndarray, geometry: Geometry, positions: np.ndarray) -> np.ndarray:
    """Unfold the input of a convolution at some flat output positions.

    Args:
        x: input, (n, channels, *spatial).
        geometry: of the convolution.
        positions: flat output positions, the same for every image, (p,).

    Returns:
        (group, n * p, channels / group * taps + 1); the last column is one.
    """
    n, channels, *spatial = x.shape
    rank = len(geometry.kernel)
    if any(geometry.pads):
        before, after = geometry.pads[:rank], geometry.pads[rank:]
        x = np.pad(x, [(0, 0), (0, 0), *zip(before, after, strict=True)])
    padded = x.shape[2:]
    out = out_spatial(geometry, tuple(spatial))
    corner = np.zeros(len(positions), np.int64)
    taps = np.zeros(geometry.taps, np.int64)
    where = np.unravel_index(positions, out)
    tap = np.unravel_index(np.arange(geometry.taps), geometry.kernel)
    for a in range(rank):
        corner = corner * padded[a] + where[a] * geometry.strides[a]
        taps = taps * padded[a] + tap[a] * geometry.dilations[a]
    index = corner[:, None] + taps[None, :]  # (p, taps)
    flat = x.reshape(n, channels, -1)
    group, p, t = geometry.group, len(positions), geometry.taps
    picked = flat[:, :, index.ravel()].reshape(n, group, channels // group, p, t)
    columns = channels // group * t
    rows = np.ones((group, n * p, columns + 1), dtype=x.dtype)
    rows[:, :, :-1] = picked.transpose(1, 0, 3, 2, 4).reshape(group, n * p, columns)
    return rows


def conv_targets(y: np.ndarray, geometry: Geometry, positions: np.ndarray) -> np.ndarray:
    """The output of a convolution at the same positions: (group, n * p, outputs / group)."""
    n, outputs = y.shape[:2]
    picked = y.reshape(n, geometry.group, outputs // geometry.group, -1)[:, :, :, positions]
    return np.ascontiguousarray(picked.transpose(1, 0, 3, 2).reshape(geometry.group, n * len(positions), -1))


def matrix_rows(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Rows of a matrix product's input (n, ..., k) at flat positions of the middle axes: (1, n * p, k + 1)."""
    picked = x.reshape(x.shape[0], -1, x.shape[-1])[:, positions]
    rows = np.ones((1, picked.shape[0] * picked.shape[1], x.shape[-1] + 1), dtype=x.dtype)
    rows[0, :, :-1] = picked.reshape(-1, x.shape[-1])
    return rows


def matrix_targets(y: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The output of a matrix product at the same positions: (1, n * p, o)."""
    return np.ascontiguousarray(y.reshape(y.shape[0], -1, y.shape[-1])[:, positions].reshape(1, -1, y.shape[-1]))
