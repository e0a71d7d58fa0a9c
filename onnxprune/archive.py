"""Arrays with a description beside them, in an .npz that holds no pickles."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

Contents = tuple[dict[str, Any], dict[str, np.ndarray]]  # the description, as JSON has it, and the arrays


class Damaged(ValueError):
    """A file that no `write` wrote, or that is not whole."""


def write(file: BinaryIO, about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write both; names of arrays may be any text."""
    text = json.dumps({"names": list(arrays), "about": dict(about)})
    numbered = {f"array{k}": array for k, array in enumerate(arrays.values())}
    np.savez(file, about=np.array(text), allow_pickle=False, **numbered)


def read(path: Path) -> Contents:
    """Read both again.

    Raises:
        Damaged: it is no such file.
        OSError: it cannot be read at all.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile) or "about" not in file:
                raise Damaged("another kind of file")
            found = json.loads(str(file["about"][()]))
            arrays = {str(name): file[f"array{k}"] for k, name in enumerate(found["names"])}
            return dict(found["about"]), arrays
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise Damaged(" ".join(str(error).split())[:200]) from error
