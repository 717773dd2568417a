"""Whether other processes have come to their end."""

from __future__ import annotations

import contextlib

import psutil


def lives(process: psutil.Process) -> bool:
    """Whether it is more than an entry that its parent, or init, has not read yet."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False
