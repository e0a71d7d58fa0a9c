"""Files appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx

from onnxprune.errors import InputError
from onnxprune.tensors import ALIGNED, layout


def write_model(model: onnx.ModelProto, path: Path, *, force: bool = False) -> None:
    """Write a model, and beside it the tensors that it keeps outside.

    Raises:
        InputError: a file exists and ``force`` is not given.
    """
    message, files = layout(model, path)
    for target in (path, *files):
        if target.exists() and not force:
            raise InputError(f"{target} exists already; choose another name or overwrite it with force=True")
    with _written(files):
        write_bytes(message.SerializeToString(), path)


def write_bytes(data: bytes, path: Path) -> None:
    """Write a file whole or not at all: a temporary file in the same folder, fsync, rename."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o666 & ~_umask())
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise


@contextlib.contextmanager
def _written(files: dict[Path, list[np.ndarray]]) -> Iterator[None]:
    """Write values beside a model, aligned, under temporary names; they get their names when the block ends well."""
    temporary: dict[Path, Path] = {}
    try:
        for target, arrays in files.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(prefix=f".{target.name}.", dir=target.parent, delete=False) as file:
                temporary[target] = Path(file.name)
                for array in arrays:
                    file.seek(-(-file.tell() // ALIGNED) * ALIGNED)
                    array.tofile(file)
        yield
        for target, name in temporary.items():
            name.chmod(0o666 & ~_umask())
            name.replace(target)
    finally:
        for name in temporary.values():
            name.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
