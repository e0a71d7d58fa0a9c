"""Files that other tools write: each once, whole or not at all, and what a tool said that refused."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path


def is_done(path: Path) -> bool:
    """Whether the file is there, or was refused before."""
    return path.exists() or path.with_suffix(".failed").exists()


def write(path: Path, make: Callable[[Path], object]) -> None:
    """Have a file made beside its place and moved there; what was said instead goes into a file of its own."""
    start, part = time.time(), path.with_suffix(".part.onnx")
    try:
        make(part)
        part.rename(path)
    except Exception as error:  # what a tool refuses is not ours to judge
        part.unlink(missing_ok=True)
        path.with_suffix(".failed").write_text(next(iter(repr(error).splitlines()), "")[:200])
    _say(path, start)


def write_apart(path: Path, make: Callable[[], object]) -> None:
    """The same in a process of its own, of a maker that ends the process now and then and notes down its errors."""
    start, child = time.time(), os.fork()
    if not child:
        make()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status:
        path.with_suffix(".failed").write_text(f"the process ended with status {status}")
    _say(path, start)


def _say(path: Path, start: float) -> None:
    said = "ok" if path.exists() else path.with_suffix(".failed").read_text()
    print(f"{path.stem}: {said} ({time.time() - start:.0f} s)", file=sys.stderr, flush=True)
