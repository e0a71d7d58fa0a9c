"""Arrays with a description beside them, in an .npz that holds no pickles."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

Contents = tuple[dict[str, Any], dict[str, np.ndarray]]  # the description, as JSON has it, and the arrays


class Damaged(ValueError):
    """A file that no `write` wrote, or that is not whole."""


def write(file: BinaryIO, about: Mapping[str, Any], arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write both, one array after the other; their names may be any text."""
    names: list[str] = []
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays:
            with archive.open(f"array{len(names)}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.asanyarray(array), allow_pickle=False)
            names.append(name)
        with archive.open("about.npy", "w") as entry:
            text = json.dumps({"names": names, "about": dict(about)})
            np.lib.format.write_array(entry, np.array(text), allow_pickle=False)


def read(path: Path) -> Contents:
    """Read both again.

    Raises:
        Damaged: it is no such file.
        OSError: it cannot be read at all.
    """
    with path.open("rb") as opened:
        try:
            if not zipfile.is_zipfile(opened):
                raise Damaged("another kind of file, or a part of one")
            opened.seek(0)
            with np.load(opened, allow_pickle=False) as file:
                if "about" not in file:
                    raise Damaged("another kind of file")
                found = json.loads(str(file["about"][()]))
                arrays = {str(name): file[f"array{k}"] for k, name in enumerate(found["names"])}
                return dict(found["about"]), arrays
        except MemoryError:
            raise
        except Exception as error:  # what readers of damaged bytes come upon shares no base class
            raise Damaged(" ".join(str(error).split())[:200]) from error
