"""Taking in what a block reads and should give, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnxprune.answers import Answer
from onnxprune.batches import JUDGING
from onnxprune.blocks import BlockData
from onnxprune.readers import Reader
from onnxprune.statistics import squared
from onnxprune.surroundings import Behind
from onnxprune.views import View

Tensors = Mapping[str, np.ndarray]


class Taking:
    """Takes in what a block reads and should give.

    Args:
        view: of the block; settled.
    """

    def __init__(self, view: View) -> None:
        self.view, self.block = view, view.block
        # all by the number of the batch
        self.records: dict[int, np.ndarray] = {}
        self.held: dict[str, dict[int, np.ndarray]] = {name: {} for name in view.block.held}
        self.wanted: list[dict[int, np.ndarray]] = []
        self.least: list[dict[int, np.ndarray]] = []  # where a limiter behind cuts off
        self.most: list[dict[int, np.ndarray]] = []
        self.valid: list[dict[int, np.ndarray]] = []

    def begin(self) -> None:
        """The next one of the block's readers comes."""
        for parts in (self.wanted, self.least, self.most, self.valid):
            parts.append({})

    def add(self, batch: int, reader: Reader, behind: Behind, answer: Answer, pruned: Tensors) -> None:
        """One batch at this reader: what the original gives in the view, and all of the pruned one."""
        rows = len(pruned[self.block.tensor])
        samples = self.view.samples(batch, rows)
        if not len(samples):
            return
        self.records[batch] = self.view.records(batch, rows)[samples]
        if len(self.wanted) == 1:
            for name, arrays in self.held.items():
                arrays[batch] = self.view.read(batch, name, pruned[name])
        wanted = answer.output
        shape = tuple(-1 if k == self.block.axis else 1 for k in range(wanted.ndim))
        offset = behind.shift.reshape(shape).astype(wanted.dtype)
        if behind.residual and answer.residual is not None:
            there = self.view.given(batch, reader, pruned[behind.residual])
            wanted = wanted + behind.before_scale(answer.residual - there, shape)
            offset = offset + there
        self.wanted[-1][batch] = wanted
        if behind.saturation is not None:
            last = [np.moveaxis(a, self.block.axis, -1) for a in (wanted, np.broadcast_to(offset, wanted.shape))]
            least, most = (np.moveaxis(a, -1, self.block.axis) for a in behind.saturation.interval(last[0], last[1]))
            self.least[-1][batch] = least
            self.most[-1][batch] = most
        held = {name: arrays[batch] for name, arrays in self.held.items()}
        self.valid[-1][batch] = self.view.valid(batch, reader, wanted, held)

    def data(self) -> tuple[BlockData, BlockData]:
        """What to fit to, and what to judge by; for the taking, as nothing is kept twice."""
        energy = tuple(_energy(wanted, valid) for wanted, valid in zip(self.wanted, self.valid, strict=True))
        least, most = [], []
        for wanted, lows, highs in zip(self.wanted, self.least, self.most, strict=True):
            if lows:
                wanted.clear()
                least.append(self._parted(lows))
                most.append(self._parted(highs))
            else:
                least.append(self._parted(wanted))
                most.append(least[-1])
        valid = [self._parted(arrays) for arrays in self.valid]
        held = {name: self._parted(arrays) for name, arrays in self.held.items()}
        seen, unseen = (
            BlockData(
                {name: parts[k] for name, parts in held.items()},
                tuple(parts[k] for parts in least),
                tuple(parts[k] for parts in most),
                tuple(parts[k] for parts in valid),
                energy,
            )
            for k in range(2)
        )
        return seen, unseen

    def _parted(self, arrays: dict[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The arrays of all batches as two, of which the second one is held out; nothing is left of the parts."""
        batches = sorted(arrays)
        held_out = [self.records[batch] % JUDGING == 0 for batch in batches]
        parts = [arrays[batch] for batch in batches]
        found = _joined(parts, [~each for each in held_out]), _joined(parts, held_out)
        arrays.clear()
        return found


def _joined(parts: Sequence[np.ndarray], chosen: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of several arrays as one, each copied once."""
    counts = [int(each.sum()) for each in chosen]
    found = np.empty((sum(counts), *parts[0].shape[1:]), np.result_type(*parts))
    for part, each, stop, count in zip(parts, chosen, np.cumsum(counts), counts, strict=True):
        np.take(part, np.flatnonzero(each), axis=0, out=found[stop - count : stop], mode="clip")  # else it is buffered
    return found


def _energy(wanted: Mapping[int, np.ndarray], valid: Mapping[int, np.ndarray]) -> float:
    """Of what is wanted about its mean, where it counts."""
    total = sum(float(part.sum(dtype=np.float64)) for part in wanted.values())
    mean = total / max(sum(part.size for part in wanted.values()), 1)
    return sum(squared((part - part.dtype.type(mean)) * valid[batch]) for batch, part in wanted.items())
