"""Where the command line writes: names of files, and whether something may be written there."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from onnxprune.errors import InputError

PLACEHOLDER = "{speedup}"  # in names of files


def places(given: Path | None, model: Path, speedups: Sequence[float], option: str, suffix: str) -> list[Path]:
    """Where the files of every speed-up go.

    Raises:
        InputError: one name is given for several.
    """
    stem = f"{model.name.removesuffix('.onnx')}.pruned"
    if len(speedups) > 1:
        stem += f"-{PLACEHOLDER}x"
    template = given or model.with_name(f"{stem}{suffix}")
    if len(speedups) > 1 and PLACEHOLDER not in str(template):
        if not template.is_dir():
            example = template.with_name(f"{template.stem}-{PLACEHOLDER}x{template.suffix}")
            raise InputError(
                f"{option} {template} names one file for {len(speedups)} speed-ups; try {example}, or a folder that"
                " exists"
            )
        template = template / f"{stem}{suffix}"
    return [Path(str(template).replace(PLACEHOLDER, f"{speedup:g}")) for speedup in speedups]


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
def writing() -> Iterator[Callable[[Path], None]]:
    """Names the file in an error of the system's; told which one is written now."""
    now: list[Path] = []
    try:
        yield now.append
    except OSError as error:
        raise InputError(f"{now[-1]} cannot be written ({error.strerror or error}); nothing was written") from error
