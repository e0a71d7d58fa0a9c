"""A place for tensors: in memory, or in files that go when nobody holds them any more."""

from __future__ import annotations

import itertools
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

    def __init__(self, array: np.ndarray, path: Path) -> None:
        self.path, self.dtype, self.shape = path, array.dtype, array.shape
        array.tofile(path)
        weakref.finalize(self, path.unlink, missing_ok=True)

    def read(self) -> np.ndarray:
        return np.fromfile(self.path, self.dtype).reshape(self.shape)


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
        self._numbers = itertools.count()

    def __enter__(self) -> Shelf:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def put(self, tensors: Mapping[str, np.ndarray], together: int) -> Shelved:
        """Keep some of the tensors that take ``together`` bytes in all."""
        if together <= self.limit:
            return dict(tensors)
        self.used_files = True
        folder = Path(self._folder.name)
        return {  # of strings, only the references could be written
            name: array if array.dtype.hasobject else _OnDisk(array, folder / str(next(self._numbers)))
            for name, array in tensors.items()
        }

    @staticmethod
    def get(shelved: Shelved) -> Mapping[str, np.ndarray]:
        """The tensors again; each is read when it is asked for."""
        return _Opened(shelved)


class _Opened(Mapping[str, np.ndarray]):
    def __init__(self, shelved: Shelved) -> None:
        self._shelved = shelved

    def __getitem__(self, name: str) -> np.ndarray:
        found = self._shelved[name]
        return found.read() if isinstance(found, _OnDisk) else found

    def __iter__(self) -> Iterator[str]:
        return iter(self._shelved)

    def __len__(self) -> int:
        return len(self._shelved)
