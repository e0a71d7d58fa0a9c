"""All of a run that does not depend on the speed-up: load, find the groups, collect, rank, price."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import platform
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from onnxprune.analysis import Analysis
from onnxprune.archive import Damaged
from onnxprune.cost import Latency, params
from onnxprune.costs import Cost
from onnxprune.counting import count
from onnxprune.cuttable import Cuttable, cuttable
from onnxprune.data import Calibration, InputSpec, Preprocessing, load_calibration
from onnxprune.deployed import deployed_feeds
from onnxprune.errors import InputError
from onnxprune.gathered import Gathered
from onnxprune.graph import Graph, model_of
from onnxprune.journal import Journal
from onnxprune.macs import layers_within
from onnxprune.mirror import mirror_axes
from onnxprune.picks import picked
from onnxprune.pipeline import Chooser
from onnxprune.probe import Feeds, probe
from onnxprune.progress import Progress
from onnxprune.report import DataEntry, Measures, plain
from onnxprune.runtime import Runtime
from onnxprune.selection import FROM_ACTIVATIONS
from onnxprune.settings import Settings
from onnxprune.targets import counted_costs, widths
from onnxprune.tensors import digest, size_of

_SAMPLING = {"macs", "params"}  # costs to which a sampler adds nothing
_HELD_OUT_SHARE = 0.1
_FEWEST_TO_SPLIT = 10
_NAMED = 3  # layers at most in a sentence
_MOST_HELD_OUT = 500
_AT_ONCE = 3  # records, where only whether they run is asked


@dataclass(frozen=True, eq=False)
class Prepared:
    """A run up to where the speed-up comes in; nothing that follows changes it.

    Attributes:
        settings: what was asked for.
        original: the model as it came.
        graph: the same, as a graph.
        network: the normalised network and its groups.
        runtime: how to run.
        kept: what an earlier run collected, where that takes the place of data.
        calibration: the data, or what stands in for them.
        data: for the report; where from the statistics are.
        held_out: what fidelity is judged by; None where there are no data to do so.
        before: what the original costs.
        deployed: inputs of the sizes that the model is used with.
        costs: by name, of all that is limited.
        choices: per group the kept counts to choose from.
        chooser: ranks groups, prices widths, fits weights.
        warnings: for the report.
        progress: told of the stages.
    """

    settings: Settings
    original: onnx.ModelProto
    graph: Graph
    network: Cuttable
    runtime: Runtime
    kept: Gathered | None
    calibration: Calibration
    data: DataEntry
    held_out: Calibration | None
    before: Measures
    deployed: Mapping[str, np.ndarray]
    costs: Mapping[str, Cost]
    choices: list[np.ndarray]
    chooser: Chooser
    warnings: tuple[str, ...]
    progress: Progress

    @property
    def analysis(self) -> Analysis:
        """Of the normalised network."""
        return self.network.analysis

    def warned(self, what: str) -> Prepared:
        """The same, with one warning more for the report."""
        return dataclasses.replace(self, warnings=(*self.warnings, what))

    @functools.cached_property
    def digest(self) -> str:
        """Of the model as it came."""
        return digest(self.original)

    def keep(self, journal: Journal, speedups: Sequence[float]) -> None:
        """Note down what is finished from here on, under all that the outcome depends on."""
        settings = dataclasses.replace(self.settings, data=self.data.digest)
        options = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
        journal.begin(self.digest, speedups, options, self.runtime.thread_count, versions())
        self.chooser.journal = journal

    def gather(self, *, every: bool = False) -> None:
        """Collect, rank and price, all that costs passes over the data; or take it from a file.

        Args:
            every: measure damage at every width that is ever looked at, as those need it who have no data.

        Raises:
            InputError: the file does not hold what is asked for.
        """
        settings, chooser = self.settings, self.chooser
        if self.kept is not None and settings.measured:
            where = f"statistics {settings.stats}"
            chooser.statistics = self.kept.statistics(chooser.readers, where)
            if chooser.asks_for_damage:
                prices = self.kept.prices(self.analysis.groups, settings.select, where, self.network.biases)
                chooser.damage = [dict(zip(*each, strict=True)) for each in prices]
        elif settings.measured:
            self._collect()
        chooser.rank()
        if settings.measured:
            chooser.price(every=every)

    def _collect(self) -> None:
        """Collect, unless a run that was stopped did."""
        chooser = self.chooser
        entry = chooser.journal.get("statistics")
        if entry is not None:
            with contextlib.suppress(Damaged, InputError):
                chooser.statistics = Gathered.unpack(*entry).statistics(chooser.readers, "the journal")
                return
        chooser.collect()
        if chooser.journal.is_open:
            chooser.journal.put("statistics", *self.gathered().pack(exact=True))

    def gathered(self) -> Gathered:
        """What was collected, to keep."""
        settings, chooser = self.settings, self.chooser
        preprocessing = settings.preprocessing or Preprocessing()
        about = {
            "data": dataclasses.asdict(self.data),
            "warnings": list(self.calibration.warnings),
            "sizes": {name: array.shape for name, array in self.calibration.feeds([0]).items()},
            "samples": settings.sample_count,
            "seed": settings.seed,
            "preprocessing": dataclasses.asdict(preprocessing),
            "versions": versions(),
        }
        return Gathered.of(
            self.digest,
            settings.select,
            chooser.readers,
            chooser.statistics,
            self.analysis.groups,
            [(sorted(known), [known[c] for c in sorted(known)]) for known in chooser.damage or []],
            about,
            self.network.biases,
        )


def prepare(
    model: str | Path | onnx.ModelProto, settings: Settings, progress: Progress, calibration: Calibration | None = None
) -> Prepared:
    """Read model and data and find the groups.

    Args:
        model: a file, or the model itself.
        settings: of the run.
        progress: of the run.
        calibration: the data, where they were read before: an iterable gives them once.

    Raises:
        InputError: the model, the data or an option cannot be used.
    """
    runtime = Runtime(settings.provider, settings.threads)
    with progress.stage("load"):
        original = model_of(model)
        path = None if isinstance(model, onnx.ModelProto) else Path(model)
        runtime, session = runtime.ready(original)
        graph = Graph(original, path.parent if path else None)
        kept = _kept(original, settings)
        if calibration is None:
            calibration = _load(graph, path, settings, runtime, session, kept)
        fit_data, held_out = _split(calibration)
        data = DataEntry(calibration.source, len(calibration), calibration.digest, calibration.is_random)
        judging: Calibration | None = held_out
        if kept is not None:
            data, own = DataEntry(**kept.about["data"]), data
            if settings.data is None:
                judging = None
            elif own.digest != data.digest or settings.seed != kept.about["seed"]:
                judging = calibration  # others than those that the statistics are of
    mirrors = _mirrors(graph, fit_data, settings, session, progress) if kept is None else {}
    del session
    with progress.stage("groups"):
        costly = {settings.by, *settings.most}
        sampling = settings.samplers and settings.select in FROM_ACTIVATIONS and costly <= _SAMPLING
        network = cuttable(
            graph,
            runtime,
            calibration,
            settings.reconstruct,
            settings.only,
            settings.exclude,
            sampling,
            settings.approximate,
        )
    analysis = network.analysis
    sample = calibration.feeds([0])
    how = (settings.select, settings.budget, settings.seed, settings.batch_size, settings.memory, settings.dask)
    chooser = Chooser(analysis, fit_data, runtime, progress, *how, effort=settings.effort, mirrors=mirrors)
    if chooser.mirrored:
        data = dataclasses.replace(data, mirrored=True)
    return Prepared(
        settings,
        original,
        graph,
        network,
        runtime,
        kept,
        calibration,
        data,
        judging,
        measures(original, sample, runtime),
        deployed_feeds(graph.inputs, sample, settings.shapes, settings.batch),
        counted_costs(analysis, costly, network.flat.copies),
        widths(analysis, settings.multiple),
        chooser,
        tuple(_warnings(chooser, len(network.flat.branches), calibration, settings, kept)),
        progress,
    )


def measures(
    model: onnx.ModelProto,
    batch: Mapping[str, np.ndarray],
    runtime: Runtime,
    latency: Latency | None = None,
    found: Mapping[str, np.ndarray] | None = None,
) -> Measures:
    """What a model costs on a batch; where ``found`` is given, on what another model found in it."""
    macs, memory = count(model, batch, dataclasses.replace(runtime, provider="cpu"), found)
    return Measures(macs, params(model), size_of(model), latency, memory)


def versions() -> dict[str, str]:
    """Of the packages that the outcome depends on."""
    found = {"python": platform.python_version()}
    for package in ("onnxprune", "onnx", "onnxruntime", "onnxruntime-gpu", "numpy", "scipy", "scikit-learn"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


# ------------------------------------------------------------------------------------------------------- the data


def _kept(original: onnx.ModelProto, settings: Settings) -> Gathered | None:
    """What an earlier run collected of this very model."""
    if settings.stats is None:
        return None
    found = Gathered.read(Path(settings.stats))
    if found.model != digest(original):
        raise InputError(
            f"statistics {settings.stats}: collected from another model than this one (SHA-256 {found.model[:12]}…);"
            " onnxprune collect makes those of this model"
        )
    return found


def _load(
    graph: Graph,
    path: Path | None,
    settings: Settings,
    runtime: Runtime,
    session: ort.InferenceSession,
    kept: Gathered | None,
) -> Calibration:
    if kept is not None and settings.data is None:  # random numbers of the sizes that the data had
        return load_calibration(None, graph.inputs, samples=8, seed=settings.seed, dynamic=kept.about["sizes"])
    calibration = load_calibration(
        settings.data,
        graph.inputs,
        model_path=path,
        samples=settings.sample_count,
        seed=settings.seed,
        preprocessing=settings.preprocessing or Preprocessing(),
    )
    if calibration.is_random:  # at sizes that the model is known to run at
        feeds = [p.feeds for p in probe(graph, runtime, seed=settings.seed).probes]
        for sizes in (_of_one_sample(graph, feeds), {name: array.shape for name, array in feeds[0].items()}):
            calibration = load_calibration(
                None, graph.inputs, samples=settings.samples, seed=settings.seed, dynamic=sizes
            )
            if _takes(session, calibration, 1):
                break
    if calibration.batchable and not _takes(session, calibration, _AT_ONCE):
        return dataclasses.replace(calibration, batchable=False)
    return calibration


def _takes(session: ort.InferenceSession, calibration: Calibration, count: int) -> bool:
    """Whether the model runs on some records at once; one that states its batch in a Reshape need not."""
    try:
        session.run(None, calibration.feeds(list(range(min(count, len(calibration))))))
    except Exception:  # onnxruntime's errors share no base class
        return False
    return True


def _mirrors(
    graph: Graph, data: Calibration, settings: Settings, session: ort.InferenceSession, progress: Progress
) -> dict[str, int]:
    """Axes of images along which these data are turned round to have more of them."""
    wanted = settings.mirror and settings.measured and not data.is_random
    few = len(data) <= settings.effort.mirrored
    return mirror_axes(graph.inputs, data, session, progress) if wanted and few else {}


def _split(calibration: Calibration) -> tuple[Calibration, Calibration]:
    """Records to fit on, and held-out ones to judge by; too few to part serve as both."""
    count = min(int(len(calibration) * _HELD_OUT_SHARE), _MOST_HELD_OUT)
    return calibration.split(count) if count else (calibration, calibration)


def _of_one_sample(graph: Graph, feeds: Sequence[Feeds]) -> dict[str, tuple[int, ...]]:
    """Sizes of the inputs for one sample, from sizes at which the model is known to run.

    The batch is the first axis where that is dynamic, and every other dynamic axis that is always as long (the second
    one of a recurrent state). Where samples do not stack (the nodes of a graph, and its adjacency), there is none.
    """
    if not all(spec.stacks for spec in graph.inputs):
        return {spec.name: tuple(feeds[0][spec.name].shape) for spec in graph.inputs}
    batches = {tuple(f[spec.name].shape[0] for f in feeds) for spec in graph.inputs if spec.shape[:1] == (None,)}
    several = len(feeds) > 1  # at one size alone, alike may be by chance

    def size(spec: InputSpec, axis: int) -> int:
        found = tuple(f[spec.name].shape[axis] for f in feeds)
        is_batch = axis == 0 or (several and found in batches)
        return 1 if spec.shape[axis] is None and is_batch else found[0]

    return {spec.name: tuple(size(spec, axis) for axis in range(len(spec.shape))) for spec in graph.inputs}


def _warnings(
    chooser: Chooser, opened: int, calibration: Calibration, settings: Settings, kept: Gathered | None
) -> list[str]:
    analysis = chooser.analysis
    found = list(calibration.warnings if kept is None else kept.about["warnings"])
    if kept is not None:
        if settings.reconstruct:
            found.append(
                "weights were fitted once, to statistics of the original network (--stats): with the data they are"
                " fitted to the network as pruned so far, which keeps more"
            )
        given, none = (plain(each) for each in (settings.preprocessing or Preprocessing(), Preprocessing()))
        if settings.data is None:
            found.append("fidelity was not measured: there were no data (--data gives some)")
            if given != none:
                found.append("the preprocessing options are not applied: there were no data")
        elif kept.about.get("preprocessing", given) != given:
            found.append(
                "the preprocessing options are others than those that the statistics were collected with: of images,"
                " fidelity says nothing unless they are alike (--mean, --std and so on)"
            )
    if opened:
        plural = "s" if opened > 1 else ""
        found.append(
            f"both branches of {opened} If node{plural} are counted, although one run takes one of them; weights there"
            " are fitted to all of the data"
        )
    protos = analysis.graph.model.graph.node
    if hidden := sum(layers_within(protos[n.index]) for n in analysis.graph.nodes if n.turn is None):
        counted = "are counted as often as the first sample runs them" if analysis.nominal.turns else "are not counted"
        found.append(f"{hidden} layers in bodies of If, Loop or Scan stay as they are, and {counted}")
    if kept is None and len(calibration) < _FEWEST_TO_SPLIT:
        what = "sample" if calibration.batchable else "record"
        count = f"{len(calibration)} {what}{'s' if len(calibration) > 1 else ''}"
        found.append(f"only {count}: fidelity is measured on those that the weights were fitted to")
    if settings.reconstruct:
        found += _unfitted(analysis, {reader.layer.node.label for reader in chooser.readers})
    return found


def _unfitted(analysis: Analysis, fitted: Collection[str]) -> list[str]:
    """A word on layers that read channels which may go, and are not among those that are fitted."""
    graph, rows = analysis.graph, picked(analysis)
    reading = {name for info in analysis.groups for name in info.consumers}
    held = {axis.tensor for info in analysis.groups for axis in info.group.axes}
    cut = {name for name in held if graph.is_stored(name) or name in graph.computed_from_constants}
    scaled = {name for n in graph.nodes if n.op == "DequantizeLinear" for name in n.outputs}
    quantised = reading & {n.label for n in graph.nodes if scaled & set(n.inputs[1:2])}
    chosen = reading & {layer.node.label for layer in analysis.layers if layer.data in rows}
    others = reading & {n.label for n in graph.nodes if not cut.isdisjoint((*n.inputs, *n.captured))}
    others -= quantised | chosen | set(fitted)
    said = {
        "with quantised weights": quantised,
        "on what the network itself picks (boxes, tokens of an expert)": chosen,
        "of other kinds than can be fitted, in loops, of shared weights, or too wide": others,
    }
    return [
        f"{len(labels)} layer{'s' if len(labels) > 1 else ''} {which}: cut exactly, and not fitted"
        f" ({', '.join(sorted(labels)[:_NAMED])}{', …' if len(labels) > _NAMED else ''})"
        for which, labels in said.items()
        if labels
    ]
