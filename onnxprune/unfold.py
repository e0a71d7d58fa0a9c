"""A layer as a matrix product: rows of its unfolded input, its weights as matrices.

Columns are ordered channel by channel, the kernel taps of a channel side by side, and a column of ones last. A grouped
convolution is one such product per group.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from onnxprune.layers import Layer


@dataclass(frozen=True)
class Unfolding:
    """How a layer reads its input. Convolutions have a kernel; a matrix product has none.

    ``kernel``, ``strides``, ``dilations`` have one entry per spatial axis; ``pads`` the befores only.
    """

    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    group: int = 1
    transposed: bool = False

    @property
    def taps(self) -> int:
        """Kernel taps per channel."""
        return int(np.prod(self.kernel, dtype=np.int64))

    @staticmethod
    def of(
        layer: Layer, weight_shape: tuple[int, ...], in_shape: tuple[int, ...], out_shape: tuple[int, ...]
    ) -> Unfolding:
        """The unfolding of a layer, with ``auto_pad`` resolved from its shapes."""
        if layer.node.op not in ("Conv", "ConvTranspose"):
            return Unfolding()
        attributes = layer.node.attributes
        kernel = tuple(weight_shape[2:])
        rank = len(kernel)
        strides = tuple(attributes.get("strides") or [1] * rank)
        dilations = tuple(attributes.get("dilations") or [1] * rank)
        transposed = layer.node.op == "ConvTranspose"
        auto = attributes.get("auto_pad", "NOTSET")
        auto = auto.decode() if isinstance(auto, bytes) else auto
        pads = tuple(attributes.get("pads") or [0] * (2 * rank))[:rank]
        extra = tuple(attributes.get("output_padding") or [0] * rank)
        if auto == "VALID":
            pads = (0,) * rank
        elif auto != "NOTSET" or attributes.get("output_shape"):
            before = []
            for a in range(rank):
                small, large = (out_shape, in_shape) if transposed else (in_shape, out_shape)
                reach = (large[2 + a] - 1) * strides[a] + (kernel[a] - 1) * dilations[a] + 1
                total = max(reach + (extra[a] if transposed else 0) - small[2 + a], 0)
                low = auto == "SAME_LOWER" if not transposed else auto != "SAME_UPPER"
                before.append(total - total // 2 if low else total // 2)
            pads = tuple(before)
        return Unfolding(kernel, strides, dilations, pads, layer.group, transposed)

    def _sources(self, positions: np.ndarray, spatial: tuple[int, ...], out: tuple[int, ...]) -> np.ndarray:
        """Flat input index behind every (output position, tap); the number of inputs where there is none."""
        where = np.unravel_index(positions, out)
        tap = np.unravel_index(np.arange(self.taps), self.kernel)
        index = np.zeros((len(positions), self.taps), np.int64)
        inside = np.ones(index.shape, bool)
        for a, size in enumerate(spatial):
            place, offset = where[a][:, None], tap[a][None, :] * self.dilations[a]
            if self.transposed:
                numerator = place + self.pads[a] - offset
                at = numerator // self.strides[a]
                inside &= numerator % self.strides[a] == 0
            else:
                at = place * self.strides[a] - self.pads[a] + offset
            inside &= (at >= 0) & (at < size)
            index = index * size + at
        return np.where(inside, index, int(np.prod(spatial)))

    def rows(self, x: np.ndarray, positions: np.ndarray, out: tuple[int, ...]) -> np.ndarray:
        """Unfold an input at some flat output positions.

        Args:
            x: input, (n, channels, *spatial) or (n, ..., channels).
            positions: flat positions on the output's inner axes, the same for every sample, (p,).
            out: spatial sizes of the output.

        Returns:
            (group, n * p, channels / group * taps + 1); the last column is one.
        """
        n, dtype = x.shape[0], np.promote_types(x.dtype, np.float32)
        if not self.kernel:
            picked = _inner(x)[:, positions].reshape(n * len(positions), x.shape[-1])
            rows = np.ones((1, len(picked), x.shape[-1] + 1), dtype)
            rows[0, :, :-1] = picked
            return rows
        channels, spatial = x.shape[1], x.shape[2:]
        used, index = _read(self, positions.tobytes(), tuple(spatial), tuple(out))
        # channels first, so that every tap is one gather with long runs
        flat = np.empty((channels, n, len(used) + 1), x.dtype)
        flat[:, :, :-1] = _picked(x.reshape(n, channels, -1), used).transpose(1, 0, 2)
        flat[:, :, -1] = 0.0  # a last position holds the padding's zero
        inside = channels // self.group
        columns = np.empty((self.group, inside * self.taps + 1, n * len(positions)), dtype)
        columns[:, -1] = 1.0
        by_tap = columns[:, :-1].reshape(self.group, inside, self.taps, n, len(positions))
        for tap in range(self.taps):
            taken = np.take(flat, index[:, tap], axis=2)
            by_tap[:, :, tap] = taken.reshape(self.group, inside, n, len(positions))
        return columns.transpose(0, 2, 1)

    def targets(self, y: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """An output (n, o, *spatial) or (n, ..., o) at the same positions: (group, n * p, o / group)."""
        n = y.shape[0]
        dtype = np.promote_types(y.dtype, np.float32)
        if not self.kernel:
            picked = _inner(y)[:, positions]
            return picked.reshape(1, n * len(positions), y.shape[-1]).astype(dtype, copy=False)
        picked = _picked(y.reshape(n, self.group, y.shape[1] // self.group, -1), positions)
        # outputs first, as they come: that is one copy of long runs
        by_output = picked.transpose(1, 2, 0, 3).reshape(self.group, picked.shape[2], n * len(positions))
        return by_output.transpose(0, 2, 1).astype(dtype, copy=False)

    def everywhere(self, x: np.ndarray, out: tuple[int, ...]) -> np.ndarray:
        """`rows` at all positions, in the order of `targets_everywhere`.

        Of a convolution, the samples of a position stand side by side: they are copied in long runs.
        """
        if not self.kernel or self.transposed:
            return self.rows(x, np.arange(math.prod(out)), out)
        n, channels, spatial = x.shape[0], x.shape[1], x.shape[2:]
        axes = range(len(spatial))
        reach = [(out[a] - 1) * self.strides[a] + (self.kernel[a] - 1) * self.dilations[a] + 1 for a in axes]
        read = [max(min(spatial[a], reach[a] - self.pads[a]), 0) for a in axes]
        padded = np.zeros((channels, *reach, n), x.dtype)
        inner = tuple(slice(self.pads[a], self.pads[a] + read[a]) for a in axes)
        padded[(slice(None), *inner)] = np.moveaxis(x, 0, -1)[(slice(None), *map(slice, read))]
        inside = channels // self.group
        columns = np.empty(
            (self.group, inside * self.taps + 1, math.prod(out) * n), np.promote_types(x.dtype, np.float32)
        )
        columns[:, -1] = 1.0
        by_tap = columns[:, :-1].reshape(self.group, inside, self.taps, *out, n)
        for tap, at in enumerate(np.ndindex(self.kernel)):
            first = [at[a] * self.dilations[a] for a in axes]
            taken = tuple(slice(first[a], first[a] + (out[a] - 1) * self.strides[a] + 1, self.strides[a]) for a in axes)
            by_tap[:, :, tap] = padded[(slice(None), *taken)].reshape(self.group, inside, *out, n)
        return columns.transpose(0, 2, 1)

    def targets_everywhere(self, y: np.ndarray) -> np.ndarray:
        """`targets` at all positions, in the order of `everywhere`."""
        if not self.kernel or self.transposed:
            return self.targets(y, np.arange(math.prod(y.shape[2:] if self.kernel else y.shape[1:-1])))
        by_output = np.moveaxis(y, 0, -1).reshape(self.group, y.shape[1] // self.group, -1)
        return by_output.transpose(0, 2, 1).astype(np.promote_types(y.dtype, np.float32), copy=False)

    def columns(self, slots: np.ndarray) -> np.ndarray:
        """Columns of some slots of the contracted weight axis: (..., s) -> (..., s * taps)."""
        wide = slots[..., None] * self.taps + np.arange(self.taps)
        return wide.reshape(*slots.shape[:-1], -1)


@functools.lru_cache(256)  # of a draw and of a window several batches are looked at
def _read(
    unfolding: Unfolding, positions: bytes, spatial: tuple[int, ...], out: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Flat input positions that some tap reads at these output positions; of those, which one each (position, tap)."""
    index = unfolding._sources(np.frombuffer(positions, np.int64), spatial, out)
    size = math.prod(spatial)
    used = np.flatnonzero(np.bincount(index.ravel(), minlength=size + 1)[:-1])
    place = np.full(size + 1, len(used))
    place[used] = np.arange(len(used))
    return used, place[index]


def _picked(x: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Some places on the last axis; the array itself where they are all there are, in order."""
    if len(places) == x.shape[-1] and np.array_equal(places, np.arange(len(places))):
        return x
    return np.take(x, places, axis=-1)


def columns_of(layer: Layer, weight_shape: tuple[int, ...]) -> int:
    """Columns of one group's unfolded input, without the bias."""
    taps = int(np.prod(weight_shape[2:], dtype=np.int64))
    channels = weight_shape[layer.weight_axis]
    return channels // (layer.group if layer.node.op == "ConvTranspose" else 1) * taps


def out_positions(layer: Layer, out_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes of the axes of a layer's output that are neither batch nor channel."""
    return tuple(out_shape[2:]) if layer.node.op in ("Conv", "ConvTranspose") else tuple(out_shape[1:-1])


def sample_positions(total: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Flat output positions to look at: all of them where ``count`` covers them, else a sorted random draw."""
    if count >= total:
        return np.arange(total)
    return np.sort(rng.choice(total, count, replace=False))


def to_matrices(layer: Layer, weight: np.ndarray) -> np.ndarray:
    """A weight as matrices (group, channels / group * taps, outputs / group), in float64."""
    g = layer.group
    if layer.node.op == "Conv":
        o, c = weight.shape[:2]
        found = weight.reshape(g, o // g, c, -1).transpose(0, 2, 3, 1).reshape(g, -1, o // g)
    elif layer.node.op == "ConvTranspose":
        c, o = weight.shape[:2]
        found = weight.reshape(g, c // g, o, -1).transpose(0, 1, 3, 2).reshape(g, -1, o)
    else:
        found = (weight if layer.weight_axis == 0 else weight.T)[None]
    result: np.ndarray = found.astype(np.float64)
    return result


def from_matrices(layer: Layer, matrices: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `to_matrices`, to the weight's shape."""
    g = layer.group
    if layer.node.op == "Conv":
        o, c = shape[:2]
        return matrices.reshape(g, c, -1, o // g).transpose(0, 3, 1, 2).reshape(shape)
    if layer.node.op == "ConvTranspose":
        c, o = shape[:2]
        return matrices.reshape(g, c // g, -1, o).transpose(0, 1, 3, 2).reshape(shape)
    whole: np.ndarray = matrices[0] if layer.weight_axis == 0 else matrices[0].T
    return whole


def _inner(x: np.ndarray) -> np.ndarray:
    """All axes between the first and the last as one; there may be nothing (a part that no sample of a batch takes)."""
    return x.reshape(len(x), math.prod(x.shape[1:-1]), x.shape[-1])
