"""The network as it is cut: normalised, its bodies laid open, its shapes and groups known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx

from onnxprune.analysis import Analysis, analyse
from onnxprune.biases import add_biases
from onnxprune.counting import nominal_shapes
from onnxprune.data import Calibration
from onnxprune.errors import InternalError
from onnxprune.flat import Flat, forms
from onnxprune.graph import Graph
from onnxprune.plan import Plan
from onnxprune.positions import Kind, Seed
from onnxprune.probe import Shapes, probe
from onnxprune.rewrite import CannotRepair, rewrite
from onnxprune.runtime import Runtime
from onnxprune.samplers import samplable
from onnxprune.verify import prove

_AT_ONCE = 8  # samples, where only whether they run is asked


@dataclass(frozen=True, eq=False)
class Cuttable:
    """A network whose groups are known, every one of which can be cut.

    Attributes:
        analysis: of the normalised network.
        flat: the normalised network with its bodies laid open, as it is analysed, and how they are put back.
        biases: names of those that were added for a fit to fill.
    """

    analysis: Analysis
    flat: Flat
    biases: tuple[str, ...]


def cuttable(
    graph: Graph,
    runtime: Runtime,
    calibration: Calibration | None,
    reconstruct: bool,
    only: str | None,
    exclude: str | None,
    sampling: bool = False,
    approximate: bool = False,
) -> Cuttable:
    """Normalise, find shapes and groups; sizes that cannot be repaired freeze their axes.

    Bodies of branches and loops are cut where a first cut of everything can be proven; else they stay.
    """
    seen = _seen(graph, runtime, calibration, reconstruct, loops=not approximate)
    while True:
        form = seen.pop()
        found, plan, cut = _analysed(form, graph.folder, only, exclude, sampling, approximate)
        if not seen or _proven(found.analysis, plan, cut, runtime, form.flat):
            return found


@dataclass(frozen=True, eq=False)
class _Form:
    """A form of the network that runs: the biases that were added, and its shapes where it is analysed and used."""

    flat: Flat
    biases: tuple[str, ...]
    shapes: Shapes
    nominal: Shapes


def _analysed(
    form: _Form, folder: Path, only: str | None, exclude: str | None, sampling: bool, approximate: bool
) -> tuple[Cuttable, Plan, onnx.ModelProto]:
    """The groups of a form, and a first cut of them all."""
    graph = Graph(form.flat.model, folder)
    shapes, nominal = form.shapes, form.nominal
    seeds: tuple[Seed, ...] = ()
    while True:
        analysis = analyse(graph, shapes, nominal, only, exclude, seeds, frozenset(), approximate, form.flat.copies)
        sampled = samplable(analysis) if sampling else frozenset()
        if sampled:
            analysis = analyse(graph, shapes, nominal, only, exclude, seeds, sampled, approximate, form.flat.copies)
        plan = Plan("", {g.name: tuple(range(max(g.units // 2, 1))) for g in analysis.groups})
        try:
            return Cuttable(analysis, form.flat, form.biases), plan, rewrite(analysis, plan)
        except CannotRepair as error:
            more = tuple(Seed(Kind.STATED, str(error), error.node, error.op, error.tensor, axis) for axis in error.axes)
            if not set(more) - set(seeds):
                raise InternalError(f"freezing did not help: {error}") from error
            seeds += more


def _proven(analysis: Analysis, plan: Plan, cut: onnx.ModelProto, runtime: Runtime, flat: Flat) -> bool:
    """Whether the cut is exact with its loops closed, in which every loop takes more than its first turn."""
    probes = analysis.shapes.probes
    for tensor, axis in {place for node in analysis.graph.nodes for place in node.often}:
        if max(p.shapes[tensor][axis] for p in probes) < 2:
            return False
    try:
        prove(analysis, plan, cut, [p.feeds for p in probes], runtime, flat.turning)
    except Exception:  # sizes that another turn has otherwise; onnxruntime's errors share no base class
        return False
    return True


def _seen(
    graph: Graph, runtime: Runtime, calibration: Calibration | None, reconstruct: bool, loops: bool
) -> list[_Form]:
    """The forms of a model that can be used, the most open one last.

    Bodies are laid open only where the model then runs at as many sizes as it does by itself, and on all of the data.
    """
    batch, one = None, None
    if calibration is not None:
        batch = calibration.feeds(list(range(min(3, len(calibration)))) if calibration.batchable else [0])
        one = calibration.feeds([0])
    found: list[_Form] = []
    for flat in reversed(forms(graph, runtime)):
        if flat.loops and not loops:
            continue
        biases = add_biases(flat.model) if reconstruct else []
        shown = Graph(flat.model, graph.folder)
        try:
            shapes = probe(shown, runtime, batch)
            nominal = nominal_shapes(shown, runtime, one)
            if calibration is not None and flat.is_open:
                session = runtime.session(flat.model, optimise=False)
                step = _AT_ONCE if calibration.batchable else 1
                for start in range(0, len(calibration), step):
                    session.run(None, calibration.feeds(list(range(start, min(start + step, len(calibration))))))
        except Exception:  # onnxruntime's errors share no base class
            if not flat.is_open:
                raise
            continue
        if not found or len(shapes.probes) >= len(found[0].shapes.probes):
            found.append(_Form(flat, tuple(biases), shapes, nominal))
    return found
