"""Files appear whole or not at all, and several of them all or none."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import onnx

from onnxprune.errors import InputError
from onnxprune.tensors import ALIGNED, layout


class Together:
    """Files under temporary names beside their places; all get their names when the block ends well, else none.

    What stood at a place before comes back where a later file cannot be put into its own.
    """

    def __init__(self) -> None:
        self._temporary: dict[Path, Path] = {}  # by the place

    def __enter__(self) -> Together:
        """Begin."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        """Put all files into their places, or remove them."""
        try:
            if kind is None:
                self._place()
        finally:
            for name in self._temporary.values():
                with contextlib.suppress(OSError):
                    name.unlink()

    @property
    def places(self) -> set[Path]:
        """Where the files go, with links resolved."""
        return {place.resolve() for place in self._temporary}

    @contextlib.contextmanager
    def open(self, path: Path) -> Iterator[BinaryIO]:
        """A file to write; what is written is on the disk when the block ends.

        Raises:
            InputError: there is no such folder.
        """
        if not path.parent.is_dir():
            raise InputError(f"{path}: there is no folder {path.parent}; make it, or choose another name")
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        self._temporary[path] = Path(name)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o666 & ~_umask())

    def _place(self) -> None:
        undo: list[tuple[Path, Path | None]] = []
        left = len(self._temporary)
        try:
            for place, name in self._temporary.items():
                left -= 1
                if left and place.exists():  # behind the last one nothing can fail
                    aside = name.with_name(f"{name.name}.before")
                    place.replace(aside)
                    undo.append((place, aside))
                    name.replace(place)
                else:
                    name.replace(place)
                    undo.append((place, None))
        except BaseException:
            for place, before in undo:
                with contextlib.suppress(OSError):
                    if before is None:
                        place.unlink()
                    else:
                        before.replace(place)
            raise
        for _, before in undo:
            if before is not None:
                before.unlink(missing_ok=True)


def write_model(model: onnx.ModelProto, path: Path, *, force: bool = False, files: Together | None = None) -> None:
    """Write a model, and beside it the tensors that it keeps outside.

    Args:
        model: to write.
        path: of the message.
        force: replace files that exist.
        files: those that it appears together with; no tensors go to their places.

    Raises:
        InputError: a file exists and ``force`` is not given, or there is no such folder.
    """
    with contextlib.ExitStack() as stack:
        files = files if files is not None else stack.enter_context(Together())
        message, outside = layout(model, path, files.places)
        for target in (path, *outside):
            if target.exists() and not force:
                raise InputError(f"{target} exists already; choose another name or overwrite it with force=True")
        for target, arrays in outside.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            with files.open(target) as file:
                for array in arrays:
                    file.seek(-(-file.tell() // ALIGNED) * ALIGNED)
                    array.tofile(file)
        with files.open(path) as file:
            file.write(message.SerializeToString())


def beside(model: onnx.ModelProto, places: Sequence[Path], taken: Collection[Path] = ()) -> list[Path]:
    """Where the tensors go that such a model keeps outside, if it is written to these places one after the other."""
    found: list[Path] = []
    for place in places:
        found += layout(model, place, {path.resolve() for path in (*taken, *found)})[1]
    return found


def write_bytes(data: bytes, path: Path) -> None:
    """Write a file whole or not at all."""
    with Together() as files, files.open(path) as file:
        file.write(data)


def cache_folder() -> Path:
    """Where a run may leave things for the next: the user's cache folder, or ``ONNXPRUNE_CACHE``."""
    given = os.environ.get("ONNXPRUNE_CACHE")
    if given:
        return Path(given)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "onnxprune"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
