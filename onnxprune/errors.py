"""What can go wrong, in one small family.

Every message names what was expected, what was found, where, and what to try. The exit status of the
command line is a property of the class, so that the two never drift apart.
"""

from __future__ import annotations


class OnnxPruneError(Exception):
    """Root of every error that onnxprune raises on purpose."""

    exit_status = 1


class InputError(OnnxPruneError, ValueError):
    """The user's model, data or options cannot be used as given."""

    exit_status = 2


class UnreachableTarget(OnnxPruneError, ValueError):
    """The asked-for budget cannot be met; carries the best that can."""

    exit_status = 3

    def __init__(self, message: str, reachable: float) -> None:
        super().__init__(message)
        self.reachable = reachable


class InternalError(OnnxPruneError, RuntimeError):
    """A fault of onnxprune itself: the proof failed, an invariant does not hold."""

    exit_status = 1
