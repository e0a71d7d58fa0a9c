"""Taking in what a block reads and should give, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from onnxprune.answers import Answer
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
        self.records[batch] = self.view.numbers(batch, rows)[samples]
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

    def data(self) -> tuple[BlockData, np.ndarray]:
        """All of it, for the taking, as nothing is kept twice; and the numbers of its records."""
        held = {name: _joined(arrays) for name, arrays in self.held.items()}
        least, most, valid, energy = [], [], [], []
        for wanted, lows, highs, counts in zip(self.wanted, self.least, self.most, self.valid, strict=True):
            whole, there = _joined(wanted), _joined(counts)
            valid.append(there)
            energy.append(squared((whole - whole.mean()) * there))
            least.append(_joined(lows) if lows else whole)
            most.append(_joined(highs) if highs else whole)
        return BlockData(held, tuple(least), tuple(most), tuple(valid), tuple(energy)), _joined(self.records)


def _joined(arrays: dict[int, np.ndarray]) -> np.ndarray:
    """The arrays as one, in order; nothing is left of the parts."""
    whole = np.concatenate([arrays[batch] for batch in sorted(arrays)])
    arrays.clear()
    return whole
