"""The calibration data in batches, and which output positions of each are looked at."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import numpy as np

from onnxprune.analysis import Analysis
from onnxprune.data import Calibration
from onnxprune.readers import Reader
from onnxprune.statistics import FOLDS
from onnxprune.unfold import out_positions, sample_positions

TARGET_ROWS = 65536  # rows per reader: positions are drawn so that all samples together give about this many
ROWS_PER_COLUMN = 32  # and at least so many per column of the unfolded input
# more samples than these say little that is new (an image's neighbouring positions are much alike)
_ENOUGH_SAMPLES, _ENOUGH_PER_COLUMN, _ENOUGH_POSITIONS = 4096, 64, 8
JUDGING = 5  # of so many records one is held out where a block is fitted
PERIOD = FOLDS * JUDGING  # records a multiple of so many apart are in the same fold, and held out together
# records in a row that share a draw, at most and at least, and how many draws there should be
LARGEST, _FEWEST, _DRAWS = 256, 64, 16


class Batches:
    """The calibration records in batches, with a fixed draw of output positions for each.

    What is drawn does not depend on the size of the batches: some records in a row share a draw, and no batch goes
    across two draws. Neither does one hold samples of several folds, so that folds can be summed up side by side.

    Args:
        data: the records.
        size: records per batch, at most.
        seed: of the draws.
        thinned: of the positions that would be looked at, one in so many is.
    """

    def __init__(self, data: Calibration, size: int, seed: int, thinned: int = 1) -> None:
        step = min(size, LARGEST) if data.batchable else 1
        self.data = data
        self.sharing = int(np.clip(len(data) // _DRAWS, min(_FEWEST, LARGEST), LARGEST))
        draws = [range(i, min(i + self.sharing, len(data))) for i in range(0, len(data), self.sharing)]
        folds = [draw[fold::FOLDS] for draw in draws for fold in range(FOLDS)]
        self.parts = [list(fold[i : i + step]) for fold in folds for i in range(0, len(fold), step)]
        self.seed = seed
        self.thinned = thinned
        self.count = len(data)
        self._fed: list[dict[str, np.ndarray]] | None = None
        self._drawn: dict[tuple[int, int, int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.parts)

    def feeds(self, batch: int) -> dict[str, np.ndarray]:
        """The model's inputs for one batch."""
        return self.data.feeds(self.parts[batch]) if self._fed is None else self._fed[batch]

    def waves(self, at_once: int) -> Iterator[range]:
        """The numbers of all batches, so many at a time."""
        return (range(k, min(k + at_once, len(self))) for k in range(0, len(self), at_once))

    def of_fold(self, fold: int) -> list[int]:
        """Batches that hold something of a fold."""
        return [k for k, part in enumerate(self.parts) if not self.data.batchable or part[0] % FOLDS == fold]

    def rows_of(self, fold: int, batch: int, rows: int) -> np.ndarray | slice:
        """Which rows of such a batch's tensors are of the fold: all, but a record of several samples parts them."""
        if self.data.batchable:
            return slice(None)
        return np.flatnonzero((self.parts[batch][0] + np.arange(rows)) % FOLDS == fold)

    def each(self, batch: int, rows: int) -> int:
        """Rows that a record has in a batch's tensors: one of each of its words or frames, where they are made rows."""
        return max(-(-rows // len(self.parts[batch])), 1)

    def numbers(self, batch: int, rows: int) -> np.ndarray:
        """Of the rows of a batch's tensors, which ones they are of those of all samples."""
        part, each = np.asarray(self.parts[batch]), self.each(batch, rows)
        return (part[:, None] * each + np.arange(each)).reshape(-1)[:rows]

    def loaded(self, which: Sequence[int]) -> Batches:
        """Some of the batches with what is fed, so that they need no data any more."""
        found = copy.copy(self)
        found._fed = [self.feeds(batch) for batch in which]
        found.parts = [self.parts[batch] for batch in which]
        del found.data
        return found

    def draw(self, batch: int) -> int:
        """The number of the draw that a batch belongs to."""
        return self.parts[batch][0] // self.sharing

    def positions(self, reader: Reader, batch: int, total: int) -> np.ndarray:
        """Flat output positions of a reader to look at in this batch: the same ones for every network."""
        key = (reader.index, self.draw(batch), total, -(-_wanted(reader, self.thinned) // self.count))
        if key not in self._drawn:
            rng = np.random.default_rng([self.seed, *key[:2]])
            self._drawn[key] = sample_positions(*key[2:], rng)
        return self._drawn[key]


def sample_bytes(analysis: Analysis, names: Sequence[str]) -> int:
    """Bytes that the named tensors take for one sample."""
    first = analysis.shapes.probes[0]
    return sum(4 * int(np.prod(first.shapes[n])) for n in names if n in first.shapes) // _probed(analysis)


def _probed(analysis: Analysis) -> int:
    """Samples of the first probe."""
    return max(max((a.shape[0] for a in analysis.shapes.probes[0].feeds.values() if a.ndim), default=1), 1)


def rows_bytes(analysis: Analysis, reader: Reader, samples: int, thinned: int) -> int:
    """Bytes that the unfolded input of a reader takes for one sample, with what is worked out on the way."""
    columns, groups = reader.width + reader.weights.shape[2], reader.weights.shape[0]
    wanted = -(-_wanted(reader, thinned) // samples)
    each = -(-analysis.shapes.probes[0].shapes[reader.layer.data][0] // _probed(analysis))
    return int(2 * 4 * groups * columns * each * min(_positions(analysis, reader), wanted))


def batch_size(sample: int, room: int) -> int:
    """Samples per batch of so many bytes each that stay within the room."""
    return int(np.clip(room // max(sample, 1), 1, LARGEST))


def enough(analysis: Analysis, readers: Sequence[Reader], thinned: int) -> int:
    """Samples beyond which a fit gains little: every reader gets its rows from a few positions of each sample."""
    needed = [
        -(-min(_wanted(r, thinned), _ENOUGH_PER_COLUMN * r.width) // min(_positions(analysis, r), _ENOUGH_POSITIONS))
        for r in readers
    ]
    return max(*needed, _ENOUGH_SAMPLES, 1)


def _wanted(reader: Reader, thinned: int) -> int:
    return max(TARGET_ROWS // thinned, ROWS_PER_COLUMN * reader.width)


def _positions(analysis: Analysis, reader: Reader) -> int:
    """Output positions of a sample, at the first probe."""
    out = out_positions(reader.layer, analysis.shapes.probes[0].shapes[reader.layer.output])
    return max(int(np.prod(out, dtype=np.int64)), 1)
