"""The network as it is cut: normalised, its bodies laid open, its shapes and groups known."""

from __future__ import annotations

from dataclasses import dataclass

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
    loops: bool = True,
) -> Cuttable:
    """Normalise, find shapes and groups; sizes that cannot be repaired freeze their axes.

    Bodies of loops are cut where a first cut of everything can be proven (``loops``); else they stay.
    """
    loops = loops and not approximate
    flat, biases, shapes, nominal = _seen(graph, runtime, calibration, reconstruct, loops)
    whole, graph = graph, Graph(flat.model, graph.folder)
    seeds: tuple[Seed, ...] = ()
    while True:
        analysis = analyse(graph, shapes, nominal, only, exclude, seeds, approximate=approximate)
        sampled = samplable(analysis) if sampling else frozenset()
        if sampled:
            analysis = analyse(graph, shapes, nominal, only, exclude, seeds, sampled, approximate)
        half = {g.name: tuple(range(max(g.units // 2, 1))) for g in analysis.groups}
        try:
            plan = Plan("", half)
            cut = rewrite(analysis, plan)
            if flat.loops and not _proven(analysis, plan, cut, runtime, flat):
                given = (calibration, reconstruct, only, exclude, sampling, approximate)
                return cuttable(whole, runtime, *given, loops=False)
            return Cuttable(analysis, flat, tuple(biases))
        except CannotRepair as error:
            more = tuple(Seed(Kind.STATED, str(error), error.node, error.op, error.tensor, axis) for axis in error.axes)
            if not set(more) - set(seeds):
                raise InternalError(f"freezing did not help: {error}") from error
            seeds += more


def _proven(analysis: Analysis, plan: Plan, cut: onnx.ModelProto, runtime: Runtime, flat: Flat) -> bool:
    """Whether the cut is exact with its loops closed, in which every loop takes more than its first turn."""
    probes = analysis.shapes.probes
    for tensor, axis in {node.often for node in analysis.graph.nodes if node.often}:
        if max(p.shapes[tensor][axis] for p in probes) < 2:
            return False
    try:
        prove(analysis, plan, cut, [p.feeds for p in probes], runtime, flat.closed)
    except Exception:  # sizes that another turn has otherwise; onnxruntime's errors share no base class
        return False
    return True


def _seen(
    graph: Graph, runtime: Runtime, calibration: Calibration | None, reconstruct: bool, loops: bool
) -> tuple[Flat, list[str], Shapes, Shapes]:
    """The normalised model with the biases that were added, and its shapes where it is analysed and where it is used.

    Branches are laid open only where the model then runs at as many sizes as it does by itself, and on all of the data.
    """
    batch, one = None, None
    if calibration is not None:
        batch = calibration.feeds(list(range(min(3, len(calibration)))) if calibration.batchable else [0])
        one = calibration.feeds([0])
    found: list[tuple[Flat, list[str], Shapes, Shapes]] = []
    *first, plain = forms(graph, runtime, loops=loops)
    for flat in (plain, *first):
        biases = add_biases(flat.model) if reconstruct else []
        shown = Graph(flat.model, graph.folder)
        try:
            shapes = probe(shown, runtime, batch)
            nominal = nominal_shapes(shown, runtime, one)
            if calibration is not None and (flat.opened or flat.loops):
                session = runtime.session(flat.model, optimise=False)
                step = _AT_ONCE if calibration.batchable else 1
                for start in range(0, len(calibration), step):
                    session.run(None, calibration.feeds(list(range(start, min(start + step, len(calibration))))))
        except Exception:  # onnxruntime's errors share no base class
            if flat is plain:
                raise
            continue
        if not found or len(shapes.probes) >= len(found[0][2].probes):
            found.append((flat, biases, shapes, nominal))
    return found[-1]
