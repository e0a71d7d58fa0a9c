"""A place for tensors: in memory, or in files that go when nobody holds them any more."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np


class _OnDisk:
    """An array in a file of its own, removed with the last reference to it.

    It is read as a whole rather than mapped: pages of a mapped file would count as the process' own. Its type stays:
    what is computed must not depend on where a tensor stands.
    """

    def __init__(self, array: np.ndarray, folder: Path) -> None:
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".npy", delete=False) as file:
            np.save(file, array)
        self.path = Path(file.name)
        weakref.finalize(self, self.path.unlink, missing_ok=True)


Shelved = Mapping[str, "np.ndarray | _OnDisk"]


class Shelf:
    """Keeps tensors. Use as a context manager: what is left in files goes at the end.

    Args:
        limit: bytes that tensors which are kept together may take in memory.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used_files = False
        self._folder = tempfile.TemporaryDirectory(prefix="onnxprune-", ignore_cleanup_errors=True)

    def __enter__(self) -> Shelf:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def put(self, tensors: Mapping[str, np.ndarray], together: int) -> Shelved:
        """Keep some of the tensors that take ``together`` bytes in all."""
        if together <= self.limit:
            return dict(tensors)
        self.used_files = True
        return {name: _OnDisk(array, Path(self._folder.name)) for name, array in tensors.items()}

    @staticmethod
    def get(shelved: Shelved) -> Mapping[str, np.ndarray]:
        """The tensors again; each is read when it is asked for."""
        return _Opened(shelved)


class _Opened(Mapping[str, np.ndarray]):
    def __init__(self, shelved: Shelved) -> None:
        self._shelved = shelved

    def __getitem__(self, name: str) -> np.ndarray:
        found = self._shelved[name]
        return np.load(found.path) if isinstance(found, _OnDisk) else found

    def __iter__(self) -> Iterator[str]:
        return iter(self._shelved)

    def __len__(self) -> int:
        return len(self._shelved)
