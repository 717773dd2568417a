"""The command that starts the engine's process, or the nursery of its ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

API_KEY_VARIABLE = "L4_API_KEY"


def worker_command(fds: Sequence[int], report: int | None, factory: str | None = None) -> list[str]:
    """fds: its ends of the sockets, one a rank.  report: where it tells of ranks that ended, where there are several.  factory: "module:function"
    that builds another engine (tests)."""
    command = [sys.executable, "-P", "-m", "l4core.engine.process.worker"]
    for fd in fds:
        command += ["--fd", str(fd)]
    if report is not None:
        command += ["--report", str(report)]
    return command if factory is None else [*command, "--factory", factory]


def worker_environment() -> dict[str, str]:
    """This process's, without the server's key."""
    return {name: value for name, value in os.environ.items() if name != API_KEY_VARIABLE}
