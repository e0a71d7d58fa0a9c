"""What the command line takes: types of values, and options that several commands share. Only click is imported."""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

PROVIDERS = ("cpu", "cuda", "tensorrt", "openvino", "coreml", "dml")
BUDGETS = ("macs", "params", "memory", "latency")
ALLOCATIONS = ("auto", "uniform", "papers")
SELECTIONS = ("greedy", "lasso", "wanda", "l1", "slimming", "random")

_Function = TypeVar("_Function", bound=Callable[..., Any])


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


def ratios(value: object) -> tuple[float, ...]:
    """Speed-ups, separated by commas."""
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


def count(value: object) -> float:
    """A number with a prefix, such as 5M."""
    text = str(value).strip()
    factor = {"k": 1e3, "M": 1e6, "G": 1e9}.get(text[-1:].replace("K", "k"), 1.0)
    with contextlib.suppress(ValueError):
        number = float(text if factor == 1.0 else text[:-1]) * factor
        if 0 < number < math.inf:
            return number
    raise click.BadParameter(f"expected a number above 0 such as 5M, found '{value}'.")


def size(value: object) -> int:
    """Bytes, with their unit."""
    found = re.fullmatch(r"([0-9.]+) *([kKMGT]?)(iB|B)?", str(value).strip())
    with contextlib.suppress(ValueError):
        if found:
            number = float(found[1]) * (1000 if found[3] == "B" else 1024) ** " KMGT".index(found[2].upper() or " ")
            if number >= 1:
                return int(number)
    raise click.BadParameter(f"expected bytes such as 512MiB or 2GiB, found '{value}'.")


def shape(value: object) -> tuple[str, tuple[int, ...]]:
    """An input's name and sizes."""
    name, _, sizes = str(value).rpartition(":")
    with contextlib.suppress(ValueError):
        shape = tuple(int(part) for part in sizes.replace("x", ",").split(","))
        if name and min(shape) > 0:
            return name, shape
    raise click.BadParameter(f"expected a name and sizes such as input:1,3,224,224, found '{value}'.")


def multiple(value: object) -> int | str:
    """A number, or auto."""
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


FILE = click.Path(path_type=Path)
with_preprocessing = _options(
    click.option("--scale", type=_number, metavar="X", help="Factor for the pixels of images (default 1/255)."),
    click.option("--mean", type=_numbers, metavar="X[,X…]", help="Subtracted after scaling, per channel."),
    click.option("--std", type=_numbers, metavar="X[,X…]", help="Divided by after that, per channel."),
    click.option("--bgr", is_flag=True, help="The model takes blue, green, red."),
    click.option("--resize", type=click.IntRange(min=1), metavar="N", help="Short side of images in a folder."),
    click.option("--crop", type=click.IntRange(min=1), metavar="N", help="Centre square of images in a folder."),
)


def with_data(
    default: str = "MODEL.calib.npz or test_data_set_* beside the model",
) -> Callable[[_Function], _Function]:
    """Where data come from, and what is taken where nothing is said."""
    kinds = "an .npy or .npz file, a folder of images or of ONNX test data, or package.module:function"
    return click.option("--data", metavar="DATA", help=f"Calibration data: {kinds}. Default: {default}.")


def with_sampling(default: str) -> Callable[[_Function], _Function]:
    """How many of the data are used, and which."""
    return _options(
        click.option(
            "--samples",
            type=click.IntRange(min=1),
            metavar="N",
            help=f"Use at most N samples of the data (default {default}).",
        ),
        click.option("--batch-size", type=click.IntRange(min=1), metavar="N", help="Samples fed to the model at once."),
        click.option(
            "--seed", type=click.IntRange(min=0), default=0, metavar="N", help="Of every random choice (default 0)."
        ),
    )


with_mirror = click.option(
    "--mirror/--no-mirror",
    default=True,
    show_default=True,
    help="Of few images, use their mirror images as well, where the model answers both alike.",
)
with_memory = click.option(
    "--memory",
    type=size,
    metavar="BYTES",
    help="Stay within so much memory, such as 512MiB (default: half of what is free).",
)
with_dask = click.option(
    "--dask",
    metavar="ADDRESS",
    help="Collect on a Dask cluster: tcp://scheduler:8786, or local:N for N processes here.",
)
with_threads = click.option(
    "--threads", type=click.IntRange(min=0), default=0, metavar="N", help="Threads of onnxruntime (0: one per core)."
)
with_provider = click.option(
    "--provider", type=click.Choice(PROVIDERS), default="cpu", help="Where models are run (default cpu)."
)
with_layers = _options(
    click.option("--only", metavar="REGEX", help="Make only layers narrower whose node name this finds."),
    click.option("--exclude", metavar="REGEX", help="Leave layers alone whose node name this finds."),
)
with_approximate = click.option(
    "--approximate",
    is_flag=True,
    help="Let normalised axes shrink, too, such as the hidden width of transformers: their mean and variance are then"
    " those of the channels that are left, so that the cut is not exact.",
)
with_choosing = _options(
    click.option(
        "--select", type=click.Choice(SELECTIONS), default="greedy", help="How channels are chosen (default greedy)."
    ),
    click.option(
        "--samplers/--no-samplers",
        default=True,
        show_default=True,
        help="Let blocks choose among the channels of a residual stream, with a Gather in front.",
    ),
)
with_budget = click.option(
    "--budget",
    type=click.Choice(ALLOCATIONS),
    default="auto",
    help="How the cost is shared out: by measured damage (auto), the same share of every group (uniform), or as He et"
    " al. 2017 did: early stages most, the last one not (papers). Default auto.",
)
with_talk = _options(
    click.option("--json", "as_json", is_flag=True, help="Print the result as a JSON object on stdout."),
    click.option("-q", "--quiet", is_flag=True, help="Say nothing but errors (and the object of --json)."),
    click.option("-v", "--verbose", is_flag=True, help="Say more; show where an unexpected failure happened."),
)
