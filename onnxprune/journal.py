"""What a run has finished, on disk until it succeeds: one that was stopped goes on from there.

Every entry appears whole or not at all. A run finds its entries again by all that the outcome depends on: the model,
the data, the options, the versions of the packages.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune import archive
from onnxprune.archive import Contents, Damaged

MOST_RUNS = 5  # that were stopped and are kept
MOST_BYTES = 4 << 30  # that they may take together
LONGEST = 30 * 86400.0  # seconds that one is kept


def _nothing(_: str) -> None:
    """Say nothing."""


class Journal:
    """The entries of one run.

    Args:
        folder: of all runs; None keeps nothing.
        resume: go on from the entries that there are, rather than from the start.
        say: told what is gone on from.
    """

    def __init__(
        self, folder: Path | None = None, *, resume: bool = False, say: Callable[[str], None] = _nothing
    ) -> None:
        self.folder, self.resume, self.say = folder, resume, say
        self.place: Path | None = None

    def begin(self, *key: object) -> None:
        """Open the entries of the run that is told by the key, whatever has a text; others that are old go."""
        if self.folder is None:
            return
        text = json.dumps(key, sort_keys=True, default=str)
        self.place = self.folder / hashlib.sha256(text.encode()).hexdigest()[:32]
        count = self.count
        if not self.resume:
            shutil.rmtree(self.place, ignore_errors=True)
        elif count:
            self.say(f"resumed: {count} finished steps are taken from the run that was stopped")
        else:
            self.say("there is nothing to resume for this model, these data and options: begun from the start")
        with contextlib.suppress(OSError):
            self._tidy()

    @property
    def is_open(self) -> bool:
        """Whether entries are kept."""
        return self.place is not None

    @property
    def count(self) -> int:
        """Entries that there are."""
        return len(list(self.place.glob("*.npz"))) if self.place is not None else 0

    def put(self, name: str, about: Mapping[str, Any], arrays: Iterable[tuple[str, np.ndarray]] = ()) -> None:
        """Keep the outcome of a step."""
        if self.place is None:
            return
        try:
            self.place.mkdir(parents=True, exist_ok=True)
            part = self.place / f"{name}.{os.getpid()}.part"
            with part.open("wb") as file:
                archive.write(file, about, arrays)
            part.replace(self.place / f"{name}.npz")
        except OSError as error:  # that costs the way back, not the run
            self.say(f"{self.place} cannot be written ({error.strerror or error}): the run could not be resumed")
            self.end()

    def get(self, name: str) -> Contents | None:
        """The outcome of a step, if it was finished."""
        if self.place is None or not self.resume:
            return None
        try:
            return archive.read(self.place / f"{name}.npz")
        except (OSError, Damaged):
            return None

    def end(self) -> None:
        """Nothing is left to go on from."""
        if self.place is not None:
            shutil.rmtree(self.place, ignore_errors=True)
            self.place = None

    def _tidy(self) -> None:
        """Remove runs that nobody will go on with."""
        assert self.folder is not None
        runs = [run for run in self.folder.iterdir() if run.is_dir()] if self.folder.is_dir() else []
        left, room = MOST_RUNS - 1, MOST_BYTES
        for changed, run in sorted(((run.stat().st_mtime, run) for run in runs if run != self.place), reverse=True):
            room -= sum(file.stat().st_size for file in run.iterdir())
            left -= 1
            if left < 0 or room < 0 or changed < time.time() - LONGEST:
                shutil.rmtree(run, ignore_errors=True)
