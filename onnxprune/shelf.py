"""A place for tensors: in memory, or in files that go when nobody holds them any more."""

from __future__ import annotations

import itertools
import math
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxprune.errors import InputError
from onnxprune.memory import text


class _File:
    """A file, removed with the last reference to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        weakref.finalize(self, path.unlink, missing_ok=True)


@dataclass(frozen=True, eq=False)
class _OnDisk:
    """An array in a file.

    It is read as a whole rather than mapped: pages of a mapped file would count as the process' own. Its type stays:
    what is computed must not depend on where a tensor stands.
    """

    file: _File
    start: int
    dtype: np.dtype
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        count = math.prod(self.shape)
        return np.fromfile(self.file.path, self.dtype, count, offset=self.start).reshape(self.shape)


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
        """Keep some of the tensors that take ``together`` bytes in all.

        Raises:
            InputError: there is no room for them on the disk.
        """
        if together <= self.limit:
            return dict(tensors)
        self.used_files = True
        found: dict[str, np.ndarray | _OnDisk] = {}
        file = _File(Path(self._folder.name) / str(next(self._numbers)))
        try:
            with file.path.open("wb") as stream:
                for name, array in tensors.items():
                    if array.dtype.hasobject:  # of strings, only the references could be written
                        found[name] = array
                        continue
                    found[name] = _OnDisk(file, stream.tell(), array.dtype, array.shape)
                    array.tofile(stream)
        except OSError as error:
            raise InputError(
                f"{self._folder.name}: expected room for {text(together)} of activations, found"
                f" {text(shutil.disk_usage(self._folder.name).free)} ({error}); try another folder for temporary files"
                " (TMPDIR), fewer samples, or --quick"
            ) from error
        return found

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

    def __contains__(self, name: object) -> bool:
        return name in self._shelved  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self._shelved)

    def __len__(self) -> int:
        return len(self._shelved)
