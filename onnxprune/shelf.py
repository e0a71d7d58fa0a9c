"""A place for the tensors of a frontier: in memory, or in files that go when nobody holds them any more."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path

import numpy as np


class _OnDisk:
    """An array in a file of its own, removed with the last reference to it."""

    def __init__(self, array: np.ndarray, folder: Path) -> None:
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".npy", delete=False) as file:
            np.save(file, array)
        self.path = Path(file.name)
        weakref.finalize(self, self.path.unlink, missing_ok=True)


Shelved = Mapping[str, "np.ndarray | _OnDisk"]


class Shelf:
    """Keeps tensors. Use as a context manager: what is left in files goes at the end.

    Args:
        limit: bytes that one frontier may take in memory.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._folder = tempfile.TemporaryDirectory(prefix="onnxprune-", ignore_cleanup_errors=True)

    def __enter__(self) -> Shelf:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def put(self, tensors: Mapping[str, np.ndarray], frontier_bytes: int) -> Shelved:
        """Keep some tensors of a frontier that takes ``frontier_bytes`` in all."""
        if frontier_bytes <= self.limit:
            return dict(tensors)
        return {name: _OnDisk(array, Path(self._folder.name)) for name, array in tensors.items()}

    @staticmethod
    def get(shelved: Shelved) -> dict[str, np.ndarray]:
        """The tensors again."""
        return {name: np.load(a.path) if isinstance(a, _OnDisk) else a for name, a in shelved.items()}
