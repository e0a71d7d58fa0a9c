"""The command line: arguments in, exit status out. Only click is imported here, so that --help answers at once.

Exit statuses: 0 done, 1 a fault of onnxprune, 2 the model, the data or the options cannot be used as given,
3 the speed-up cannot be reached, 130 interrupted. Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click_default_group import DefaultGroup

from onnxprune.errors import InputError, InternalError, OnnxPruneError

if TYPE_CHECKING:
    from onnxprune.images import Preprocessing
    from onnxprune.progress import Progress

PROVIDERS = ("cpu", "cuda", "tensorrt", "openvino", "coreml", "dml")
BUDGETS = ("macs", "params", "memory", "latency")
SELECTIONS = ("greedy", "lasso", "l1", "slimming", "random")
INTERRUPTED = 130
_PLACEHOLDER = "{speedup}"  # in names of files

_Group: type[click.Group] = DefaultGroup
_Function = TypeVar("_Function", bound=Callable[..., Any])


# --------------------------------------------------------------------------------------------- options


def _numbers(value: object) -> tuple[float, ...]:
    try:
        return tuple(_fraction(part) for part in str(value).split(","))
    except (ValueError, ZeroDivisionError):
        raise click.BadParameter(f"expected numbers such as 0.485,0.456,0.406, found {value!r}.") from None


def _number(value: object) -> float:
    try:
        return _fraction(str(value))
    except (ValueError, ZeroDivisionError):
        raise click.BadParameter(f"expected a number such as 1/255, found {value!r}.") from None


def _ratios(value: object) -> tuple[float, ...]:
    numbers = []
    for part in str(value).split(","):
        with contextlib.suppress(ValueError):
            if 1 < float(part) < math.inf:
                numbers.append(float(part))
                continue
        raise click.BadParameter(f"expected a finite number above 1, found '{part}'; try 2, or 1.5,2,3.")
    names = [f"{number:g}" for number in numbers]  # as in the names of files
    if twice := {name for name in names if names.count(name) > 1}:
        raise click.BadParameter(f"expected every speed-up once, found {min(twice)} again; give it once.")
    return tuple(numbers)


def _count(value: object) -> float:
    text = str(value).strip()
    factor = {"k": 1e3, "M": 1e6, "G": 1e9}.get(text[-1:].replace("K", "k"), 1.0)
    with contextlib.suppress(ValueError):
        number = float(text if factor == 1.0 else text[:-1]) * factor
        if 0 < number < math.inf:
            return number
    raise click.BadParameter(f"expected a number above 0 such as 5M, found '{value}'.")


def _shape(value: object) -> tuple[str, tuple[int, ...]]:
    name, _, sizes = str(value).rpartition(":")
    with contextlib.suppress(ValueError):
        shape = tuple(int(part) for part in sizes.replace("x", ",").split(","))
        if name and min(shape) > 0:
            return name, shape
    raise click.BadParameter(f"expected a name and sizes such as input:1,3,224,224, found '{value}'.")


def _multiple(value: object) -> int | str:
    with contextlib.suppress(ValueError):
        if int(str(value)) > 0:
            return int(str(value))
    if value == "auto":
        return "auto"
    raise click.BadParameter(f"expected a number of at least 1 or auto, found '{value}'.")


def _fraction(text: str) -> float:
    top, _, bottom = text.partition("/")
    number = float(top) / float(bottom) if bottom else float(top)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _options(*decorators: Callable[[_Function], _Function]) -> Callable[[_Function], _Function]:
    return lambda function: functools.reduce(lambda made, decorator: decorator(made), reversed(decorators), function)


_FILE = click.Path(path_type=Path)
_preprocessing = _options(
    click.option("--scale", type=_number, metavar="X", help="Factor for the pixels of images (default 1/255)."),
    click.option("--mean", type=_numbers, metavar="X[,X…]", help="Subtracted after scaling, per channel."),
    click.option("--std", type=_numbers, metavar="X[,X…]", help="Divided by after that, per channel."),
    click.option("--bgr", is_flag=True, help="The model takes blue, green, red."),
    click.option("--resize", type=click.IntRange(min=1), metavar="N", help="Short side of images in a folder."),
    click.option("--crop", type=click.IntRange(min=1), metavar="N", help="Centre square of images in a folder."),
)
_data = click.option(
    "--data",
    metavar="DATA",
    help="Calibration data: an .npy or .npz file, a folder of images or of ONNX test data, or package.module:function."
    " Default: MODEL.calib.npz or test_data_set_* beside the model.",
)
_sampling = _options(
    click.option("--samples", type=click.IntRange(min=1), metavar="N", help="Use at most N samples of the data."),
    click.option("--batch-size", type=click.IntRange(min=1), metavar="N", help="Samples fed to the model at once."),
    click.option(
        "--seed", type=click.IntRange(min=0), default=0, metavar="N", help="Of every random choice (default 0)."
    ),
)
_threads = click.option(
    "--threads", type=click.IntRange(min=0), default=0, metavar="N", help="Threads of onnxruntime (0: one per core)."
)
_provider = click.option(
    "--provider", type=click.Choice(PROVIDERS), default="cpu", help="Where models are run (default cpu)."
)
_layers = _options(
    click.option("--only", metavar="REGEX", help="Make only layers narrower whose node name this finds."),
    click.option("--exclude", metavar="REGEX", help="Leave layers alone whose node name this finds."),
)
_approximate = click.option(
    "--approximate",
    is_flag=True,
    help="Let normalised axes shrink, too, such as the hidden width of transformers: their mean and variance are then"
    " those of the channels that are left, so that the cut is not exact.",
)
_talk = _options(
    click.option("--json", "as_json", is_flag=True, help="Print the result as a JSON object on stdout."),
    click.option("-q", "--quiet", is_flag=True, help="Say nothing but errors (and the object of --json)."),
    click.option("-v", "--verbose", is_flag=True, help="Say more; show where an unexpected failure happened."),
)


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
@click.argument("model", type=_FILE)
@click.option(
    "--speedup",
    "speedups",
    type=_ratios,
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
@click.option("--max-macs", type=_count, metavar="N", help="At most N MACs, besides (5M is five million).")
@click.option("--max-params", type=_count, metavar="N", help="At most N parameters, besides.")
@click.option("--max-memory", type=_count, metavar="BYTES", help="At most so many bytes of activations, besides.")
@click.option(
    "--shape",
    "shapes",
    type=_shape,
    multiple=True,
    metavar="NAME:N,C,…",
    help="Deployed shape of an input, for latency (default: that of one sample).",
)
@click.option("--batch", type=click.IntRange(min=1), metavar="N", help="Deployed batch, for latency.")
@click.option("--round-to", type=_multiple, metavar="N|auto", help="Keep multiples of N channels, or whole groups.")
@click.option("--target", metavar="NAME", help="Round to what suits a target: cpu-avx512, tensorrt, hexagon, …")
@click.option(
    "-o",
    "--output",
    type=_FILE,
    metavar="FILE",
    help="Default: MODEL.pruned.onnx beside the model. For several speed-ups a folder, or a name with {speedup} in it;"
    " default: MODEL.pruned-1.5x.onnx and so on.",
)
@click.option("--force", is_flag=True, help="Replace files that exist.")
@click.option("--report", "report_path", type=_FILE, metavar="FILE.json", help="Write the report here; several as -o.")
@_data
@_sampling
@_threads
@_provider
@click.option(
    "--select", type=click.Choice(SELECTIONS), default="greedy", help="How channels are chosen (default greedy)."
)
@click.option(
    "--samplers/--no-samplers",
    default=True,
    show_default=True,
    help="Let blocks choose among the channels of a residual stream, with a Gather in front.",
)
@_approximate
@click.option("--no-reconstruct", is_flag=True, help="Keep the weights as they are; only take channels out.")
@_layers
@click.option("--best-effort", is_flag=True, help="Write the fastest model where the speed-up cannot be reached.")
@_preprocessing
@_talk
def prune(
    model: Path,
    speedups: tuple[float, ...],
    output: Path | None,
    force: bool,
    report_path: Path | None,
    data: str | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    no_reconstruct: bool,
    **options: Any,
) -> None:
    """Prune MODEL and write the smaller model.

    \b
    Example: onnxprune model.onnx --speedup 2 --data images/ --report report.json
    """
    _check_talk(quiet, verbose)
    outputs = _places(output, model, speedups, "-o", ".onnx")
    reports = _places(report_path, model, speedups, "--report", ".json") if report_path is not None else []
    if model.is_file():  # what is wrong with the model itself is said first, by who reads it
        sources = {"the model": model, **({"the calibration data": Path(data)} if data else {})}
        for place in outputs:
            check_output(place, "output", "-o", sources, force)
        for place in reports:
            taken = {"the output": next((o for o in outputs if o.absolute() == place.absolute()), outputs[0])}
            check_output(place, "report", "--report", {**sources, **taken}, force)
    preprocessing = _take_preprocessing(options)
    from onnxprune import api
    from onnxprune.files import Together, write_model
    from onnxprune.report import family_to_json, to_json

    with _progress(quiet) as progress:
        options |= {"preprocessing": preprocessing, "shapes": dict(options["shapes"])}
        results = api.prune_family(
            model, speedups, progress=progress, data=data, reconstruct=not no_reconstruct, **options
        )
    with _writing() as writing, Together() as files:
        for result, path in zip(results, reports, strict=False):
            writing(path)
            with files.open(path) as file:
                file.write(f"{result.report.to_json()}\n".encode())
        for result, path in zip(results, outputs, strict=True):
            writing(path)
            write_model(result.model, path, force=force, files=files)
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
@click.argument("model", type=_FILE)
@_data
@_threads
@_layers
@_approximate
@_preprocessing
@click.option("--markdown", is_flag=True, help="Print the tables as Markdown on stdout.")
@_talk
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
    from onnxprune import api
    from onnxprune.report import to_json
    from onnxprune.report.overview import overview

    inspection = api.analyze(model, data=data, preprocessing=preprocessing, **options)
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
@click.argument("a", type=_FILE)
@click.argument("b", type=_FILE)
@_data
@_sampling
@_threads
@_provider
@_preprocessing
@_talk
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


def _places(given: Path | None, model: Path, speedups: Sequence[float], option: str, suffix: str) -> list[Path]:
    """Where the files of every speed-up go.

    Raises:
        InputError: one name is given for several.
    """
    stem = f"{model.name.removesuffix('.onnx')}.pruned"
    if len(speedups) > 1:
        stem += f"-{_PLACEHOLDER}x"
    template = given or model.with_name(f"{stem}{suffix}")
    if len(speedups) > 1 and _PLACEHOLDER not in str(template):
        if not template.is_dir():
            example = template.with_name(f"{template.stem}-{_PLACEHOLDER}x{template.suffix}")
            raise InputError(
                f"{option} {template} names one file for {len(speedups)} speed-ups; try {example}, or a folder that"
                " exists"
            )
        template = template / f"{stem}{suffix}"
    return [Path(str(template).replace(_PLACEHOLDER, f"{speedup:g}")) for speedup in speedups]


def check_output(path: Path, what: str, option: str, sources: dict[str, Path], force: bool) -> None:
    """Refuse, before any work is done, a place that nothing can or may be written to.

    Raises:
        InputError: there is no such folder, it cannot be written to, or something is in the way.
    """
    name = f"{what} {path}"
    folder = path.parent
    try:
        for source, other in sources.items():
            if path.absolute() == other.absolute() or (path.exists() and other.exists() and path.samefile(other)):
                raise InputError(f"{name} is {source} itself, which stays as it is; try another path with {option}")
        if path.is_dir():
            raise InputError(f"{name} is a folder; expected a file name (try {path / f'{what}'} with {option})")
        if path.exists() and not path.is_file():
            raise InputError(f"{name} is not a regular file; try another path with {option}")
        if (path.exists() or path.is_symlink()) and not force:
            raise InputError(f"{name} exists already; try another path with {option}, or --force to replace it")
        if not folder.is_dir():
            raise InputError(f"{name}: there is no folder {folder}; make it, or try another path with {option}")
        # the names that write_bytes takes are a little longer than the file's own
        with tempfile.NamedTemporaryFile(prefix=f".{path.name}.", dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"{name} cannot be written ({error.strerror or error}); try another path with {option}"
        ) from error


@contextlib.contextmanager
def _writing() -> Iterator[Callable[[Path], None]]:
    """Names the file in an error of the system's; told which one is written now."""
    now: list[Path] = []
    try:
        yield now.append
    except OSError as error:
        raise InputError(f"{now[-1]} cannot be written ({error.strerror or error}); nothing was written") from error


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
    if quiet or not sys.stderr.isatty():
        from onnxprune.progress import Progress

        yield Progress()
        return
    from onnxprune.report import text

    with text.TerminalProgress(text.console(sys.stderr)) as bars:
        yield bars


def _warn(warnings: Sequence[str], quiet: bool) -> None:
    for warning in () if quiet else warnings:
        _say(f"warning: {warning}")


# ------------------------------------------------------------------------------------------- the way out


def _say(message: str) -> None:
    """One line on stderr, whatever the message holds."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))
    click.echo(f"onnxprune: {line}", err=True)


def _status(error: BaseException, verbose: bool) -> int:
    """Say what went wrong in one sentence; the status to exit with."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.format_message(), err=True)
        return error.exit_code
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else "onnxprune"
        _say(f"{error.format_message().rstrip('.')} (see {command} --help)")
        return error.exit_code
    if isinstance(error, KeyboardInterrupt) or (
        isinstance(error, click.Abort) and isinstance(error.__cause__, KeyboardInterrupt)
    ):
        _say("interrupted")
        return INTERRUPTED
    if verbose:
        import traceback

        traceback.print_exception(error)
    if isinstance(error, OnnxPruneError) and error.exit_status != InternalError.exit_status:
        _say(str(error))
        return error.exit_status
    if isinstance(error, OSError) and error.filename is not None:  # the machine's, not ours: a full disk, a right
        _say(f"{error.filename} cannot be used: {error.strerror}")
        return InputError.exit_status
    kind = "" if isinstance(error, OnnxPruneError) else f"{type(error).__name__}: "
    text = f"{kind}{' '.join(str(error).split())[:300]}".rstrip(": .")
    please = "" if "report" in text else "; this is a fault of onnxprune: please report it with the model"
    _say(f"{text}{please}{'' if verbose else ' (--verbose shows where)'}")
    return InternalError.exit_status


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what the terminal's encoding lacks becomes a question mark
    try:
        status = cli.main(given, prog_name="onnxprune", standalone_mode=False)
    except SystemExit as error:  # click's own way out of a closed pipe
        return error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        return _status(error, verbose=bool({"-v", "--verbose"} & set(given)))
    return status if isinstance(status, int) else 0


if __name__ == "__main__":
    sys.exit(main())
