"""The command line: arguments in, exit status out. Only click is imported here, so that --help answers at once.

Exit statuses: 0 done, 1 a fault of onnxprune, 2 the model, the data or the options cannot be used as given,
3 the speed-up cannot be reached, 130 interrupted or told to end. Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click_default_group import DefaultGroup

from onnxprune.exits import say, status_of, told_to_end
from onnxprune.options import (
    BUDGETS,
    FILE,
    count,
    multiple,
    ratios,
    shape,
    with_approximate,
    with_budget,
    with_choosing,
    with_dask,
    with_data,
    with_layers,
    with_memory,
    with_mirror,
    with_preprocessing,
    with_provider,
    with_sampling,
    with_talk,
    with_threads,
)
from onnxprune.places import check_output, places, writing

if TYPE_CHECKING:
    from onnxprune.images import Preprocessing
    from onnxprune.journal import Journal
    from onnxprune.progress import Progress

_Group: type[click.Group] = DefaultGroup


def _version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            click.echo(f"onnxprune {version('onnxprune')}")
        except PackageNotFoundError:  # run from a checkout that was never installed
            click.echo("onnxprune (not installed)")
        ctx.exit()


# -------------------------------------------------------------------------------------------- commands


@click.group(cls=_Group, default="prune", context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Print the version."
)
def cli() -> None:
    """Prune channels of ONNX models: a smaller dense model that computes nearly the same.

    \b
    onnxprune MODEL.onnx --speedup 2     is short for
    onnxprune prune MODEL.onnx --speedup 2
    Options: onnxprune prune --help
    """


@cli.command()
@click.argument("model", type=FILE)
@click.option(
    "--speedup",
    "speedups",
    type=ratios,
    default="2",
    metavar="X[,X…]",
    help="Cost before / cost after (default 2); of several, a model each is made from one pass over the data.",
)
@click.option(
    "--by",
    type=click.Choice(BUDGETS),
    default="macs",
    help="What cost is: macs, params (stored numbers), memory (peak bytes of activations), or latency (time of a run,"
    " measured here). Default macs.",
)
@click.option("--max-macs", type=count, metavar="N", help="At most N MACs, besides (5M is five million).")
@click.option("--max-params", type=count, metavar="N", help="At most N parameters, besides.")
@click.option("--max-memory", type=count, metavar="BYTES", help="At most so many bytes of activations, besides.")
@click.option(
    "--shape",
    "shapes",
    type=shape,
    multiple=True,
    metavar="NAME:N,C,…",
    help="Deployed shape of an input, for latency (default: that of one sample).",
)
@click.option("--batch", type=click.IntRange(min=1), metavar="N", help="Deployed batch, for latency.")
@click.option("--round-to", type=multiple, metavar="N|auto", help="Keep multiples of N channels, or whole groups.")
@click.option("--target", metavar="NAME", help="Round to what suits a target: cpu-avx512, tensorrt, hexagon, …")
@click.option(
    "-o",
    "--output",
    type=FILE,
    metavar="FILE",
    help="Default: MODEL.pruned.onnx beside the model. For several speed-ups a folder, or a name with {speedup} in it;"
    " default: MODEL.pruned-1.5x.onnx and so on.",
)
@click.option("--force", is_flag=True, help="Replace files that exist.")
@click.option("--report", "report_path", type=FILE, metavar="FILE.json", help="Write the report here; several as -o.")
@with_data()
@with_sampling("1750, with --quick 1000, with --thorough 5000")
@with_mirror
@with_threads
@with_provider
@with_choosing
@with_budget
@click.option(
    "--stats",
    type=FILE,
    metavar="FILE",
    help="Prune without the data, from what onnxprune collect kept; each layer is fitted once, which keeps less."
    " --data then only measures fidelity.",
)
@with_approximate
@with_memory
@with_dask
@click.option("--quick", is_flag=True, help="Fit every layer once: faster, less accurate.")
@click.option("--thorough", is_flag=True, help="Look at more samples, positions and widths, for longer.")
@click.option("--no-reconstruct", is_flag=True, help="Keep the weights as they are; only take channels out.")
@with_layers
@click.option("--resume", is_flag=True, help="Go on from where the same run was stopped.")
@click.option("--best-effort", is_flag=True, help="Write the fastest model where the speed-up cannot be reached.")
@with_preprocessing
@with_talk
def prune(
    model: Path,
    speedups: tuple[float, ...],
    output: Path | None,
    force: bool,
    report_path: Path | None,
    data: str | None,
    stats: Path | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    resume: bool,
    no_reconstruct: bool,
    **options: Any,
) -> None:
    """Prune MODEL and write the smaller model.

    \b
    Example: onnxprune model.onnx --speedup 2 --data images/ --report report.json
    """
    _check_talk(quiet, verbose)
    outputs = places(output, model, speedups, "-o", ".onnx")
    reports = places(report_path, model, speedups, "--report", ".json") if report_path is not None else []
    if model.is_file():  # what is wrong with the model itself is said first, by who reads it
        apart = _apart(model)
        sources = _sources(model, apart, data) | ({"the statistics": stats} if stats else {})
        for place in outputs:
            check_output(place, "output", "-o", sources, force)
        taken = {f"the report {report.name}": report for report in reports}
        for place in _beside(model, outputs, reports) if apart else ():
            if place.parent.is_dir():  # else it is made
                check_output(place, "file of tensors", "-o", {**sources, **taken}, force)
        for place in reports:
            taken = {"the output": next((o for o in outputs if o.absolute() == place.absolute()), outputs[0])}
            check_output(place, "report", "--report", {**sources, **taken}, force)
    preprocessing = _take_preprocessing(options)
    from onnxprune import api
    from onnxprune.files import Together, cache_folder, write_model
    from onnxprune.journal import Journal
    from onnxprune.report import family_to_json, to_json

    journal = Journal(cache_folder() / "runs", resume=resume, say=lambda text: _warn([text], quiet))
    with _progress(quiet) as progress, _kept_if_stopped(journal):
        options |= {"preprocessing": preprocessing, "shapes": dict(options["shapes"]), "journal": journal}
        results = api.prune_family(
            model, speedups, progress=progress, data=data, stats=stats, reconstruct=not no_reconstruct, **options
        )
    with writing() as now, Together() as files:
        for result, path in zip(results, reports, strict=False):
            now(path)
            with files.open(path) as file:
                file.write(f"{result.report.to_json()}\n".encode())
        for result, path in zip(results, outputs, strict=True):
            now(path)
            write_model(result.model, path, force=force, files=files)
    journal.end()
    for warning in dict.fromkeys(w for result in results for w in result.report.warnings):
        _warn([warning], quiet)
    written = [str(path) for path in outputs]
    if as_json and len(results) == 1:
        click.echo(to_json(results[0].report, output=written[0]))
    elif as_json:
        click.echo(family_to_json([result.report for result in results], written))
    elif not quiet:
        from onnxprune.report import text

        out = text.console(sys.stdout)
        if len(results) == 1:
            text.show_report(results[0].report, out, verbose=verbose)
        else:
            text.show_family([result.report for result in results], out, verbose=verbose)
        for name in written:
            click.echo(f"written: {name}")


@cli.command()
@click.argument("model", type=FILE)
@click.option("-o", "--output", type=FILE, metavar="FILE", help="Default: MODEL.stats.npz beside the model.")
@click.option("--force", is_flag=True, help="Replace a file that exists.")
@with_data()
@with_sampling("1750")
@with_mirror
@with_memory
@with_dask
@with_threads
@with_provider
@with_choosing
@with_layers
@with_approximate
@with_preprocessing
@with_talk
def collect(
    model: Path,
    output: Path | None,
    force: bool,
    data: str | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Go over the data once and keep what pruning MODEL needs of them, for --stats.

    \b
    Example: onnxprune collect model.onnx --data images/ -o stats.npz
             onnxprune model.onnx --stats stats.npz --speedup 2
    """
    _check_talk(quiet, verbose)
    output = output or model.with_name(f"{model.name.removesuffix('.onnx')}.stats.npz")
    if model.is_file():
        check_output(output, "output", "-o", _sources(model, _apart(model), data), force)
    preprocessing = _take_preprocessing(options)
    from onnxprune import api
    from onnxprune.report import to_json

    with _progress(quiet) as progress:
        found = api.collect(model, data=data, preprocessing=preprocessing, progress=progress, **options)
    with writing() as now:
        now(output)
        found.save(output, force=force)
    _warn(found.about["warnings"], quiet)
    if as_json:
        about = {"layers": len(found.grams), "groups": len(found.damage), **found.about}
        click.echo(to_json(about, output=str(output)))
    elif not quiet:
        source = found.about["data"]["source"]
        click.echo(f"{len(found.grams)} layers and {len(found.damage)} groups, from {source}")
        click.echo(f"written: {output} ({output.stat().st_size / 1e6:.1f} MB)")


@cli.command()
@click.argument("model", type=FILE)
@with_data("none; they only say how large dynamic inputs are")
@with_threads
@with_layers
@with_approximate
@with_preprocessing
@click.option("--markdown", is_flag=True, help="Print the tables as Markdown on stdout.")
@with_talk
def inspect(
    model: Path, data: str | None, markdown: bool, as_json: bool, quiet: bool, verbose: bool, **options: Any
) -> None:
    """Show the groups of MODEL, their share of the work, what is frozen, why, and what would free it.

    \b
    Example: onnxprune inspect model.onnx
    """
    _check_talk(quiet, verbose)
    if as_json and markdown:
        raise click.UsageError("--json and --markdown exclude each other; give one of the two.")
    preprocessing = _take_preprocessing(options)
    from onnxprune.inspection import analyze
    from onnxprune.report import to_json
    from onnxprune.report.overview import overview

    inspection = analyze(model, data=data, preprocessing=preprocessing, **options)
    found = overview(inspection.analysis, inspection.reachable)
    if as_json:
        click.echo(to_json(found))
    elif markdown:
        from onnxprune.report.markdown import render_overview

        click.echo(render_overview(found), nl=False)
    elif not quiet:
        from onnxprune.report import text

        text.show_overview(found, text.console(sys.stdout), verbose=verbose)


@cli.command()
@click.argument("a", type=FILE)
@click.argument("b", type=FILE)
@with_data("A.calib.npz or test_data_set_* beside A")
@with_sampling("all")
@with_threads
@with_provider
@with_preprocessing
@with_talk
def compare(a: Path, b: Path, data: str | None, as_json: bool, quiet: bool, verbose: bool, **options: Any) -> None:
    """Run A and B on the same data: agreement, output error, latency side by side.

    \b
    Example: onnxprune compare model.onnx model.pruned.onnx --data images/
    """
    _check_talk(quiet, verbose)
    preprocessing = _take_preprocessing(options)
    from onnxprune.comparison import compare as run
    from onnxprune.report import to_json

    with _progress(quiet) as progress:
        found = run(a, b, data=data, preprocessing=preprocessing, progress=progress, **options)
    _warn(found.warnings, quiet)
    if as_json:
        click.echo(to_json(found))
    elif not quiet:
        from onnxprune.report import text

        text.show_comparison(found, text.console(sys.stdout))


# --------------------------------------------------------------------------------------------- helpers


def _apart(model: Path) -> list[Path]:
    """Files that the model keeps tensors in."""
    from onnxprune.tensors import files_of

    return files_of(model)


def _sources(model: Path, apart: Sequence[Path], data: str | None) -> dict[str, Path]:
    """What stays as it is, by what it is called."""
    tensors = {f"the file {path.name} of the model's tensors": path for path in apart}
    return {"the model": model, **tensors, **({"the calibration data": Path(data)} if data else {})}


def _beside(model: Path, outputs: Sequence[Path], reports: Sequence[Path]) -> list[Path]:
    """Where tensors will go that the model keeps in files of their own."""
    from onnxprune.files import beside
    from onnxprune.graph import read_model

    return beside(read_model(model), outputs, reports)


def _take_preprocessing(options: dict[str, Any]) -> Preprocessing:
    """Take the preprocessing options out of the others."""
    from onnxprune.images import Preprocessing

    names = ("scale", "mean", "std", "bgr", "resize", "crop")
    given = {name: value for name in names if (value := options.pop(name)) is not None}
    return Preprocessing(**given)


def _check_talk(quiet: bool, verbose: bool) -> None:
    if quiet and verbose:
        raise click.UsageError("--quiet and --verbose exclude each other; give one of the two.")


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Progress]:
    """Bars on a terminal, nothing in a pipe."""
    if quiet or sys.stderr is None or not sys.stderr.isatty():  # closed where there is nobody to read it
        from onnxprune.progress import Progress

        yield Progress()
        return
    from onnxprune.report import text

    with text.TerminalProgress(text.console(sys.stderr)) as bars:
        yield bars


@contextlib.contextmanager
def _kept_if_stopped(journal: Journal) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if journal.count:
            say(f"{journal.count} finished steps are kept: the same command with --resume goes on from there")
        raise


def _warn(warnings: Sequence[str], quiet: bool) -> None:
    for warning in () if quiet else warnings:
        say(f"warning: {warning}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what the terminal's encoding lacks becomes a question mark
    try:
        with told_to_end():
            status = cli.main(given, prog_name="onnxprune", standalone_mode=False)
    except SystemExit as error:  # click's own way out of a closed pipe
        return error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        return status_of(error, verbose=bool({"-v", "--verbose"} & set(given)))
    return status if isinstance(status, int) else 0


if __name__ == "__main__":
    sys.exit(main())
