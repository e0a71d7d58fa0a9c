"""A budget in time, kept on the user's runtime: solve on the table, measure the cut network, correct, solve again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx

from onnxprune.analysis import Analysis
from onnxprune.cost import Ratio, measure_ratio
from onnxprune.counting import nominal_shapes
from onnxprune.latency import Kind, TimeCost, measure_parts, measure_widths, time_cost, timed_choices
from onnxprune.progress import Progress
from onnxprune.runtime import Runtime
from onnxprune.stopwatch import Stopwatch
from onnxprune.targets import Limit, Wanted, unreachable

MISSED = 0.05  # relative: a ratio further off is solved again
_CLOSE = 0.015  # relative: as near as rounds try to come
_ROUNDS = 10
_NAMED = 5  # of the places where time stays
_SOLVED_AGAIN = 6  # on a table with more widths, at most

Cut = Callable[[np.ndarray], onnx.ModelProto]  # the network cut to kept counts, its weights not fitted
Solve = Callable[[list[Limit]], np.ndarray]  # kept counts under limits


@dataclass(frozen=True)
class Step:
    """One round: the ratio that the table promised, and the one that was seen on the cut network."""

    promised: float
    seen: float


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
    steps: list[Step] = field(default_factory=list)
    reachable: float = 1.0
    goal: float = field(init=False)  # the ratio that is aimed at
    cost: TimeCost = field(init=False)
    _measured: Ratio = field(init=False)
    _least: float = field(default=1.0, init=False)  # share of the time that is left where it is shortest

    _stays: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.goal = self.wanted.speedup

    def measure(self, choices: Sequence[np.ndarray], best_effort: bool) -> list[np.ndarray]:
        """Time the parts and the whole, and see what can be reached; returns the choices whose time is known.

        Raises:
            UnreachableTarget: even the fastest network that was found takes too long, unless ``best_effort``.
        """
        watch = self.watch = Stopwatch(self.runtime, self.cache)
        with self.progress.stage("time layers"):
            deployed = nominal_shapes(self.analysis.graph, self.runtime, self.feeds)
            self.kinds = measure_parts(self.analysis, deployed, watch, self.progress)
            # the very network is measured against itself once, for its seconds
            whole = measure_ratio(self.original, self.original, self.feeds, self.runtime, seconds=1.0).seconds
            self.cost = time_cost(self.analysis, self.kinds, whole)
            choices = timed_choices(self.kinds, choices)
            fastest = self._on_known_widths(lambda: self.cost.fastest(choices))
            seen = self._see(fastest)
            self._least = self.cost.total(fastest) / self.cost.whole
            self._stays = self._where_time_stays(fastest)
            self.reachable = seen.ratio
        if seen.high < self.wanted.speedup * (1 - MISSED):
            if not best_effort or seen.high <= 1.0:
                where = (
                    f" (measured on {self.runtime.provider}; {self._least:.0%} of the time does not follow the widths,"
                    f" most of it at {next(iter(self._stays))})"
                )
                raise unreachable(self.analysis, self.wanted, self.reachable, where)
            self.goal = seen.ratio
        return list(choices)

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
            trust = self.cost.trust
            self.cost = time_cost(self.analysis, self.kinds, self.cost.whole)
            self.cost.trust = trust
        return find()

    def _see(self, counts: np.ndarray) -> Ratio:
        found = measure_ratio(self.original, self.cut(counts), self.feeds, self.runtime)
        self.steps.append(Step(self.cost.whole / self.cost.total(counts), found.ratio))
        self.cost.correct(counts, self.cost.whole / found.ratio)
        self.reachable = max(self.reachable, found.ratio)
        return found

    def solve(self, allocate: Solve, others: list[Limit]) -> np.ndarray:
        """Kept counts with which the cut network, measured, comes nearest to the ratio.

        After every round the table is trusted as far as the last network bears out; once networks on both sides of the
        ratio were seen, never outside what gave those two.
        """
        best, nearest = np.empty(0, np.int64), np.inf
        seen: dict[bytes, Ratio] = {}
        slow, fast = np.inf, 0.0  # trusts that gave too slow and too fast a network
        with self.progress.stage("meet the time", _ROUNDS):
            for _ in range(_ROUNDS):
                trust = self.cost.trust
                counts = self._on_known_widths(
                    lambda: allocate([Limit("latency", self.cost, self.cost.whole / self.goal), *others])
                )
                again = counts.tobytes() in seen
                found = seen[counts.tobytes()] if again else self._see(counts)
                seen[counts.tobytes()] = found
                self.progress.advance()
                miss = found.ratio / self.goal - 1
                # other limits may ask for more than the ratio does
                gap = max(-miss, 0.0) if others and miss > 0 else abs(miss)
                if gap < nearest:
                    best, nearest = counts, gap
                slow, fast = (min(slow, trust), fast) if miss < 0 else (slow, max(fast, trust))
                # of a ratio that cannot be told from the goal, no further round knows better
                met = gap <= _CLOSE or (gap <= MISSED / 2 and found.low <= self.goal <= found.high)
                if met or (again and not (np.isfinite(slow) and fast)) or slow < fast * 1.001:
                    break
                if np.isfinite(slow) and fast and not fast < self.cost.trust < slow:
                    self.cost.trust = float(np.sqrt(slow * fast))
        return best

    def keeps_promise(self, pruned: onnx.ModelProto, counts: np.ndarray) -> bool:
        """Measure the finished network; whether its ratio is near enough, or further rounds come no nearer."""
        found = self._measured = measure_ratio(self.original, pruned, self.feeds, self.runtime, seconds=5.0)
        self.cost.correct(counts, self.cost.whole / found.ratio)
        return abs(found.ratio / self.goal - 1) <= MISSED

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
