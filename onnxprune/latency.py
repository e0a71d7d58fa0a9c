"""A cost model in seconds: the time of every part of a network over its widths, measured on the user's runtime."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx

from onnxprune.analysis import Analysis
from onnxprune.chains import Timed, signature
from onnxprune.costs import Cost
from onnxprune.errors import OnnxPruneError
from onnxprune.parts import Part, parts_of
from onnxprune.probe import Shapes
from onnxprune.progress import Progress
from onnxprune.staircase import Line, Surface, Surfaces
from onnxprune.stopwatch import Stopwatch

SECONDS = 45.0  # after which no further widths are measured
_WAVES = 12
_WORTH = 0.001  # of the whole's time: steps that could win less are not looked for
_EXACT = 0.002  # of the whole's time: standard error that does for what parts that are alike take together
_INSIDE = ((0.5, 0.5), (0.5, 0.25), (0.25, 0.5))  # shares of both widths where their interplay is measured


@dataclass(eq=False)
class Kind:
    """Parts that are alike: the same nodes on the same shapes, made narrower in the same steps."""

    parts: list[Part]
    lines: list[Line] = field(default_factory=list)
    inside: dict[tuple[int, int], float] = field(default_factory=dict)
    worth: float = 0.0  # seconds of one part; what could win less is not looked for

    @property
    def first(self) -> Part:
        """One that speaks for all."""
        return self.parts[0]

    def counts(self, widths: Sequence[int | None]) -> dict[int, int]:
        """Kept counts of the first part for widths per side; None keeps a side whole."""
        kept: dict[int, int] = {}
        for side, width in enumerate(widths):
            if width is not None:
                kept |= self.first.counts(side, width)
        return kept

    def reached(self, kept: Mapping[int, int]) -> tuple[int, ...]:
        """The widths that kept counts of the first part come to."""
        units = [g.units for g in self.first.analysis.groups]
        return tuple(int(w) for w in self.first.widths(np.array([kept.get(g, n) for g, n in enumerate(units)])))

    def driven(self, alone: Collection[int]) -> Iterator[tuple[int, int, Callable[[int], int]]]:
        """Sides with a group that makes them narrower, and from its kept count to the side's width.

        A group that is ``alone`` on some side is left out where it shares one; there the others count as whole.
        """
        units = self.first.analysis.groups
        for part in self.parts:
            for side, groups in enumerate(part.sides):
                for group in groups:
                    if len(groups) == 1 or group not in alone:
                        slope = float(part.slope[side, group])
                        yield side, group, functools.partial(_width, part.full[side], slope, units[group].units)

    @property
    def full(self) -> float:
        """Seconds of one part where everything is kept."""
        return self.lines[0].times[self.lines[0].full]


def _width(full: int, slope: float, units: int, count: int) -> int:
    return round(full - slope * (units - count))


class TimeCost(Cost):
    """Seconds of a run over kept counts: what was measured of the whole, less what the parts win.

    Attributes:
        whole: seconds of the whole network as it is.
        trust: how much of what the parts win alone is taken to be won in the network; corrected by what is seen there.
    """

    def __init__(self, analysis: Analysis, parts: Sequence[tuple[Part, Surface]], whole: float) -> None:
        groups = len(analysis.groups)
        self.surfaces = Surfaces([surface for _, surface in parts])
        self.base = np.zeros((len(parts), 2))
        self.slope = np.zeros((len(parts), 2, groups))
        for k, (part, _) in enumerate(parts):
            self.base[k, : len(part.sides)] = part.base
            self.slope[k, : len(part.sides)] = part.slope
        self.touching = [np.flatnonzero(self.slope[:, :, g].any(axis=1)) for g in range(groups)]
        self.whole = whole
        self.all_parts = float(self.of_parts(np.array([g.units for g in analysis.groups])).sum())
        # the parts cannot take longer than the whole
        self.trust = min(1.0, whole / self.all_parts) if self.all_parts > 0 else 1.0

    def of_parts(self, kept: np.ndarray) -> np.ndarray:
        """Seconds of every part alone, (parts,)."""
        return self.surfaces.at(self.base + self.slope @ kept)

    def won(self, kept: np.ndarray) -> float:
        """Seconds that the parts win alone."""
        return self.all_parts - float(self.of_parts(kept).sum())

    def total(self, kept: np.ndarray) -> float:
        """Seconds for these kept counts."""
        return self.whole - self.trust * self.won(kept)

    def along(self, kept: np.ndarray, group: int, candidates: np.ndarray) -> np.ndarray:
        """Seconds as one group's count runs over the candidates."""
        touched = self.touching[group]
        now = (self.base + self.slope @ kept)[touched]
        steps = np.asarray(candidates, dtype=np.float64) - kept[group]
        new = now + steps[:, None, None] * self.slope[touched, :, group]
        moved = self.surfaces.at(new, touched).sum(axis=1) - self.surfaces.at(now, touched).sum()
        result: np.ndarray = self.total(kept) + self.trust * moved
        return result

    def fastest(self, choices: Sequence[np.ndarray]) -> np.ndarray:
        """Choices that take the least time, as far as single groups tell; of equals the widest."""
        best = np.array([c[-1] for c in choices], dtype=np.int64)
        for start in ([c[0] for c in choices], [c[-1] for c in choices]):
            kept = np.array(start, dtype=np.int64)
            for _ in range(10):
                before = kept.copy()
                for g, candidates in enumerate(choices):
                    seconds = self.along(kept, g, candidates)
                    kept[g] = candidates[len(seconds) - 1 - int(np.argmin(seconds[::-1]))]
                if (kept == before).all():
                    break
            if self.total(kept) < self.total(best):
                best = kept
        return best

    def correct(self, won: float, seconds: float) -> None:
        """Take the network to need this time where the parts alone win so many seconds."""
        if won > 0:
            self.trust = float(np.clip((self.whole - seconds) / won, 0.05, 20.0))


def kinds_of(parts: Sequence[Part]) -> list[Kind]:
    """Parts sorted by what is measured alike; those that cannot stand alone are left out."""
    kinds: dict[object, Kind] = {}
    for part in parts:
        try:
            key = signature(part.model({}))
        except OnnxPruneError:
            continue
        steps = tuple(tuple(sorted(part.slope[k, list(groups)])) for k, groups in enumerate(part.sides))
        kinds.setdefault((key, part.full, tuple(part.base), steps), Kind([])).parts.append(part)
    return list(kinds.values())


def measure_parts(
    analysis: Analysis,
    deployed: Shapes,
    watch: Stopwatch,
    progress: Progress,
    whole: float,
    seconds: float = SECONDS,
) -> list[Kind]:
    """Time every kind of part over its widths, in waves of bisection.

    Args:
        analysis: of the network.
        deployed: shapes at which it is used.
        watch: measures, and remembers.
        progress: advanced by one per wave.
        whole: seconds of the network; how exactly its parts have to be known follows from it.
        seconds: after which no new widths are tried.
    """
    end = time.monotonic() + seconds
    kinds = kinds_of(parts_of(analysis, deployed))
    for kind in kinds:
        kind.worth = _WORTH * whole / len(kind.parts)
    _measure(kinds, {(k, (None,) * len(kind.first.sides)) for k, kind in enumerate(kinds)}, watch)
    kinds = [kind for kind in kinds if kind.lines]
    wanted: set[Point] = set()
    for k, kind in enumerate(kinds):
        for side, line in enumerate(kind.lines):
            least = kind.reached(kind.counts(_only(kind, side, 0)))[side]
            wanted |= {(k, _only(kind, side, width)) for width in line.first(least) if width < line.full}
    for _ in range(_WAVES):
        _measure(kinds, wanted, watch)
        progress.advance()
        gaps = []
        for k, kind in enumerate(kinds):
            for side, line in enumerate(kind.lines):
                for drop, width in line.gaps(kind.worth):
                    gaps.append((-drop * len(kind.parts), k, _only(kind, side, width)))
        wanted = {(k, widths) for _, k, widths in sorted(gaps, key=lambda gap: gap[:2])}
        if not wanted or time.monotonic() > end:
            break
    wanted = set()
    units = [g.units for g in analysis.groups]
    alone, steps = _alone(kinds), _corners(kinds, units)
    for k, kind in enumerate(kinds):
        told = [line.told(kind.worth) for line in kind.lines]
        for side, group, to_width in kind.driven(alone):
            for width in map(to_width, steps[group] or ()):
                if not told[side][width]:
                    wanted.add((k, _only(kind, side, width)))
        for shares in _INSIDE if len(kind.lines) == 2 else ():
            widths = tuple(_nearest(line, share) for line, share in zip(kind.lines, shares, strict=True))
            won = [kind.full - line.times[width] for line, width in zip(kind.lines, widths, strict=True)]
            if won[0] * won[1] / kind.full > kind.worth:  # what the two sides' winning together comes to
                wanted.add((k, widths))
    _measure(kinds, wanted, watch)
    return kinds


def measure_widths(kinds: Sequence[Kind], kept: np.ndarray, watch: Stopwatch) -> bool:
    """Time parts at the widths that kept counts give them, where these are not known; whether any is known now.

    Where several groups meet on a side, not every sum of theirs is among the widths that were tried.
    """
    wanted: set[Point] = set()
    for k, kind in enumerate(kinds):
        for part in kind.parts:
            for side, width in enumerate(np.ceil(part.widths(kept) - 1e-9).astype(int).tolist()):
                if width < kind.lines[side].full and width not in kind.lines[side].times:
                    wanted.add((k, _only(kind, side, width)))
    before = sum(len(line.times) for kind in kinds for line in kind.lines)
    _measure(kinds, wanted, watch)
    return sum(len(line.times) for kind in kinds for line in kind.lines) > before


def timed_choices(kinds: Sequence[Kind], choices: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Of kept counts to choose from, those whose time is known on every side that the group makes narrower.

    Between them lie widths that would take as long, or longer. A group that was not timed, or of which nothing would be
    left, keeps its choices.
    """
    units = [int(c[-1]) for c in choices]
    useful = _corners(kinds, units)
    found = [np.array(sorted(counts), dtype=np.int64) if counts else choices[g] for g, counts in enumerate(useful)]
    alone = _alone(kinds)
    for kind in kinds:
        told = [line.told(kind.worth) for line in kind.lines]
        for side, group, to_width in kind.driven(alone):
            found[group] = np.array([n for n in found[group].tolist() if told[side][to_width(n)]], dtype=np.int64)
    found = [np.intersect1d(here, counts) for here, counts in zip(found, choices, strict=True)]
    return [here if len(here) else counts for here, counts in zip(found, choices, strict=True)]


def _alone(kinds: Sequence[Kind]) -> set[int]:
    """Groups that some side has to itself."""
    return {side[0] for kind in kinds for part in kind.parts for side in part.sides if len(side) == 1}


def _corners(kinds: Sequence[Kind], units: Sequence[int]) -> list[set[int] | None]:
    """Per group all that it has, and the kept counts that are the fast side of a step; None where it was not timed."""
    found: list[set[int] | None] = [None] * len(units)
    alone = _alone(kinds)
    for kind in kinds:
        of_lines = [set(line.corners(kind.worth)) for line in kind.lines]
        for side, group, to_width in kind.driven(alone):
            new = {count for count in range(1, units[group] + 1) if to_width(count) in of_lines[side]}
            found[group] = (found[group] or {units[group]}) | new
    return found


Point = tuple[int, tuple[int | None, ...]]  # a kind, and its widths


def _only(kind: Kind, side: int, width: int) -> tuple[int | None, ...]:
    return tuple(width if k == side else None for k in range(len(kind.first.sides)))


def _nearest(line: Line, share: float) -> int:
    return min((w for w in line.times if w < line.full), key=lambda w: abs(w - share * line.full), default=line.full)


def _measure(kinds: Sequence[Kind], points: set[Point], watch: Stopwatch) -> None:
    """Time points and note them in the kinds; what cannot be made or run stays unknown.

    The first point of every kind is that where all is kept.
    """
    models: dict[str, onnx.ModelProto] = {}
    enough: dict[str, float] = {}
    where: list[tuple[int, tuple[int, ...], list[tuple[Timed, list[str]]]]] = []
    for k, widths in sorted(points, key=str):
        kind, kept = kinds[k], kinds[k].counts(widths)
        try:
            timed = kind.first.timed(kept)
        except OnnxPruneError:
            continue
        keyed = []
        for each in timed:
            both = [each.model] if each.many is None else [each.model, each.many]
            keys = [signature(model) for model in both]
            models |= dict(zip(keys, both, strict=True))
            does = each.enough(_EXACT / _WORTH * kind.worth)
            enough |= {key: min(does, enough.get(key, np.inf)) for key in keys}
            keyed.append((each, keys))
        where.append((k, kind.reached(kept), keyed))
    found = watch.times(models, enough)
    for k, reached, keyed in where:
        if not all(key in found for _, keys in keyed for key in keys):
            continue
        kind = kinds[k]
        readings = [(each, found[keys[0]], found[keys[1]] if len(keys) > 1 else None) for each, keys in keyed]
        total = sum(each.seconds(one.seconds, many.seconds if many else None) for each, one, many in readings)
        error = float(
            np.linalg.norm([each.error(one.error, many.error if many else None) for each, one, many in readings])
        )
        seconds = max(total, 0.01 * readings[0][1].seconds)
        if not kind.lines:
            kind.lines = [Line(width, {width: seconds}, errors={width: error}) for width in reached]
            continue
        narrow = [side for side, width in enumerate(reached) if width < kind.lines[side].full]
        if len(narrow) == 1:
            line, width = kind.lines[narrow[0]], reached[narrow[0]]
            line.times[width], line.errors[width] = seconds, error
        elif len(narrow) == 2:
            kind.inside[reached[0], reached[1]] = seconds


def time_cost(analysis: Analysis, kinds: Sequence[Kind], whole: float) -> TimeCost:
    """The cost model of a network whose parts were measured, and that takes ``whole`` seconds as it is."""
    surfaces = [(kind, Surface.through(tuple(kind.lines), kind.inside)) for kind in kinds]
    return TimeCost(analysis, [(part, surface) for kind, surface in surfaces for part in kind.parts], whole)
