"""The steps of a sweep in the journal: what was fitted is noted down, and found again by a run that goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from onnxprune.blocks import Block
from onnxprune.calibrate import Arrays, Folds
from onnxprune.fitting import Fitting
from onnxprune.joint import Network
from onnxprune.journal import Journal
from onnxprune.parallel import Map
from onnxprune.readers import Reader
from onnxprune.scores import Scored
from onnxprune.surroundings import Samples
from onnxprune.taking import Taking


class Steps:
    """Every reader and block that is fitted on the way.

    Args:
        fitting: what fits them, and holds what it finds.
        journal: where that is noted down.
    """

    def __init__(self, fitting: Fitting, journal: Journal) -> None:
        self.fitting, self.journal = fitting, journal
        self.sweep = digest_of(fitting.counts)

    def _name(self, step: Reader | Block) -> str:
        if isinstance(step, Reader):
            return f"{self.sweep}-reader{step.index}"
        return f"{self.sweep}-block{hashlib.sha256(step.tensor.encode()).hexdigest()[:16]}"

    def reader(
        self, reader: Reader, folds: Folds, samples: Sequence[Samples], scored: Sequence[Scored], spread: Map
    ) -> Arrays:
        """`Fitting.reader`, noted down with all that it changes besides."""
        fitting, before = self.fitting, len(self.fitting.notes)
        found = fitting.reader(reader, folds, samples, scored, spread)
        about = {
            "kept": {g: fitting.kept[g].tolist() for g in reader.columns if g in fitting.pending},
            "errors": {g: fitting.errors[g] for g in reader.columns if g in fitting.errors},
            "notes": fitting.notes[before:],
        }
        self.journal.put(self._name(reader), about, found.items())
        return found

    def block(self, net: Network, taken: Taking, arrays: Arrays) -> Arrays:
        """The same of `Fitting.block`."""
        found = self.fitting.block(net, taken, arrays)
        self.journal.put(self._name(net.block), {}, found.items())
        return found

    def recall(self, step: Reader | Block) -> Arrays | None:
        """What was fitted by a run that was stopped; all else is as it was behind that."""
        entry = self.journal.get(self._name(step))
        if entry is None:
            return None
        about, arrays = entry
        for group, kept in about.get("kept", {}).items():
            self.fitting.kept[int(group)] = np.array(kept, dtype=np.int64)
        self.fitting.errors |= {int(group): error for group, error in about.get("errors", {}).items()}
        self.fitting.notes += about.get("notes", [])
        return arrays


def digest_of(counts: np.ndarray) -> str:
    """What tells kept counts from others, in the name of an entry."""
    return hashlib.sha256(np.asarray(counts, dtype="<i8").tobytes()).hexdigest()[:16]
