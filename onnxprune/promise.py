"""A budget in time, kept on the user's runtime: solve on the table, measure the cut network, correct, solve again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx

from onnxprune.analysis import Analysis
from onnxprune.chains import signature
from onnxprune.cost import Ratio, measure_ratio
from onnxprune.counting import nominal_shapes
from onnxprune.errors import UnreachableTarget
from onnxprune.latency import Kind, TimeCost, measure_parts, measure_widths, time_cost, timed_choices
from onnxprune.progress import Progress
from onnxprune.runtime import Runtime
from onnxprune.stopwatch import Stopwatch
from onnxprune.targets import Limit, Wanted, unreachable

MISSED = 0.05  # relative: a ratio further off is solved again
_NEAR = 0.025  # relative: a network that seems as near as that is not corrected; measured anew it may be further off
_ROUNDS = 8  # measurements of cut networks, after that of the fastest; where a finished one disappoints, a few more
_LOOKS = 2  # at what is written; one that its interval leaves in doubt gets one more
_NUDGES = (0.0, 0.01, -0.01, 0.02, -0.02, 0.04, -0.04)  # of what is asked of the table, until a network is a new one
_NAMED = 5  # of the places where time stays
_SOLVED_AGAIN = 6  # on a table with more widths, at most

Cut = Callable[[np.ndarray], onnx.ModelProto]  # the network cut to kept counts, its weights not fitted
Solve = Callable[[list[Limit], Sequence[np.ndarray]], np.ndarray]  # kept counts under limits, of some to choose from


@dataclass(frozen=True)
class Step:
    """One round: the ratio that the table promised, and the one that was seen on the cut network, with its interval.

    Of a network that was measured before, all measurements count together.
    """

    promised: float
    seen: float
    low: float
    high: float


@dataclass(eq=False)
class Tried:
    """A network that was measured: how often, and whether it came of the budget, under all limits."""

    counts: np.ndarray
    found: Ratio
    looks: int = 1
    solved: bool = False


@dataclass(frozen=True)
class TimedKind:
    """Layers that are alike, with seconds over the widths that were measured, per side (input, output)."""

    layers: tuple[str, ...]
    seconds: float
    widths: tuple[Mapping[int, float], ...]


@dataclass(frozen=True)
class LatencyEntry:
    """The promise about time: the ratio on the finished files with its interval, and how it was come to.

    ``fixed`` is the share of the original's time that no width changes, ``stays`` where most of it is, in shares too;
    ``reachable`` is the largest ratio measured.
    """

    measured: Ratio
    provider: str
    threads: int
    shapes: Mapping[str, tuple[int, ...]]
    rounds: tuple[Step, ...]
    fixed: float
    stays: Mapping[str, float]
    reachable: float
    table: tuple[TimedKind, ...]
    models_measured: int
    models_remembered: int

    def doubts(self) -> list[str]:
        """That the ratio is not known well enough to say whether the promise was kept; nothing where it is."""
        low, high = self.measured.low, self.measured.high
        if high / low <= (1 + MISSED) / (1 - MISSED):
            return []
        said = f"the measured speed-up is only known to lie between {low:.2f}x and {high:.2f}x (95 % interval)"
        return [f"{said}, which is too little to say that it is the one asked for; a quiet machine would tell more"]


@dataclass(eq=False)
class Timing:
    """Kept counts that bring a network to a time.

    Args:
        analysis: of the network.
        original: the file that is measured against.
        feeds: of the sizes that the network is used with.
        runtime: what it is used on.
        wanted: the ratio.
        cut: makes the network with other counts.
        cache: file of times of earlier runs.
        progress: told of the stages.
    """

    analysis: Analysis
    original: onnx.ModelProto
    feeds: Mapping[str, np.ndarray]
    runtime: Runtime
    wanted: Wanted
    cut: Cut
    cache: Path | None
    progress: Progress
    kinds: list[Kind] = field(default_factory=list)
    choices: Sequence[np.ndarray] = ()  # kept counts whose time is known
    steps: list[Step] = field(default_factory=list)
    tried: dict[bytes, Tried] = field(default_factory=dict)  # by kept counts
    goal: float = field(init=False)  # the ratio that is aimed at
    best_effort: bool = field(default=False, init=False)
    rounds_left: int = field(default=_ROUNDS, init=False)
    cost: TimeCost = field(init=False)
    _measured: Ratio = field(init=False)
    _least: float = field(default=1.0, init=False)  # share of the time that is left where it is shortest

    _stays: dict[str, float] = field(default_factory=dict, init=False)
    _all_choices: Sequence[np.ndarray] = field(default=(), init=False)

    def __post_init__(self) -> None:
        self.goal = self.wanted.speedup

    def measure(self, choices: Sequence[np.ndarray], best_effort: bool) -> None:
        """Time the parts and the whole, see which of the choices are known in time, and what can be reached.

        Raises:
            UnreachableTarget: even the fastest network that was found takes too long, unless ``best_effort``.
        """
        self.best_effort, self._all_choices = best_effort, choices
        watch = self.watch = Stopwatch(self.runtime, self.cache)
        with self.progress.stage("time layers"):
            deployed = nominal_shapes(self.analysis.graph, self.runtime, self.feeds)
            whole = watch.once(
                f"{signature(self.original)} {[self.feeds[name].shape for name in sorted(self.feeds)]}",
                lambda: measure_ratio(self.original, self.original, self.feeds, self.runtime, seconds=1.0).seconds,
            )
            self.kinds = measure_parts(self.analysis, deployed, watch, self.progress, whole)
            self.cost = time_cost(self.analysis, self.kinds, whole)
            self.choices = timed_choices(self.kinds, choices)
            fastest = self._on_known_widths(lambda: self.cost.fastest(self.choices))
            seen = self._see(fastest)
            least = self.wanted.speedup * (1 - MISSED)
            while seen.found.low <= least <= seen.found.high and seen.looks <= _LOOKS:
                seen = self._see(fastest)
            self.cost.correct(self.cost.won(fastest), self.cost.whole / seen.found.ratio)
            self._least = self.cost.total(fastest) / self.cost.whole
            self._stays = self._where_time_stays(fastest)
        if seen.found.ratio < least:
            if not best_effort or seen.found.low <= 1.0:  # as far as is known, nothing makes it faster
                raise self._unreachable()
            self.goal = seen.found.ratio

    @property
    def reachable(self) -> float:
        """The largest ratio measured."""
        return max((each.found.ratio for each in self.tried.values()), default=1.0)

    def _unreachable(self) -> UnreachableTarget:
        fastest = max(self.tried.values(), key=lambda each: each.found.ratio).found
        where = (
            f" (measured on {self.runtime.provider}, 95 % interval {fastest.low:.2f} to {fastest.high:.2f};"
            f" {self._least:.0%} of the time does not follow the widths, most of it at {next(iter(self._stays))})"
        )
        reachable = self.reachable if fastest.low > 1.0 else min(self.reachable, 1.0)
        return unreachable(self.analysis, self.wanted, reachable, where)

    def _where_time_stays(self, fastest: np.ndarray) -> dict[str, float]:
        """What takes the most time where the network is fastest, largest first, in shares of the original's time."""
        seconds, found = iter(self.cost.of_parts(fastest).tolist()), {}
        for kind in self.kinds:
            alike = f" and {len(kind.parts) - 1} alike" if len(kind.parts) > 1 else ""
            found[f"{kind.first.name}{alike}"] = sum(next(seconds) for _ in kind.parts)
        found["nodes that no width touches"] = max(self.cost.whole - self.cost.all_parts, 0.0)
        order = sorted(found, key=lambda name: -found[name])
        return {name: found[name] / self.cost.whole for name in order[:_NAMED]}

    def _on_known_widths(self, find: Callable[[], np.ndarray]) -> np.ndarray:
        """Kept counts that stand on times that were measured: what they need is, until they need no more."""
        for _ in range(_SOLVED_AGAIN):
            counts = find()
            if not measure_widths(self.kinds, counts, self.watch):
                return counts
            self._read_table()
        return find()

    def _read_table(self) -> None:
        """The cost model as the table is now, trusted as before."""
        trust = self.cost.trust
        self.cost = time_cost(self.analysis, self.kinds, self.cost.whole)
        self.cost.trust = trust

    def _believe_all(self) -> bool:
        """Take every time in the table for what was measured, however small a step it makes; whether that is new."""
        lines = [line for kind in self.kinds for line in kind.lines]
        if not any(line.sure or line.noise for line in lines):
            return False
        for line in lines:
            line.sure = line.noise = 0.0
        self._read_table()
        self.choices = timed_choices(self.kinds, self._all_choices)
        return True

    def _see(self, counts: np.ndarray) -> Tried:
        """Measure a cut network; of one that was measured before, both together count."""
        found = measure_ratio(self.original, self.cut(counts), self.feeds, self.runtime)
        seen = self.tried.get(counts.tobytes())
        if seen is None:
            seen = self.tried[counts.tobytes()] = Tried(counts, found)
        else:
            seen.found, seen.looks = seen.found + found, seen.looks + 1
        promised = self.cost.whole / self.cost.total(counts)
        self.steps.append(Step(promised, seen.found.ratio, seen.found.low, seen.found.high))
        return seen

    def solve(self, allocate: Solve, others: list[Limit]) -> np.ndarray:
        """Kept counts with which the cut network, measured, comes nearest to the ratio.

        Every round asks the table for what would be right if it erred between the nearest slower and the nearest faster
        network measured as it did there. A network that its interval leaves in doubt is measured again rather than
        corrected, and so is the one that is to be written.

        Args:
            allocate: kept counts under limits.
            others: limits besides the time; they may ask for more than the ratio does.

        Raises:
            UnreachableTarget: even the fastest network, measured again, is too slow, unless that is to be passed over.
        """
        with self.progress.stage("meet the time", _ROUNDS):
            for left in reversed(range(max(self.rounds_left, _LOOKS))):
                best, counts = self._nearest(others), None
                if best is not None and best.solved:
                    if best.looks < self._looks(best, others):
                        counts = best.counts
                    elif self._is_met(best, others):
                        break
                if counts is None and (left or best is None):
                    counts = self._untried(allocate, others)
                if counts is None:  # the widths, or the rounds, allow no other
                    best = self._nearest(others)
                    if best is None or best.looks >= _LOOKS:
                        break
                    counts = best.counts
                self._see(counts).solved = True
                self.rounds_left -= 1
                self.progress.advance()
        found = self._nearest(others)
        if found is None or (found.found.ratio < self.goal * (1 - MISSED) and not self.best_effort):
            raise self._unreachable()
        return found.counts

    def _gap(self, each: Tried) -> float:
        return abs(each.found.ratio / self.goal - 1)

    def _is_met(self, each: Tried, others: list[Limit]) -> bool:
        """Whether no further network need be tried."""
        return self._gap(each) <= _NEAR or bool(others and each.found.ratio >= self.goal)

    def _looks(self, each: Tried, others: list[Limit]) -> int:
        """How often it has to be measured before anything follows from it."""
        low, high = each.found.low / self.goal, each.found.high / self.goal
        if self._is_met(each, others):
            return _LOOKS if low >= 1 - MISSED and (others or high <= 1 + MISSED) else _LOOKS + 1
        return _LOOKS + 1 if low <= 1 <= high else 1

    def _nearest(self, others: list[Limit]) -> Tried | None:
        """Of the networks measured the one to write, so far; where none is near enough, the nearest faster one."""

        def rank(each: Tried) -> tuple[bool, bool, bool, float]:
            far = self._gap(each) > MISSED
            return far and each.found.ratio < self.goal, far, not each.solved, self._gap(each)

        return min((each for each in self.tried.values() if each.solved or not others), key=rank, default=None)

    def _untried(self, allocate: Solve, others: list[Limit]) -> np.ndarray | None:
        """Kept counts of a network that was not measured yet, where the ratio is expected; None where there is none."""
        aim = 1 - 1 / self.goal  # the share of the time to win
        won = [(1 - 1 / each.found.ratio, self.cost.won(each.counts)) for each in self.tried.values()]
        slower = max((each for each in won if 0.0 < each[0] <= aim), default=(0.0, 0.0))
        faster = min((each for each in won if each[0] > aim), default=None)
        if faster is not None:
            asked = slower[1] + (aim - slower[0]) / (faster[0] - slower[0]) * (faster[1] - slower[1])
        else:
            asked = slower[1] * aim / slower[0] if slower[0] > 0 else self.cost.all_parts
        seconds = self.cost.whole / self.goal
        for nudge in _NUDGES:
            self.cost.correct(asked * (1 + nudge), seconds)
            counts = self._on_known_widths(
                lambda: allocate([Limit("latency", self.cost, seconds), *others], self.choices)
            )
            seen = self.tried.get(counts.tobytes())
            if seen is None:
                return counts
            seen.solved = True
        if self._believe_all():  # the steps beyond doubt are too far apart
            return self._untried(allocate, others)
        return None

    def keeps_promise(self, pruned: onnx.ModelProto, counts: np.ndarray) -> bool:
        """Measure the finished network; whether its ratio is near enough. If not, more is known of its cut."""
        found = measure_ratio(self.original, pruned, self.feeds, self.runtime, seconds=5.0)
        if abs(found.ratio / self.goal - 1) > MISSED:
            found = found + measure_ratio(self.original, pruned, self.feeds, self.runtime, seconds=5.0)
        self._measured = found
        kept = abs(found.ratio / self.goal - 1) <= MISSED
        if not kept:
            seen = self.tried[counts.tobytes()]
            seen.found = seen.found + found
        return kept

    def entry(self) -> LatencyEntry:
        """What the report says of the network that was finished last."""
        measured = self._measured
        table = tuple(
            TimedKind(
                tuple(part.name for part in kind.parts),
                kind.full,
                tuple(dict(sorted(x.times.items())) for x in kind.lines),
            )
            for kind in sorted(self.kinds, key=lambda kind: -kind.full * len(kind.parts))
        )
        return LatencyEntry(
            measured,
            self.runtime.provider,
            self.runtime.thread_count,
            {name: tuple(array.shape) for name, array in self.feeds.items()},
            tuple(self.steps),
            self._least,
            self._stays,
            max(self.reachable, measured.ratio),
            table,
            self.watch.measured,
            self.watch.remembered,
        )
