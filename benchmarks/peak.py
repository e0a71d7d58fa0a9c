"""The most memory that a process had resident."""

from __future__ import annotations

import resource
from pathlib import Path


def peak_mib() -> int:
    """MiB of this process since its program began.

    What getrusage says of a child counts what the parent had when it began the child; Linux's own page does not.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
