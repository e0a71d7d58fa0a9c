"""What a fit of a block looks at: as many samples as there are, and of large ones a window each.

A few whole images of 200 x 200 positions are alike within and differ from all others; the same number of positions from
hundreds of images says far more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune.batches import JUDGING, Batches
from onnxprune.blocks import Block
from onnxprune.graph import Graph
from onnxprune.readers import Reader
from onnxprune.unfold import Unfolding, columns_of

ROWS = 1 << 16  # positions in all
_LEAST_PER_COLUMN = 48  # of them, where products are limited
SIDE = 10  # the shortest side of a window, where the whole is larger
# of an output, what is taken in: wanted, the least and the largest, and whether it counts, with a part that is joined
_KEPT = 3.5
_COPIES, _AT_ONCE = 8, 4  # of an output that a fit works with, and of so many samples it works with one at a time


@dataclass(frozen=True)
class Window:
    """A part of the positions between the inner and the outer layers of a block; one entry per spatial axis.

    Attributes:
        whole: sizes of the tensor between.
        size: of the window.
        start: where it begins; a multiple of the outer layers' strides, as what is left out is.
    """

    whole: tuple[int, ...]
    size: tuple[int, ...]
    start: tuple[int, ...]

    def read(self, unfolding: Unfolding, spatial: Sequence[int]) -> list[slice]:
        """The part of an inner layer's input with which it makes the window."""
        found = []
        for a, size in enumerate(spatial):
            stride = unfolding.strides[a] if unfolding.kernel else 1
            first = self.start[a] * stride
            found.append(slice(first, first + size - (self.whole[a] - self.size[a]) * stride))
        return found

    def given(self, unfolding: Unfolding, spatial: Sequence[int]) -> list[slice]:
        """The part of an outer layer's output that it makes of the window."""
        found = []
        for a, size in enumerate(spatial):
            stride = unfolding.strides[a] if unfolding.kernel else 1
            first = self.start[a] // stride
            found.append(slice(first, first + size - (self.whole[a] - self.size[a]) // stride))
        return found

    def whole_within(self, inner: Sequence[Unfolding], read: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Per axis, which positions of the window the inner layers make as they would make them in the whole.

        Args:
            inner: how they read.
            read: per inner layer, the sizes of what it reads for the window.
        """
        found = [np.ones(size, bool) for size in self.size]
        for unfolding, sizes in zip(inner, read, strict=True):
            for a in range(len(self.size) if unfolding.kernel else 0):
                first = np.arange(self.size[a]) * unfolding.strides[a] - unfolding.pads[a]
                last = first + (unfolding.kernel[a] - 1) * unfolding.dilations[a]
                found[a] &= (first >= 0) | (self.start[a] == 0)
                found[a] &= (last < sizes[a]) | (self.start[a] + self.size[a] == self.whole[a])
        return found

    def valid(self, outer: Unfolding, right: Sequence[np.ndarray], sizes: Sequence[int]) -> np.ndarray:
        """Which outputs an outer layer makes as in the whole, (*sizes); ``right`` as `whole_within` gives it."""
        result = np.ones(tuple(sizes), bool)
        for a, size in enumerate(sizes):
            taps = np.arange(outer.kernel[a]) * outer.dilations[a] if outer.kernel else np.zeros(1, np.int64)
            stride, pad = (outer.strides[a], outer.pads[a]) if outer.kernel else (1, 0)
            at = np.arange(size)[:, None] * stride - pad + taps
            inside = (at >= 0) & (at < self.size[a])
            good = right[a][np.clip(at, 0, self.size[a] - 1)] & inside
            good |= (at < 0) & (self.start[a] == 0)
            good |= (at >= self.size[a]) & (self.start[a] + self.size[a] == self.whole[a])
            shape = [1] * len(sizes)
            shape[a] = size
            result &= good.all(axis=1).reshape(shape)
        return result


class View:
    """What a fit of a block looks at: of which samples, and which part of each.

    Args:
        block: the block.
        graph: its network.
        batches: the data.
        room: bytes that the unfolded inputs and the outputs may take.
        products: multiplications that the layers may take for all of it, within reason.
    """

    def __init__(self, block: Block, graph: Graph, batches: Batches, room: int, products: float = math.inf) -> None:
        self.block, self.graph, self.batches, self.room, self.products = block, graph, batches, room, products
        self._inner = block.reach
        self._outer = [r.unfolding for r in block.outer]
        self._whole: tuple[int, ...] = ()
        self._size: tuple[int, ...] = ()
        self._step = 0, 0  # of so many records, and of so many rows of each, one is looked at
        self._windows: dict[int, Window] = {}  # by draw

    def settle(self, between: np.ndarray, output: np.ndarray) -> None:
        """Decide, from the sizes of the tensor between and of what an outer layer gives: at the first batch."""
        if not any(self._step):
            self._whole, each = self._spatial(between), self.batches.each(0, len(between))
            self._size, step = self._plan(len(self.batches.data) * each, self._whole, output)
            rows = min(step, each)
            records = step // rows
            # else all that is looked at would be held out
            self._step = records if records % JUDGING else records + 1, rows

    def records(self, batch: int, rows: int) -> np.ndarray:
        """Numbers of the records that the rows of a batch's tensors belong to."""
        return self.batches.numbers(batch, rows) // self.batches.each(batch, rows)

    def samples(self, batch: int, rows: int) -> np.ndarray:
        """Which rows of a batch are looked at."""
        record, row = np.divmod(self.batches.numbers(batch, rows), self.batches.each(batch, rows))
        some, few = self._step
        return np.flatnonzero((record % some == 0) & ((record // some + row) % few == 0))

    def read(self, batch: int, name: str, array: np.ndarray) -> np.ndarray:
        """The part of a tensor that the block reads."""
        inner = zip(self.block.inner, self._inner, strict=True)
        unfolding = next((reach for i, reach in inner if i.layer.data == name), Unfolding())
        places = self._places(self._window(batch).read(unfolding, self._spatial(array)))
        return np.ascontiguousarray(_wide(array[(slice(None), *places)][self.samples(batch, len(array))]))

    def given(self, batch: int, reader: Reader, output: np.ndarray) -> np.ndarray:
        """The part of what an outer layer gives, or of what is added to that."""
        places = self._places(self._window(batch).given(reader.unfolding, self._spatial(output)))
        return np.ascontiguousarray(_wide(output[(slice(None), *places)][self.samples(batch, len(output))]))

    def valid(self, batch: int, reader: Reader, given: np.ndarray, read: Mapping[str, np.ndarray]) -> np.ndarray:
        """Where that part is what the layer gives in the whole; ``read`` as `read` gives it."""
        window = self._window(batch)
        right = window.whole_within(self._inner, [self._spatial(read[i.layer.data]) for i in self.block.inner])
        valid = window.valid(reader.unfolding, right, self._spatial(given))
        return np.repeat(np.expand_dims(valid, (0, self.block.axis)), len(given), axis=0)

    def _spatial(self, array: np.ndarray) -> tuple[int, ...]:
        return tuple(size for k, size in enumerate(array.shape) if k not in (0, self.block.axis))

    def _places(self, slices: Sequence[slice]) -> list[slice]:
        """Slices of the spatial axes as those of all axes but the first."""
        found = list(slices)
        found.insert(self.block.axis - 1, slice(None))
        return found

    def _window(self, batch: int) -> Window:
        draw = self.batches.draw(batch)
        if draw in self._windows:
            return self._windows[draw]
        rng = np.random.default_rng([self.batches.seed, draw, *self.block.nodes])
        grid = self._grid(len(self._whole))
        start = tuple(
            int(rng.integers((full - size) // g + 1)) * g
            for full, size, g in zip(self._whole, self._size, grid, strict=True)
        )
        self._windows[draw] = Window(self._whole, self._size, start)
        return self._windows[draw]

    def _grid(self, rank: int) -> list[int]:
        return [math.lcm(*(u.strides[a] for u in self._outer if u.kernel)) for a in range(rank)]

    def _plan(self, samples: int, whole: tuple[int, ...], output: np.ndarray) -> tuple[tuple[int, ...], int]:
        """The size of a window, and of how many samples one is looked at."""
        per_position, products, widest = 0.0, 0, 1
        pooled = math.prod(self.block.pool[1].strides) if self.block.pool else 1
        layers = [(i.layer, i.unfolding, pooled, True) for i in self.block.inner]
        layers += [(r.layer, r.unfolding, 1, False) for r in self.block.outer]
        for layer, unfolding, each, is_inner in layers:
            dims = tuple(self.graph.stored(layer.weight).dims)
            outputs = dims[layer.out_axis] * (layer.group if layer.node.op == "ConvTranspose" else 1)
            columns = columns_of(layer, dims)
            kept = unfolding.group * columns / unfolding.taps if is_inner else _KEPT * outputs
            per_position += 4 * each * (kept + (unfolding.group * columns + _COPIES * outputs) / _AT_ONCE)
            products += each * columns * outputs
            widest = max(widest, columns)
        finer = max(math.prod(self._spatial(output)) / max(math.prod(whole), 1), 1.0)
        rows = max(self.products / products, _LEAST_PER_COLUMN * widest)
        room = min(ROWS, rows, self.room // per_position) / finer
        size = whole
        if whole and self._divisible(len(whole)) and math.prod(whole) * samples > room:
            side = max(round((room / samples) ** (1 / len(whole))), SIDE)
            grid = self._grid(len(whole))
            left_out = [max(full - side, 0) // g * g for full, g in zip(whole, grid, strict=True)]
            size = tuple(full - out for full, out in zip(whole, left_out, strict=True))
        most = max(int(room / max(math.prod(size), 1)), 1)
        return size, max(samples // most, 1)

    def _divisible(self, rank: int) -> bool:
        """Whether a window can be taken out: not of what is spread out, and not beside constants of full size."""
        if any(u.transposed for u in (*self._inner, *self._outer)):
            return False
        strides: dict[str, tuple[int, ...]] = {}
        for inner in self.block.inner:
            if strides.setdefault(inner.layer.data, inner.unfolding.strides) != inner.unfolding.strides:
                return False
            nodes = [n for n in inner.between if n.op != "BatchNormalization"]
            if len(nodes) < len(inner.between) and self.block.axis != 1:  # its constants are those of positions
                return False
            for name in (n for node in nodes for n in node.inputs if n and self.graph.is_stored(n)):
                dims = self.graph.stored(name).dims
                aligned = [1] * (rank + 2 - len(dims)) + list(dims)
                if any(size > 1 for k, size in enumerate(aligned) if k not in (0, self.block.axis)):
                    return False
        return True


def _wide(array: np.ndarray) -> np.ndarray:
    """The array, of float32 at least."""
    return array.astype(np.promote_types(array.dtype, np.float32), copy=False)
