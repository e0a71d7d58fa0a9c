"""Time over width, known at measured widths only: which to measure next, and what the others are taken to cost.

A width that was not measured is taken to cost what the next larger measured one costs: keeping more channels than asked
for is always possible. So a budget over such times lands on measured widths, on the fast side of each step. Steps are
found by bisection; nothing is assumed of where they lie.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

_BEYOND_DOUBT = 4.0  # standard errors, for a narrower width to be believed to take longer
_DOUBT = 0.1  # share of the time that both sides have to win for their interplay to be believed


@dataclass
class Line:
    """Times over the widths of one side of a part, the other side being whole.

    Args:
        full: the largest width.
        times: seconds by measured width.
        noise: relative difference below which two times are taken for the same.
        errors: standard errors of the times, where they are known.
        sure: of these errors, below which two times are taken for the same as well.
    """

    full: int
    times: dict[int, float] = field(default_factory=dict)
    noise: float = 0.03
    errors: dict[int, float] = field(default_factory=dict)
    sure: float = 1.5

    def first(self, least: int) -> list[int]:
        """Widths to begin with: the least, one in the middle, and the full one."""
        middle = roundest(self.full * 3 / 8, self.full * 5 / 8)
        return sorted({least, self.full, middle if least < middle < self.full else least})

    def levels(self) -> np.ndarray:
        """Seconds at every width from 0 to the full one, (full + 1,).

        A time that differs by no more than noise from the least of all wider ones is that one.
        """
        result = np.empty(self.full + 1)
        best, doubt = self.times[self.full], self.errors.get(self.full, 0.0)  # the least of all wider
        above = self.full
        for seconds, error, widths in self._plateaus():
            level, same = seconds, max(self.noise * best, self.sure * float(np.hypot(doubt, error)))
            if abs(seconds - best) <= same:
                level = best
            elif seconds < best:
                best, doubt = seconds, error
            for width in widths:
                result[width] = level
                result[width + 1 : above] = result[above]
                above = width
        result[:above] = result[above]
        return result

    def _plateaus(self) -> list[tuple[float, float, list[int]]]:
        """Seconds, their standard error, and the widths that take as long, both widest first.

        That a narrower layer takes longer is noise, unless it is beyond doubt: what lies in between is averaged
        (isotonic regression, by pooling adjacent violators). So a width whose time came out too low is not taken for
        the fast side of a step where the narrower ones show that there is none.
        """
        found: list[tuple[float, float, list[int]]] = []
        slow = []
        for width in sorted(self.times, reverse=True):
            seconds, error = self.times[width], self.errors.get(width, 0.0)
            if found and seconds - found[-1][0] > max(
                self.noise * found[-1][0], _BEYOND_DOUBT * float(np.hypot(error, found[-1][1]))
            ):
                slow.append((seconds, error, [width]))
                continue
            found.append((seconds, error, [width]))
            while len(found) > 1 and found[-1][0] >= found[-2][0]:
                narrow, wide = found.pop(), found.pop()
                found.append(_mean(wide, narrow))
        return sorted([*found, *slow], key=lambda each: -each[2][0])

    def corners(self, smallest: float = 0.0) -> list[int]:
        """Measured widths that take less time than every wider one: the fast sides of the steps.

        Args:
            smallest: seconds; lower steps are none.
        """
        levels, best, found = self.levels(), np.inf, []
        for width in sorted(self.times, reverse=True):
            if levels[width] < best - smallest:
                best = float(levels[width])
                found.append(width)
        return found[::-1]

    def told(self, smallest: float) -> np.ndarray:
        """Of every width from 0 on whether its time is known, or lies between two that are so many seconds apart."""
        levels, found = self.levels(), np.zeros(self.full + 1, bool)
        for low, high in itertools.pairwise(sorted(self.times)):
            found[low : high + 1] |= levels[high:].min() - levels[low] <= smallest
        found[list(self.times)] = True
        return found

    def gaps(self, smallest: float) -> list[tuple[float, int]]:
        """Where a step may hide: (seconds between the ends, width to measure), unsorted.

        Args:
            smallest: seconds; a gap over which less than that can be won is left.
        """
        widths = sorted(self.times)
        levels = self.levels()
        best = np.minimum.accumulate(levels[::-1])[::-1]  # what a width costs at most: a wider one may be cheaper
        doubt = self.sure * max(self.errors.values(), default=0.0)
        found = []
        for low, high in itertools.pairwise(widths):
            drop = float(best[high] - levels[low])
            if high - low > max(self.full // 32, 1) and drop > max(smallest, self.noise * best[high], doubt):
                found.append((drop, roundest(low + (high - low) / 4, high - (high - low) / 4)))
        return found


def _mean(a: tuple[float, float, list[int]], b: tuple[float, float, list[int]]) -> tuple[float, float, list[int]]:
    """Two plateaus as one, every width of equal weight."""
    many, more = len(a[2]), len(b[2])
    both = many + more
    return (many * a[0] + more * b[0]) / both, float(np.hypot(many * a[1], more * b[1])) / both, [*a[2], *b[2]]


def roundest(low: float, high: float) -> int:
    """The multiple of the largest power of two in [low, high]; of several the one nearest to the middle.

    >>> roundest(65, 127), roundest(64, 128), roundest(70, 75), roundest(2.4, 2.6)
    (96, 128, 72, 2)
    """
    power = 1
    while np.floor(high / (2 * power)) * 2 * power >= max(low, 1):
        power *= 2
    many = np.arange(np.ceil(max(low, 1) / power), np.floor(high / power) + 1) * power
    if not len(many):
        return max(int(low), 1)
    return int(many[np.argmin(np.abs(many - (low + high) / 2))])


@dataclass(frozen=True, eq=False)
class Surface:
    """Time over one width, or over the widths of two sides together.

    Of two sides with times ``a`` and ``b`` where the other is whole, and ``t`` where both are:
    ``a + b - t + coupling * (t - a) * (t - b)``. A product of two widths has the coupling 1 / t, a sum has none.
    """

    sides: tuple[np.ndarray, ...]  # seconds at every width
    coupling: float = 0.0

    @staticmethod
    def through(lines: tuple[Line, ...], inside: Mapping[tuple[int, int], float]) -> Surface:
        """The surface through the lines that lies nearest to times measured where neither side is whole."""
        sides = tuple(line.levels() for line in lines)
        if len(sides) < 2 or not inside:
            return Surface(sides, 1.0 / float(sides[0][-1]) if len(sides) == 2 else 0.0)
        full = float(sides[0][-1])
        a, b = (np.array([sides[k][key[k]] for key in inside]) for k in (0, 1))
        x, y = (full - a) * (full - b), np.array(list(inside.values())) - (a + b - full)
        # where a side hardly matters nothing can be told, and a product is the guess
        doubt = (_DOUBT * full**2) ** 2
        coupling = (float(x @ y) + doubt / full) / (float(x @ x) + doubt)
        return Surface(sides, float(np.clip(coupling, 0.0, 2.0 / full)))


class Surfaces:
    """Many surfaces, looked up at once.

    A side that a surface lacks is one whose time is always that of the whole.

    Args:
        surfaces: one per part.
    """

    def __init__(self, surfaces: Sequence[Surface]) -> None:
        self.full = np.array([float(s.sides[0][-1]) for s in surfaces])
        self.coupling = np.array([s.coupling for s in surfaces])
        self.least = np.array([0.02 * float(s.sides[0][-1]) if len(s.sides) > 1 else -np.inf for s in surfaces])
        self.seconds, self.start, self.last = [], [], []
        for k in range(2):
            sides = [s.sides[k] if k < len(s.sides) else s.sides[0][-1:] for s in surfaces]
            lengths = np.array([len(side) for side in sides], dtype=np.int64)
            self.seconds.append(np.concatenate([*sides, np.empty(0)]))
            self.start.append(np.cumsum(lengths) - lengths)
            self.last.append(lengths - 1)

    def at(self, widths: np.ndarray, which: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Seconds, (..., surfaces), at widths (..., surfaces, 2), which are rounded up; fractions are a channel more.

        Args:
            widths: of both sides.
            which: of the surfaces; all of them unless given.
        """
        index = np.ceil(widths - 1e-9).astype(np.int64)
        a, b = (
            self.seconds[k][self.start[k][which] + np.minimum(np.maximum(index[..., k], 0), self.last[k][which])]
            for k in range(2)
        )
        full = self.full[which]
        together = a + b - full + self.coupling[which] * (full - a) * (full - b)
        found: np.ndarray = np.maximum(together, self.least[which])
        return found
