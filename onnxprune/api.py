"""The pipeline, readable as a table of contents."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from onnxprune.comparison import compare
from onnxprune.counting import count_model_macs
from onnxprune.data import Preprocessing
from onnxprune.errors import InputError
from onnxprune.finish import Result, aim, finish, within_reach
from onnxprune.gathered import Gathered
from onnxprune.inspection import Inspection, analyze
from onnxprune.journal import Journal
from onnxprune.prepare import prepare
from onnxprune.progress import Progress
from onnxprune.settings import Settings
from onnxprune.targets import Wanted
from onnxprune.tensors import with_scratch

__all__ = [
    "Gathered",
    "Inspection",
    "Result",
    "analyze",
    "collect",
    "compare",
    "count_model_macs",
    "prune",
    "prune_family",
]


def prune(
    model: str | Path | onnx.ModelProto,
    *,
    speedup: float = 2.0,
    by: str = "macs",
    max_macs: float | None = None,
    max_params: float | None = None,
    max_memory: float | None = None,
    round_to: int | str | None = None,
    target: str | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    batch: int | None = None,
    data: object = None,
    samples: int | None = None,
    batch_size: int | None = None,
    memory: int | None = None,
    dask: str | None = None,
    seed: int = 0,
    threads: int = 0,
    provider: str = "cpu",
    select: str = "greedy",
    budget: str = "auto",
    reconstruct: bool = True,
    quick: bool = False,
    thorough: bool = False,
    mirror: bool = True,
    only: str | None = None,
    exclude: str | None = None,
    samplers: bool = True,
    approximate: bool = False,
    best_effort: bool = False,
    preprocessing: Preprocessing | None = None,
    stats: str | Path | None = None,
    progress: Progress | None = None,
) -> Result:
    """Make a smaller dense model that costs 1 / ``speedup`` of the original and computes nearly the same.

    Args:
        model: a file, or the model itself.
        speedup: cost before / after, counted on the model that comes out.
        by: what cost is: macs (multiply-accumulates), params (stored floating-point numbers), memory (the most bytes
            of activations that are alive at once), or latency (time of a run, measured with ``provider`` and
            ``threads`` at the deployed sizes).
        max_macs: at most so many may be left, besides.
        max_params: the same of parameters.
        max_memory: the same of the peak of the activations' bytes.
        round_to: keep multiples of so many channels, or whole groups; "auto" is the target's number.
        target: a deployment that is not at hand, by its name in `onnxprune.targets.TARGETS`.
        shapes: deployed sizes: whole shapes of inputs, by name; those of a sample where none is given.
        batch: deployed size of the open first axis of the inputs.
        data: calibration data (see `onnxprune.data`); nothing means a neighbour of the file, or random data.
        samples: how many of them to use at most; 1,750 if not given, 1,000 if ``quick``, 5,000 if ``thorough`` (as He
            et al. 2017).
        batch_size: samples per run, 256 at most; chosen by memory if not given.
        memory: bytes of resident memory that the process may take (None: what it takes, and half of what is free).
        dask: address of a Dask scheduler whose workers collect the statistics, or local:N.
        seed: of every random draw.
        threads: of the runtime; 0 is its own choice.
        provider: cpu, cuda, tensorrt, openvino, coreml or dml.
        select: how channels are chosen: greedy, lasso, wanda, l1, slimming or random.
        budget: how the cost is shared out among the groups: "auto" by what a narrower group does to the output where
            activations are looked at (by one threshold for slimming), "uniform" the same share of every group,
            "papers" as He et al. 2017 did it for VGG-16 (see `onnxprune.budget.by_stage`).
        reconstruct: fit the remaining weights again by least squares.
        quick: fit every layer once and by itself, to 1,000 samples if not said otherwise: several times faster, and
            less accurate.
        thorough: look at up to 5,000 samples, at more positions of each, at more widths and at widths twice, for far
            longer.
        mirror: of few images (1,000; none if ``quick``), use their mirror images as well, where the model answers both
            alike (see `onnxprune.mirror`).
        only: regular expression; only layers with such a node name are made narrower.
        exclude: regular expression; layers with such a node name are left as they are.
        samplers: let convolutions at the entry of residual blocks choose the channels they read (a Gather in front),
            where channels are chosen by activations and cost is counted in macs or params; else the stream that all
            blocks share is cut, and where the speed-up cannot be reached otherwise.
        approximate: let normalised axes shrink, too (the hidden width of transformers): the mean and variance are then
            taken of the channels that are left, so that the cut alone changes what the model computes.
        best_effort: go as far as possible where the speed-up cannot be reached.
        preprocessing: how uint8 images become the model's input.
        stats: a file that `collect` made of this model: pruned without the data, every layer fitted once to what it
            gave in the original. ``data`` then serve to measure fidelity, and nothing beside the file is looked for.
        progress: receives the stages.

    Raises:
        InputError: the model, the data or an option cannot be used.
        UnreachableTarget: the speed-up cannot be reached and ``best_effort`` is not given.
        InternalError: the proof failed.
    """
    settings = Settings(
        by=by,
        max_macs=max_macs,
        max_params=max_params,
        max_memory=max_memory,
        round_to=round_to,
        target=target,
        shapes=shapes,
        batch=batch,
        data=data,
        samples=samples,
        batch_size=batch_size,
        memory=memory,
        dask=dask,
        seed=seed,
        threads=threads,
        provider=provider,
        select=select,
        budget=budget,
        reconstruct=reconstruct,
        quick=quick,
        thorough=thorough,
        mirror=mirror,
        only=only,
        exclude=exclude,
        samplers=samplers,
        approximate=approximate,
        best_effort=best_effort,
        preprocessing=preprocessing,
        stats=stats,
    )
    return _family(model, [speedup], settings, progress)[0]


def prune_family(
    model: str | Path | onnx.ModelProto,
    speedups: Sequence[float],
    *,
    progress: Progress | None = None,
    journal: Journal | None = None,
    **options: Any,
) -> tuple[Result, ...]:
    """Make several smaller models from one look at the data: collected, ranked and priced once, fitted for each.

    Every member is what `prune` makes with that speed-up, to the last bit where threads and provider compute alike;
    where one of them cannot be reached with ``samplers``, it is what `prune` makes without.

    Args:
        model: a file, or the model itself.
        speedups: cost before / after, one for each member.
        progress: receives the stages.
        journal: keeps what is finished, for a run that goes on from there.
        **options: the others of `prune`; they hold for all members.

    Raises:
        InputError: the model, the data, a speed-up or an option cannot be used.
        UnreachableTarget: one of the speed-ups cannot be reached and ``best_effort`` is not given; known before any
            pass over the data.
        InternalError: a proof failed.
    """
    given = list(speedups)
    if not given or len(set(given)) < len(given):
        raise InputError(f"expected at least one speed-up, and each of them once, found {given}; try [1.5, 2, 3]")
    return _family(model, given, Settings(**options), progress, journal)


@with_scratch
def collect(model: str | Path | onnx.ModelProto, *, progress: Progress | None = None, **options: Any) -> Gathered:
    """Go over the data once and keep what pruning needs of them: sums and damage, no samples.

    Args:
        model: a file, or the model itself.
        progress: receives the stages.
        **options: those of `prune` that say which data, how to run, and which layers may be made narrower.

    Returns:
        what `prune` takes as ``stats`` once it was saved.

    Raises:
        InputError: the model, the data or an option cannot be used.
    """
    prepared = prepare(model, Settings(**options), progress or Progress())
    with prepared.chooser.at_work(sweeping=False):
        prepared.gather(every=True)
    return prepared.gathered()


@with_scratch
def _family(
    model: str | Path | onnx.ModelProto,
    speedups: Sequence[float],
    settings: Settings,
    progress: Progress | None,
    journal: Journal | None = None,
) -> tuple[Result, ...]:
    progress = progress or Progress()
    wanted = [Wanted(speedup, settings.by, settings.most) for speedup in speedups]
    prepared = prepare(model, settings, progress)
    if (
        prepared.analysis.sampled
        and settings.stats is None
        and not all(within_reach(prepared, each) for each in wanted)
    ):
        settings = dataclasses.replace(settings, samplers=False)
        prepared = prepare(model, settings, progress, prepared.calibration).warned(
            "no convolution samples what it reads (--no-samplers): the speed-up cannot be reached while streams keep"
            " their width"
        )
    goals = [aim(prepared, each) for each in wanted]
    if journal is not None:
        prepared.keep(journal, speedups)
    with prepared.chooser.at_work(sweeping=settings.reconstruct and prepared.kept is None):
        prepared.gather()
        shared = dict(progress.timings)
        return tuple(finish(prepared, goal, shared) for goal in goals)
