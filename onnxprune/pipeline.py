"""The stages between a model with its data and the new weights: rank, price, allocate, sweep."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from onnxprune import blas, budget
from onnxprune.analysis import Analysis
from onnxprune.answers import Answers
from onnxprune.batches import LARGEST, PERIOD, Batches, batch_size, enough, rows_bytes, sample_bytes
from onnxprune.blocks import find_blocks
from onnxprune.calibrate import Arrays, Sweep
from onnxprune.cluster import collect_on
from onnxprune.collecting import collect, in_pieces
from onnxprune.costs import Cost, Several
from onnxprune.data import Calibration
from onnxprune.effort import BALANCED, Effort
from onnxprune.errors import InternalError
from onnxprune.fitting import Fitting
from onnxprune.journal import Journal
from onnxprune.memory import Room, frugal, text
from onnxprune.narrowing import Narrowing, curve, near
from onnxprune.parallel import MOST
from onnxprune.progress import Progress
from onnxprune.readers import Reader, find_readers
from onnxprune.runtime import Runtime
from onnxprune.select import Ranking
from onnxprune.selection import problems_of, rank, scales, with_errors
from onnxprune.sensitivity import Variants, measure
from onnxprune.shelf import Shelf
from onnxprune.statistics import Statistics
from onnxprune.steps import Steps, digest_of
from onnxprune.targets import Limit

_FEW = 1000  # samples
_FEW_BLOCKS = 2  # times as many positions are looked at where samples are few: neighbours say something then


@dataclass(eq=False)
class Chooser:
    """How many units every group keeps, which ones, and the weights that go with them."""

    analysis: Analysis
    data: Calibration
    runtime: Runtime
    progress: Progress
    method: str
    budget: str
    seed: int
    batch: int | None = None
    memory: int | None = None
    dask: str | None = None
    effort: Effort = BALANCED
    mirrors: Mapping[str, int] = field(default_factory=dict)  # per image input, the axis along which it may be turned
    mirrored: int = 0  # mirror images among the data
    readers: tuple[Reader, ...] = ()
    statistics: dict[int, list[Statistics]] = field(default_factory=dict)
    rankings: list[Ranking] = field(default_factory=list)
    damage: list[dict[int, float]] | None = None  # per group, by kept count what it does to the output
    answers: Answers | None = None  # of the original, for the sweeps
    journal: Journal = field(default_factory=Journal)  # of what is finished

    def __post_init__(self) -> None:
        if self.method == "slimming":  # refused at once, rather than after a pass over the data
            for info in self.analysis.groups:
                scales(info, self.analysis)
        self.readers = find_readers(self.analysis)
        few = len(self.data) * (2 if self.mirrors else 1) < _FEW
        self.effort = self.effort.of_few if few else self.effort
        # damage is measured on samples that the first reconstructions have not seen
        count = self.effort.damage_samples(len(self.data), len(self.analysis.groups))
        self.first, self.pricing = self.data.split(count) if count else (self.data, self.data)
        if self.mirrors:
            self.first, rest = (part.mirrored(self.mirrors, PERIOD) for part in (self.first, self.pricing))
            whole = self.first.joined(rest) if count else self.first
            self.mirrored, self.data = len(whole) - len(self.data), whole
        # statistics of all readers, and what is worked out from those of one
        sums = [8 * r.weights.shape[0] * r.width * (r.width + r.weights.shape[2]) for r in self.readers]
        blocks = _FEW_BLOCKS if few else 1
        self.room = Room.of(self.memory, sum(sums) + 4 * max(sums, default=0), blocks)

    @contextmanager
    def at_work(self, sweeping: bool) -> Iterator[None]:
        """Limit BLAS as the readers' widths call for; if sweeps follow, keep what they need of the original."""
        widest = max((r.width for r in self.readers), default=0)
        with blas.threads(widest, self.runtime.threads), frugal(), Shelf(self.room.answers) as shelf:
            if sweeping:
                batches = self._batches(self._fitted_to, self.readers)
                blocks = find_blocks(self.analysis, self.readers) if self.effort.together else ()
                most = self.room.block, shelf, self.effort.products
                self.answers = Answers(self.analysis, self.readers, blocks, batches, *most)
            yield

    # ------------------------------------------------------------------------------------ statistics and ranks

    def collect(self) -> None:
        """Sum up what every reader of a group reads in the original network."""
        chosen = [r for r in self.readers if r.columns]
        if self.answers is None or self.dask is not None:
            used = self.first if self.answers is None else min(self.first, self._fitted_to, key=len)
            batches = self._batches(used, chosen)
            here = functools.partial(collect, room=self.room)
            run = here if self.dask is None else functools.partial(collect_on, self.dask)
        else:  # what sweeps need comes with it
            batches = self.answers.batches
            run = functools.partial(collect, summed=len(self.first), answers=self.answers, room=self.room)
        with self.progress.stage("calibrate", len(batches.data)):
            found = run(self.analysis, chosen, batches, self.runtime, self.progress) if chosen else []
        self.statistics = {r.index: s for r, s in zip(chosen, found, strict=True)}

    def rank(self) -> None:
        """Rank the units of every group on the original network."""
        with self.progress.stage("rank", len(self.analysis.groups)):
            for info in self.analysis.groups:
                problems = problems_of(info.group.index, self.readers, self.statistics, {})
                ranking = rank(self.method, info, problems, self.analysis, self.seed)
                self.rankings.append(with_errors(ranking, problems))
                self.progress.advance()

    # ------------------------------------------------------------------------------------------------- budget

    @property
    def asks_for_damage(self) -> bool:
        """Whether the budget goes by what a narrower group does to the output."""
        return self.method != "slimming" and self.budget == "auto"

    def price(self, *, every: bool) -> None:
        """Find what narrower groups do to the output, where the budget asks for that.

        Args:
            every: at every width that is ever looked at; else not at the narrowest, of which few networks ask for more
                than a few (see `allocate`).
        """
        if not self.asks_for_damage:
            return
        if self.damage is None:
            self.damage = [{} for _ in self.analysis.groups]
            self._look(self._levels if every else [_wider(levels) for levels in self._levels])

    def allocate(self, limits: Sequence[Limit], choices: Sequence[np.ndarray]) -> np.ndarray:
        """Kept counts within the limits: by measured damage, or the same share of every group where none was priced.

        The other ways are those of the option ``budget``, see `onnxprune.prune`.
        """
        units = [g.units for g in self.analysis.groups]
        costs, most = [each.cost for each in limits], [each.limit for each in limits]
        together = Several(costs, most, [1.0] * len(costs))
        if self.budget == "papers":
            return budget.by_stage(units, stages(self.analysis), together, 1.0, choices)
        if self.method == "slimming" and self.budget == "auto":
            scores = [scales(info, self.analysis) for info in self.analysis.groups]
            return budget.global_threshold(scores, together, 1.0, choices)
        if self.damage is None:
            return budget.uniform(units, together, 1.0, choices)
        return self._least_damage(costs, most, choices)

    def _least_damage(self, costs: Sequence[Cost], most: Sequence[float], choices: Sequence[np.ndarray]) -> np.ndarray:
        """Kept counts of least damage within the limits.

        A group that comes out narrower than any width at which its damage is known, if that is what it may be at best,
        has it measured at the narrowest, too. What other networks of a family asked for is not used: each is what it
        would be alone.
        """
        every = self._levels
        levels = [_wider(each) for each in every]
        while True:
            damage = self._look(levels)
            curves = [
                budget.interpolate(
                    info.units,
                    levels[g],
                    [damage[g][count] for count in levels[g]],
                    self.rankings[g].errors,
                    steeply=levels[g] == every[g],
                )
                for g, info in enumerate(self.analysis.groups)
            ]
            kept = budget.allocate_within(curves, costs, most, choices)
            narrow = [g for g, count in enumerate(kept) if count < levels[g][0] and levels[g] != every[g]]
            if not narrow:
                return kept
            for g in narrow:
                levels[g] = every[g]

    @functools.cached_property
    def _levels(self) -> list[list[int]]:
        """Per group the kept counts at which damage is measured, or was by those who did it before, ascending."""
        if self.damage is not None and all(self.damage):
            return [sorted(known) for known in self.damage]
        shares = self.effort.levels
        return [
            sorted({min(max(round(info.units * share), 1), info.units - 1) for share in shares})
            for info in self.analysis.groups
        ]

    def _look(self, levels: Sequence[Sequence[int]]) -> list[dict[int, float]]:
        """Per group the damage by kept count, at these counts at least: measured as far as it is not known."""
        damage = self.damage or [{} for _ in levels]
        missing = [
            [count for count in counts if count not in known] for counts, known in zip(levels, damage, strict=True)
        ]
        if any(missing):
            step = f"damage-{digest_of(np.array([(g, c) for g, counts in enumerate(missing) for c in counts]))}"
            entry = self.journal.get(step)
            found = self.measured_damage(missing) if entry is None else entry[0]["damage"]
            if entry is None:
                self.journal.put(step, {"damage": found})
            damage = [
                known | dict(zip(counts, each, strict=True))
                for known, counts, each in zip(damage, missing, found, strict=True)
            ]
            self.damage = damage
        return damage

    def measured_damage(self, counts: Sequence[Sequence[int]]) -> list[list[float]]:
        """Per group what these kept counts do to the output."""
        narrowing = Narrowing(self.analysis, self.readers, self.statistics, self.rankings)
        return self._measured(narrowing, [narrowing.variants(g, each) for g, each in enumerate(counts)])

    def _measured(self, narrowing: Narrowing, variants: Sequence[Variants]) -> list[list[float]]:
        """What every one of a group's variants does to the output."""
        batches = self._batches(self.pricing, ())
        given = {info.group.index: each for info, each in zip(self.analysis.groups, variants, strict=True)}
        with self.progress.stage("sensitivity", len(given)):
            found = measure(self.analysis, given, batches, self.runtime, self.progress, self.room, narrowing.arrays)
        return [found.get(index, []) for index in given]

    def _batches(self, data: Calibration, readers: Sequence[Reader]) -> Batches:
        """The data in batches such that what a layer reads and gives has room, and what is unfolded of it for a fit.

        Args:
            data: the records.
            readers: of which something is unfolded.
        """
        largest, size = "", 0
        for reader in self.readers:
            rows = rows_bytes(self.analysis, reader, len(data), self.effort.thinned) if reader in readers else 0
            # what the runtime holds, what it hands over, and what is made of it
            taken = 2 * sample_bytes(self.analysis, [reader.layer.data, reader.layer.output]) + rows
            largest, size = (reader.layer.data, taken) if taken > size else (largest, size)
        self.room.check(largest, size)
        size = max(size, self._widest_node)
        if not in_pieces(self.analysis, self.readers, len(self.data), self.room):  # all of it at once, then
            held = {name for r in self.readers for name in (r.layer.data, r.layer.output)}
            size = max(size, 2 * sample_bytes(self.analysis, sorted(held)))
        return Batches(data, self._at_once(size * self.runtime.shared_out(MOST)[0]), self.seed, self.effort.thinned)

    @functools.cached_property
    def _widest_node(self) -> int:
        """Bytes that the runtime holds of a sample while it runs a node, at most."""
        graph = self.analysis.graph
        flowing = [[n for n in (*node.inputs, *node.outputs) if not graph.is_stored(n)] for node in graph.nodes]
        return max((sample_bytes(self.analysis, names) for names in flowing), default=0)

    @property
    def at_once(self) -> int:
        """Samples to run whole networks on."""
        return self._at_once(2 * sample_bytes(self.analysis, sorted({r.layer.data for r in self.readers})))

    def _at_once(self, size: int) -> int:
        """Samples of so many bytes each."""
        fitting = batch_size(size, self.room.batch)
        return min(self.batch or fitting, LARGEST if self.memory is None else fitting)

    # -------------------------------------------------------------------------------------------------- sweep

    def choose(self, counts: np.ndarray) -> Fitting:
        """Keep these many units, by the ranks on the original network; nothing is fitted."""
        swaps = self.effort.swaps
        return Fitting(self.analysis, self.readers, self.rankings, counts, self.method, self.seed, swaps)

    def fit(self, counts: np.ndarray, limits: Sequence[Limit], choices: Sequence[np.ndarray]) -> Fitting:
        """`sweep`, and once more where the network that comes out says that other widths cost less damage.

        What the groups' losses do together is not what each does alone. Of both networks that with less damage is kept.

        Args:
            counts: kept units per group, as `allocate` found them.
            limits: within which that was.
            choices: per group the kept counts to choose from.
        """
        first = self.sweep(counts)
        if not self.effort.again or self.damage is None:
            return first
        others = self._allocated_again(first, limits, choices)
        if np.array_equal(others, counts):
            return first
        again = self.sweep(others)
        return again if self._is_better(again.arrays, first.arrays) else first

    def _allocated_again(self, fitting: Fitting, limits: Sequence[Limit], choices: Sequence[np.ndarray]) -> np.ndarray:
        """Kept counts near those of a fitted network, by what they change in it."""
        counts = fitting.counts
        around = [near(each, int(count)) for each, count in zip(choices, counts, strict=True)]
        ends = [[int(each[k]) for k in (0, -1) if each[k] != count] for each, count in zip(around, counts, strict=True)]
        step = f"again-{digest_of(counts)}"
        entry = self.journal.get(step)
        if entry is not None:
            moved = entry[0]["moved"]
        else:
            narrowing = Narrowing(
                self.analysis, self.readers, self.statistics, self.rankings, fitting.kept, fitting.arrays
            )
            variants = [narrowing.variants(g, each, int(counts[g])) for g, each in enumerate(ends)]
            moved = self._measured(narrowing, variants)
            self.journal.put(step, {"moved": moved})
        curves = [
            curve(info.units, each, int(count), found, ranking.errors)
            for info, each, count, found, ranking in zip(
                self.analysis.groups, ends, counts, moved, self.rankings, strict=True
            )
        ]
        return budget.allocate_within(curves, [each.cost for each in limits], [each.limit for each in limits], around)

    def _is_better(self, arrays: Arrays, others: Arrays) -> bool:
        """Whether a fitted network is nearer to the original than another."""
        graph, batches = self.analysis.graph, self._batches(self._fitted_to, ())
        names = sorted({*arrays, *others})
        both = [{name: each.get(name, graph.array(name)) for name in names} for each in (arrays, others)]
        given = {0: Variants(names, both.__getitem__, len(both))}
        with self.progress.stage("sensitivity", 1):
            found = measure(self.analysis, given, batches, self.runtime, self.progress, self.room)
        return found[0][0] < found[0][1]

    def sweep(self, counts: np.ndarray) -> Fitting:
        """Choose and fit from reader to reader."""
        answers = self.answers
        if answers is None:
            raise InternalError("a sweep outside of `at_work`")
        fitting = self.choose(counts)
        with self.progress.stage("rank"):
            fitting.begin(self.statistics, sweeping=True)
        fitted = fitting.to_be_fitted()
        closely = [r for r in fitted if self.effort.together and (not r.columns or fitting.is_cut(r))]
        twice = self.effort.twice
        runner = Sweep(self.analysis, fitted, answers, self.runtime, fitting.arrays, self.room, closely, twice)
        steps = Steps(fitting, self.journal)
        if not answers.are_known:  # after a run that was stopped, or on a cluster
            with self.progress.stage("calibrate", len(answers.batches.data)):
                collect(
                    self.analysis, (), answers.batches, self.runtime, self.progress, answers=answers, room=self.room
                )
        with self.progress.stage("reconstruct", len(fitted)):
            fitting.arrays = runner.run(steps.reader, steps.block, self.progress, steps.recall)
        if (count := len(self._fitted_to)) < len(self.data):
            fitting.say(f"sums and fits are of {count} of the {len(self.data)} samples: more would change little")
        if adapted := self._adapted(answers.batches, runner):
            fitting.say(f"to stay within {text(self.room.limit)} of memory: {', '.join(adapted)}")
        return fitting

    @functools.cached_property
    def _fitted_to(self) -> Calibration:
        """The first samples of the data, as many as the fits have a use for."""
        count = enough(self.analysis, self.readers, self.effort.thinned)
        return self.data if count >= len(self.data) else self.data.split(len(self.data) - count)[0]

    def _adapted(self, batches: Batches, runner: Sweep) -> list[str]:
        """What is done otherwise, for want of memory, than it would be done."""
        done = []
        if self.room.is_short("batch"):
            done.append(f"batches of {max(map(len, batches.parts))}")
        if runner.used_files and self.room.is_short("frontier"):
            done.append("activations in files")
        if self.room.is_short("block"):
            done.append(f"{text(self.room.block)} of activations for the fit of two layers")
        return done

    def fit_once(self, counts: np.ndarray) -> Fitting:
        """Choose, and fit every reader to what it gave in the original, from the statistics alone."""
        fitting = self.choose(counts)
        fitting.begin(self.statistics, sweeping=False)
        cut = [r for r in self.readers if r.index in self.statistics and fitting.is_cut(r)]
        with self.progress.stage("reconstruct", len(cut)):
            for reader in cut:
                fitting.arrays |= fitting.once(reader, self.statistics[reader.index])
                self.progress.advance()
        return fitting


def _wider(levels: list[int]) -> list[int]:
    """All levels but the narrowest, unless there is one only."""
    return levels[1:] or levels


def stages(analysis: Analysis) -> list[int]:
    """Of every group its stage, counted from the input: layers whose outputs have as many positions are in one."""
    sizes: list[int] = []  # of the stages, in graph order
    made: dict[str, int] = {}
    for layer in analysis.layers:
        shape = list(analysis.shapes.shape(layer.output) or (1,))
        channels = layer.channel_axis % len(shape)
        positions = math.prod(size for axis, size in enumerate(shape) if axis not in (0, channels))
        if positions not in sizes:
            sizes.append(positions)
        made[layer.node.label] = sizes.index(positions)
    # the channels that a sampler chooses are made by nobody, but read
    around = [info.producers or info.consumers for info in analysis.groups]
    return [max((made.get(name, 0) for name in names), default=0) for names in around]
