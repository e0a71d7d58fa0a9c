"""Work on parts of the data side by side, on threads: NumPy, BLAS and onnxruntime let go of the interpreter's lock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from onnxprune import blas

T = TypeVar("T")
MOST = 4  # things that are worked on at a time: each takes memory of its own
Map = Callable[..., list[Any]]  # like the built-in one, as a list


@contextmanager
def workers(count: int) -> Iterator[Map]:
    """A map that works on as many things at a time; meanwhile each of them has one thread of BLAS.

    What comes out does not depend on the count, but for rounding.
    """
    if count <= 1:
        yield lambda function, *items: list(map(function, *items))
        return
    with ThreadPoolExecutor(count) as pool:

        def spread(function: Callable[..., T], *items: Any) -> list[T]:
            known = np.geterr()  # another thread begins with NumPy's own

            def run(*arguments: Any) -> T:
                with np.errstate(**known):
                    return function(*arguments)

            with blas.threads(0, 1):
                return list(pool.map(run, *items))

        yield spread
