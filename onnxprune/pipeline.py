"""The stages between a model with its data and the new weights: rank, price, allocate, sweep."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from onnxprune import blas, budget
from onnxprune.analysis import Analysis, GroupInfo
from onnxprune.answers import Answers
from onnxprune.batches import LARGEST, PERIOD, Batches, batch_size, enough, rows_bytes, sample_bytes
from onnxprune.blocks import find_blocks
from onnxprune.calibrate import Arrays, Folds, Sweep
from onnxprune.cluster import collect_on
from onnxprune.collecting import collect, in_pieces
from onnxprune.compact import compact
from onnxprune.costs import Several
from onnxprune.data import Calibration
from onnxprune.descent import fit_block
from onnxprune.effort import BALANCED, Effort
from onnxprune.errors import InternalError
from onnxprune.joint import Network, Part, current, stored_tensors
from onnxprune.journal import Journal
from onnxprune.layers import Layer
from onnxprune.memory import Room, frugal, text
from onnxprune.narrowing import (
    RIDGE,
    Narrowing,
    columns_gone,
    columns_left,
    curve,
    near,
    removed_weights,
    silent_weights,
)
from onnxprune.parallel import MOST, Map
from onnxprune.precision import cast
from onnxprune.progress import Progress
from onnxprune.readers import Reader, find_readers, matrices_of
from onnxprune.reconstruct import DOUBTFUL, Fit, fit, refine
from onnxprune.runtime import Runtime
from onnxprune.scores import Scored, sharpen
from onnxprune.select import Problem, Ranking
from onnxprune.selection import FROM_ACTIVATIONS, problems_of, rank, scales, unfitted_weights, with_errors
from onnxprune.sensitivity import Variants, measure
from onnxprune.shelf import Shelf
from onnxprune.statistics import Statistics
from onnxprune.steps import Steps, digest_of
from onnxprune.surroundings import Samples
from onnxprune.taking import Taking
from onnxprune.targets import Limit

_FEW = 1000  # samples
_FEW_BLOCKS = 2  # times as many positions are looked at where samples are few: neighbours say something then


@dataclass(eq=False)
class Chooser:
    """Which units every group keeps, and the weights that go with them.

    ``arrays`` are new values of stored tensors in their original shapes, filled by `sweep`.
    """

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
    kept: dict[int, np.ndarray] = field(default_factory=dict)
    errors: dict[int, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # for the report
    damage: list[tuple[list[int], list[float]]] | None = None  # per group, kept counts and what they do to the output
    priced: list[np.ndarray] | None = None  # per group, damage for every kept count
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
        answers = None if self.dask is not None or self._fitted_to is not self.data else self.answers
        if answers is None:
            data, batches = self.first, self._batches(self.first, chosen)
            here = functools.partial(collect, room=self.room)
            run = here if self.dask is None else functools.partial(collect_on, self.dask)
        else:  # what sweeps need comes with it
            data, batches = self.data, answers.batches
            run = functools.partial(collect, summed=len(self.first), answers=answers, room=self.room)
        with self.progress.stage("calibrate", len(data)):
            found = run(self.analysis, chosen, batches, self.runtime, self.progress) if chosen else []
        self.statistics = {r.index: s for r, s in zip(chosen, found, strict=True)}

    def rank(self) -> None:
        """Rank the units of every group on the original network."""
        with self.progress.stage("rank", len(self.analysis.groups)):
            for info in self.analysis.groups:
                problems = self._problems(info)
                ranking = rank(self.method, info, problems, self.analysis, self.seed)
                self.rankings.append(with_errors(ranking, problems))
                self.progress.advance()

    def _problems(self, info: GroupInfo, statistics: Mapping[int, Sequence[Statistics]] | None = None) -> list[Problem]:
        gone = {r.index: columns_gone(r, self.kept) for r in self.readers}
        found = statistics if statistics is not None else self.statistics
        return problems_of(info.group.index, self.readers, found, gone)

    # ------------------------------------------------------------------------------------------------- budget

    @property
    def asks_for_damage(self) -> bool:
        """Whether the budget goes by what a narrower group does to the output."""
        return self.method != "slimming" and self.budget == "auto"

    def price(self) -> None:
        """Find what every width of every group costs in damage to the output, where the budget asks for that."""
        if not self.asks_for_damage:
            return
        if self.damage is None:
            self.damage = self.measured_damage()
        self.priced = [
            budget.interpolate(info.units, *found, ranking.errors)
            for info, found, ranking in zip(self.analysis.groups, self.damage, self.rankings, strict=True)
        ]

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
        if self.priced is None:
            return budget.uniform(units, together, 1.0, choices)
        return budget.allocate_within(self.priced, costs, most, choices)

    def measured_damage(self) -> list[tuple[list[int], list[float]]]:
        """Per group a few kept counts, and the damage to the output at each."""
        levels = [self._levels(info.units) for info in self.analysis.groups]
        narrowing = Narrowing(self.analysis, self.readers, self.statistics, self.rankings)
        damage = self._measured(narrowing, [narrowing.variants(g, counts) for g, counts in enumerate(levels)])
        return list(zip(levels, damage, strict=True))

    def _levels(self, units: int) -> list[int]:
        return sorted({min(max(round(units * share), 1), units - 1) for share in self.effort.levels})

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

    def choose(self, counts: np.ndarray) -> None:
        """Keep these many units, by the ranks on the original network."""
        for info, count in zip(self.analysis.groups, counts, strict=True):
            self.kept[info.group.index] = self.rankings[info.group.index].kept(int(count))

    def fit(self, counts: np.ndarray, limits: Sequence[Limit], choices: Sequence[np.ndarray]) -> Arrays:
        """`sweep`, and once more where the network that comes out says that other widths cost less damage.

        What the groups' losses do together is not what each does alone. Of both networks that with less damage is kept.

        Args:
            counts: kept units per group, as `allocate` found them.
            limits: within which that was.
            choices: per group the kept counts to choose from.
        """
        arrays = self.sweep(counts)
        if not self.effort.again or self.priced is None:
            return arrays
        others = self._allocated_again(counts, arrays, limits, choices)
        if np.array_equal(others, counts):
            return arrays
        first = dict(self.kept), dict(self.errors), list(self.notes)
        again = self.sweep(others)
        if self._is_better(again, arrays):
            return again
        self.kept, self.errors, self.notes = first
        return arrays

    def _allocated_again(
        self, counts: np.ndarray, arrays: Arrays, limits: Sequence[Limit], choices: Sequence[np.ndarray]
    ) -> np.ndarray:
        """Kept counts near these, by what they change in the network as it was fitted to these."""
        around = [near(each, int(count)) for each, count in zip(choices, counts, strict=True)]
        ends = [[int(each[k]) for k in (0, -1) if each[k] != count] for each, count in zip(around, counts, strict=True)]
        step = f"again-{digest_of(counts)}"
        entry = self.journal.get(step)
        if entry is not None:
            moved = entry[0]["moved"]
        else:
            narrowing = Narrowing(self.analysis, self.readers, self.statistics, self.rankings, dict(self.kept), arrays)
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

    def sweep(self, counts: np.ndarray) -> Arrays:
        """Choose and fit from reader to reader; returns new stored tensors in their original shapes.

        May be asked again with other counts: nothing is left of what was chosen before.
        """
        answers = self.answers
        if answers is None:
            raise InternalError("a sweep outside of `at_work`")
        silent, arrays = self._start(counts)
        pending = self._chosen_on_the_way(counts)
        for group in pending:
            del self.kept[group]
        fitted = self._to_be_fitted(counts, arrays)
        closely = [r for r in fitted if self.effort.together and (not r.columns or self._is_cut(r, counts))]
        runner = Sweep(self.analysis, fitted, answers, self.runtime, arrays, self.room, closely)
        steps = Steps(self, counts, pending)

        def fit_reader(
            reader: Reader, folds: Folds, samples: Sequence[Samples], scored: Sequence[Scored], spread: Map
        ) -> Arrays:
            together = [a + b for a, b in folds]
            for group in [g for g in reader.columns if g in pending]:
                info = self.analysis.groups[group]
                ranking = rank(
                    self.method, info, self._problems(info, {reader.index: together}), self.analysis, self.seed
                )
                self.kept[group] = ranking.kept(int(counts[group]))
            left = columns_left(reader, self.kept)
            fits = [fit(part, left, weights) for part, weights in zip(folds, reader.weights, strict=True)]
            few = sum(fold.rows for fold in folds[0]) < DOUBTFUL * len(left)
            halves: Sequence[Fit] = ()
            if scored or (samples and few):
                halves = [fit([fold], left, reader.weights[0], [fits[0].ridge]) for fold in folds[0]]
            if samples:
                for side in samples:
                    side.narrow(left)
                energy = sum(side.energy for side in samples)
                whole = all(side.is_whole for side in samples)
                gram = np.sum([fold.of(left).gram for fold in folds[0]], axis=0) if whole else None
                fits = [refine(fits[0], samples, energy, left, reader.weights[0], spread, gram, halves)]
            if scored:
                fits = [sharpen(fits[0], halves, scored, left, spread)]
            return self._fitted(reader, fits, silent)

        if not answers.are_known:  # after a run that was stopped, on a cluster, or with more samples than are fitted to
            with self.progress.stage("calibrate", len(answers.batches.data)):
                collect(
                    self.analysis, (), answers.batches, self.runtime, self.progress, answers=answers, room=self.room
                )
        with self.progress.stage("reconstruct", len(fitted)):
            found = runner.run(steps.reader(fit_reader), steps.block(self._fit_block), self.progress, steps.recall)
        if (count := len(self._fitted_to)) < len(self.data):
            self._say(f"the weights were fitted to {count} of the {len(self.data)} samples: more would change little")
        self._say_what_was_adapted(answers.batches, runner)
        return found

    @functools.cached_property
    def _fitted_to(self) -> Calibration:
        """The first samples of the data, as many as the fits have a use for."""
        count = enough(self.analysis, self.readers, self.effort.thinned)
        return self.data if count >= len(self.data) else self.data.split(len(self.data) - count)[0]

    def _say_what_was_adapted(self, batches: Batches, runner: Sweep) -> None:
        """What is done otherwise, for want of memory, than it would be done."""
        done = []
        if self.room.is_short("batch"):
            done.append(f"batches of {max(map(len, batches.parts))}")
        if runner.used_files and self.room.is_short("frontier"):
            done.append("activations in files")
        if self.room.is_short("block"):
            done.append(f"{text(self.room.block)} of activations for the fit of two layers")
        if done:
            self._say(f"to stay within {text(self.room.limit)} of memory: {', '.join(done)}")

    def _say(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def fit_once(self, counts: np.ndarray) -> Arrays:
        """Choose, and fit every reader to what it gave in the original, from the statistics alone; as `sweep` does."""
        silent, arrays = self._start(counts)
        cut = [r for r in self.readers if r.index in self.statistics and self._is_cut(r, counts)]
        with self.progress.stage("reconstruct", len(cut)):
            for reader in cut:
                left = columns_left(reader, self.kept)
                parts = zip(self.statistics[reader.index], reader.weights, strict=True)
                fits = [fit([part], left, weights, [RIDGE]) for part, weights in parts]
                arrays |= self._fitted(reader, fits, silent)
                self.progress.advance()
        return arrays

    def _start(self, counts: np.ndarray) -> tuple[dict[str, np.ndarray], Arrays]:
        """Choose by the ranks on the original; what has to be zero for that, and those tensors."""
        self.errors.clear()
        self.notes.clear()
        self.choose(counts)
        silent = silent_weights(self.analysis.groups, self.analysis, self.readers, self.kept)
        return silent, {name: self.analysis.graph.silenced(name, gone) for name, gone in silent.items()}

    def _to_be_fitted(self, counts: np.ndarray, arrays: Arrays) -> list[Reader]:
        """The readers that lose columns, and all that read what follows from them: it is not what it was any more."""
        readers = {r.layer.node.index: r for r in self.readers}
        changed, found = set(arrays), []
        for node in self.analysis.graph.nodes:
            reader = readers.get(node.index)
            drifts = not changed.isdisjoint((*node.inputs, *node.captured))
            if reader is not None and (drifts or self._is_cut(reader, counts)):
                found.append(reader)
                changed.update(node.outputs)
            elif drifts:
                changed.update(node.outputs)
        return found

    def _is_cut(self, reader: Reader, counts: np.ndarray) -> bool:
        return any(counts[g] < self.analysis.groups[g].units for g in reader.columns)

    def _fitted(self, reader: Reader, fits: Sequence[Fit], silent: Mapping[str, np.ndarray]) -> Arrays:
        """A reader's fits as stored tensors."""
        self._note(reader, fits)
        found = stored_tensors(self.analysis.graph, reader.layer, np.stack([f.weights for f in fits]))
        found = {name: self.analysis.graph.silenced(name, silent.get(name), w) for name, w in found.items()}
        if self._fits(found):
            return found
        # the old ones stay, with zeros where units went
        kind = self.analysis.graph.array(reader.layer.weight).dtype
        self.notes.append(f"the weights fitted for {reader.layer.node.label!r} do not fit into {kind}: not fitted")
        gone = np.ones((1, reader.width, 1))
        gone[:, columns_gone(reader, self.kept)] = 0.0
        return stored_tensors(self.analysis.graph, reader.layer, reader.weights * gone)

    def _fits(self, arrays: Arrays) -> bool:
        """Whether the model's types can hold the values."""
        return all(np.isfinite(cast(a, self.analysis.graph.array(n).dtype)).all() for n, a in arrays.items())

    def _fit_block(self, net: Network, taken: Taking, arrays: Arrays) -> Arrays:
        """Fit a block's layers together; nothing where that does not help on samples held out."""
        seen, unseen = taken.data()
        if not len(seen):
            return {}
        readers = [(i.layer, i.unfolding) for i in net.block.inner] + [(r.layer, r.unfolding) for r in net.block.outer]
        parts = [
            Part(layer, unfolding, current(self.analysis.graph, layer, arrays), self._free(layer))
            for layer, unfolding in readers
        ]
        small = compact(net, parts, seen)
        if small is None:
            found = fit_block(net, parts, seen, unseen)
        else:
            seen, unseen = small.data(seen), small.data(unseen)
            found = fit_block(small.net, small.parts, seen, unseen)
            found = None if found is None else small.whole(parts, found)
        if found is None:
            return {}
        tensors: Arrays = {}
        for layer, matrices in zip(net.layers, found, strict=True):
            tensors |= stored_tensors(self.analysis.graph, layer, matrices)
        return tensors if self._fits(tensors) else {}

    def _free(self, layer: Layer) -> np.ndarray:
        """Which entries of a layer's matrices belong to units that stay so far."""
        graph = self.analysis.graph
        free = {name: np.ones(graph.array(name).shape, bool) for name in (layer.weight, layer.bias) if name}
        for info in self.analysis.groups:
            if info.group.index in self.kept:
                for name, gone in removed_weights(info, self.analysis, self.kept[info.group.index]).items():
                    if name in free:
                        free[name] &= ~gone
        bias = free[layer.bias] if layer.bias else np.zeros(1, bool)
        found: np.ndarray = matrices_of(layer, free[layer.weight], bias) != 0.0  # a factor may be below zero
        return found

    def _chosen_on_the_way(self, counts: np.ndarray) -> set[int]:
        """Groups with one reader, whose units are best chosen when the sweep comes to it."""
        if self.method not in FROM_ACTIVATIONS:
            return set()
        return {
            info.group.index
            for info, count in zip(self.analysis.groups, counts, strict=True)
            if count < info.units
            and sum(info.group.index in r.columns for r in self.readers) == 1
            and not unfitted_weights(info, self.analysis, self.readers)
        }

    def _note(self, reader: Reader, fits: Sequence[Fit]) -> None:
        error = float(np.mean([f.error for f in fits]))
        for group in (g for g in reader.columns if len(self.kept[g]) < self.analysis.groups[g].units):
            self.errors[group] = max(self.errors.get(group, 0.0), error)


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
