"""The way out of the command line: what went wrong in one sentence on stderr, and the status to exit with."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator

import click

from onnxprune.errors import InputError, InternalError, OnnxPruneError

INTERRUPTED = 130
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # a stream that takes no more names no file


def say(message: str) -> None:
    """One line on stderr, whatever the message holds."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))
    click.echo(f"onnxprune: {line}", err=True)


def status_of(error: BaseException, verbose: bool) -> int:
    """Say what went wrong in one sentence; the status to exit with."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.format_message(), err=True)
        return error.exit_code
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else "onnxprune"
        say(f"{error.format_message().rstrip('.')} (see {command} --help)")
        return error.exit_code
    if isinstance(error, KeyboardInterrupt) or (
        isinstance(error, click.Abort) and isinstance(error.__cause__, KeyboardInterrupt)
    ):
        say("interrupted")
        return INTERRUPTED
    if verbose:
        import traceback

        traceback.print_exception(error)
    if isinstance(error, OnnxPruneError) and error.exit_status != InternalError.exit_status:
        say(str(error))
        return error.exit_status
    if isinstance(error, OSError) and (error.filename is not None or error.errno in _FULL):  # the machine's, not ours
        say(f"{error.filename or 'stdout'} cannot be used: {error.strerror}")
        _let_go_of_stdout()
        return InputError.exit_status
    if isinstance(error, MemoryError):
        say(f"there is not enough memory ({error}); try --memory, or fewer --samples".replace(" ()", ""))
        return InputError.exit_status
    kind = "" if isinstance(error, OnnxPruneError) else f"{type(error).__name__}: "
    text = f"{kind}{' '.join(str(error).split())[:300]}".rstrip(": .")
    please = "" if "report" in text else "; this is a fault of onnxprune: please report it with the model"
    say(f"{text}{please}{'' if verbose else ' (--verbose shows where)'}")
    return InternalError.exit_status


def _let_go_of_stdout() -> None:
    """Where stdout takes no more, have what it holds go nowhere: Python would try again, and exit with 120."""
    if sys.stdout is None:  # closed from the start
        return
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def told_to_end() -> Iterator[None]:
    """Being told to end (SIGTERM: a CI job is cancelled) interrupts like Ctrl-C, so that no scratch files are left."""
    if threading.current_thread() is not threading.main_thread():  # only this one may say what signals do
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
