"""Memory: how much of it a run may take, and how that is shared out.

What a part gets decides how large its batches are and what of it stands in files, never what is computed: the one
exception is the fit of blocks, which looks at fewer positions where it gets less.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxprune.errors import InputError

psutil: Any = None
with contextlib.suppress(ImportError):  # there may be no wheel for it
    psutil = importlib.import_module("psutil")

MIB = 1 << 20
# more than this is of no use to a part
_BATCH, _FRONTIER, _ANSWERS, _ROWS, _BLOCK = 256 * MIB, 448 * MIB, 256 * MIB, 256 * MIB, 384 * MIB
_LEAST = 64 * MIB  # to be left for the parts
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of glibc's mallopt
_CGROUPS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))


@dataclass(frozen=True)
class Room:
    """Bytes that the parts of a run may hold.

    Attributes:
        limit: of the resident memory of the process.
        batch: activations of a batch, and what is made of them.
        frontier: a frontier; a larger one stands in files.
        answers: what the original gives where layers are fitted; more of it stands in files.
        rows: rows kept for the fit of one layer; more of them stand in files.
        block: what the fit of a block looks at, unfolded.
    """

    limit: int
    batch: int = _BATCH
    frontier: int = _FRONTIER
    answers: int = _ANSWERS
    rows: int = _ROWS
    block: int = _BLOCK

    @staticmethod
    def of(limit: int | None, sums: int, blocks: int = 1) -> Room:
        """Share out what is left of a limit.

        Args:
            limit: bytes for the whole process; None is what it takes now and half of what is free.
            sums: bytes that the sums over the samples take.
            blocks: times that the fit of a block has a use for more than it gets otherwise.

        Raises:
            InputError: hardly anything is left.
        """
        give_back()
        taken, asked = resident() + sums, limit is not None
        limit = limit if limit is not None else max(resident() + free() // 2, taken + _LEAST)
        left = limit - taken
        if left < _LEAST:
            raise InputError(
                f"memory: expected at least {text(taken + _LEAST)} ({text(taken - sums)} are taken by the model and the"
                f" libraries, {text(sums)} by the sums over the samples), found {text(limit)}; try --memory"
                f" {text(taken + 2 * _LEAST)}"
            )
        parts = zip((_BATCH, _FRONTIER, _ANSWERS, _ROWS, blocks * _BLOCK), _PARTS, strict=True)
        batch, frontier, answers, rows, block = (min(most, left // part) for most, part in parts)
        # unless asked for, what comes out does not depend on the machine
        return Room(limit, batch, frontier, answers, rows, block if asked else blocks * _BLOCK)

    def is_short(self, part: str) -> bool:
        """Whether a part gets less than it has a use for."""
        return bool(getattr(self, part) < getattr(Room(self.limit), part))

    def check(self, name: str, size: int) -> None:
        """Refuse a tensor that is too large by itself.

        Raises:
            InputError: with ``name`` and the memory that it would take.
        """
        more = self.limit + _PARTS[0] * (size - self.batch)
        if size > self.batch and self.is_short("batch"):
            raise InputError(
                f"memory: one sample of {name!r} takes {text(size)} with what is made of it, and of"
                f" {text(self.limit)} there are {text(self.batch)} left for that; try --memory {text(more)}, or smaller"
                " inputs"
            )


_PARTS = (5, 12, 12, 6, 8)  # the fit of a block works with several copies


def give_back() -> None:
    """Have the C library hand what it holds free back to the system (glibc keeps it, else)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def frugal() -> Iterator[None]:
    """Within, have glibc hand back every large array when it goes, rather than keep and scatter it.

    Left to itself it keeps arrays of up to 32 MiB once it has seen one go; that is what it is told to do at the end.
    What small ones leave free stays: to give it back and ask for it anew costs many times what is done with them.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 4 * MIB)
        ctypes.CDLL(None).mallopt(_TRIM_THRESHOLD, 64 * MIB)
    try:
        yield
    finally:
        with contextlib.suppress(OSError, AttributeError, TypeError):
            ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 32 * MIB)
            ctypes.CDLL(None).mallopt(_TRIM_THRESHOLD, 64 * MIB)


def resident() -> int:
    """Bytes of memory that the process takes now."""
    if psutil is not None:
        return int(psutil.Process().memory_info().rss)
    import resource  # not on Windows, for which there are wheels

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory that nobody needs, in this container if it is one."""
    if psutil is not None:
        found = int(psutil.virtual_memory().available)
    else:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    for limit, used in _CGROUPS:
        try:
            left = int((cgroups / limit).read_text()) - int((cgroups / used).read_text())
        except (OSError, ValueError):  # there is none, or it says "max"
            continue
        found = min(found, max(left, 0))
    return found


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Have an allocation fail that goes beyond half of what is free, before the system ends processes for it.

    Where the system knows no such limit nothing is bounded.
    """
    try:
        import resource  # not on Windows

        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        before = resource.getrlimit(resource.RLIMIT_AS)
        most = taken + free() // 2
        resource.setrlimit(
            resource.RLIMIT_AS, (most if before[0] == resource.RLIM_INFINITY else min(most, before[0]), before[1])
        )
    except (ImportError, OSError, ValueError):
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def text(size: int) -> str:
    """A number of bytes as `--memory` takes it.

    >>> text(3 << 19), text(3 << 30)
    ('2MiB', '3072MiB')
    """
    return f"{-(-size // MIB)}MiB"
