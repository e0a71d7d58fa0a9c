"""BLAS beside onnxruntime: both want the same cores.

NumPy's and SciPy's wheels bring an OpenBLAS each, whose threads spin while they wait. Between two matrix products of
ours stands a run of the network, and they take its cores: half of a run's time where matrices are small.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_WIDE = 1024  # columns from which on several threads gain more than they cost


@contextmanager
def threads(columns: int, count: int) -> Iterator[None]:
    """Limit BLAS to one thread, or to ``count`` (0: no limit) where matrices have many columns."""
    with _loaded().limit(limits=(count or None) if columns >= _WIDE else 1, user_api="blas"):
        yield


@functools.cache
def _loaded() -> Any:
    """The libraries of this process: to look for them takes milliseconds."""
    from threadpoolctl import ThreadpoolController

    importlib.import_module("scipy.linalg")  # brings the one that is not there with NumPy
    return ThreadpoolController()
