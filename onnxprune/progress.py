"""Progress of the stages, shown by whoever runs the pipeline; silent by default."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from onnxprune.memory import give_back


class Progress:
    """Receives the stages of a run, keeps their times, and leaves no memory taken behind them. Subclasses show them."""

    def __init__(self) -> None:
        self.timings: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[None]:
        """One stage; ``total`` is the number of steps that `advance` will count."""
        start = time.perf_counter()
        self.started(name, total)
        try:
            yield
        finally:
            give_back()
            self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - start
            self.finished(name)

    def started(self, name: str, total: int | None) -> None:
        """A stage begins."""

    def advance(self, steps: int = 1) -> None:
        """Some steps of the current stage are done."""

    def finished(self, name: str) -> None:
        """A stage is over."""
