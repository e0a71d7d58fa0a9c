"""The steps of a sweep in the journal: what was fitted is noted down, and found again by a run that goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from onnxprune.blocks import Block
from onnxprune.calibrate import Arrays, BlockFitter, Fitter, Folds
from onnxprune.joint import Network
from onnxprune.parallel import Map
from onnxprune.readers import Reader
from onnxprune.scores import Scored
from onnxprune.surroundings import Samples
from onnxprune.taking import Taking

if TYPE_CHECKING:
    from onnxprune.pipeline import Chooser


class Steps:
    """Every reader and block that is fitted on the way to these counts.

    Args:
        chooser: what fits them, and notes down what it finds.
        counts: kept units per group.
        pending: groups whose units are chosen on the way.
    """

    def __init__(self, chooser: Chooser, counts: np.ndarray, pending: Collection[int]) -> None:
        self.chooser, self.pending = chooser, pending
        self.sweep = digest_of(counts)

    def _name(self, step: Reader | Block) -> str:
        if isinstance(step, Reader):
            return f"{self.sweep}-reader{step.index}"
        return f"{self.sweep}-block{hashlib.sha256(step.tensor.encode()).hexdigest()[:16]}"

    def reader(self, fit: Fitter) -> Fitter:
        """A fit that is noted down, with all that it changes in the chooser."""

        def noted(
            reader: Reader, folds: Folds, samples: Sequence[Samples], scored: Sequence[Scored], spread: Map
        ) -> Arrays:
            chooser, before = self.chooser, len(self.chooser.notes)
            found = fit(reader, folds, samples, scored, spread)
            chosen = [g for g in reader.columns if g in self.pending]
            about = {
                "kept": {g: chooser.kept[g].tolist() for g in chosen},
                "errors": {g: chooser.errors[g] for g in reader.columns if g in chooser.errors},
                "notes": chooser.notes[before:],
            }
            chooser.journal.put(self._name(reader), about, found.items())
            return found

        return noted

    def block(self, fit: BlockFitter) -> BlockFitter:
        """The same of a block."""

        def noted(net: Network, taken: Taking, arrays: Arrays) -> Arrays:
            found = fit(net, taken, arrays)
            self.chooser.journal.put(self._name(net.block), {}, found.items())
            return found

        return noted

    def recall(self, step: Reader | Block) -> Arrays | None:
        """What was fitted by a run that was stopped; the chooser is as it was behind that."""
        entry = self.chooser.journal.get(self._name(step))
        if entry is None:
            return None
        about, arrays = entry
        for group, kept in about.get("kept", {}).items():
            self.chooser.kept[int(group)] = np.array(kept, dtype=np.int64)
        self.chooser.errors |= {int(group): error for group, error in about.get("errors", {}).items()}
        self.chooser.notes += about.get("notes", [])
        return arrays


def digest_of(counts: np.ndarray) -> str:
    """What tells kept counts from others, in the name of an entry."""
    return hashlib.sha256(np.asarray(counts, dtype="<i8").tobytes()).hexdigest()[:16]
