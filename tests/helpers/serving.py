"""Starts the real server as a user would: a process of its own, from the command line, on any free port of the loopback."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

READY_SECONDS = 300
L4_SERVE = (Path(sys.executable).with_name("l4").as_posix(), "serve")


class Served:
    """A running server. url: http://127.0.0.1:PORT.  output: what it printed so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stdout:
            for line in stdout:
                self.lines.append(line)

    def join(self) -> None:
        """Wait for the last of what it printed."""
        self._reader.join(timeout=10)

    def wait(self) -> str:
        """→ the address, once the server says it is up."""
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            found = re.search(r"http://127\.0\.0\.1:(\d+)", self.output)
            if found:
                return found.group(0)
            time.sleep(0.05)
        time.sleep(0.2)
        raise AssertionError(f"the server did not come up (exit {self.process.poll()}):\n{self.output}")


@contextlib.contextmanager
def serve(
    arguments: Sequence[str],
    *,
    command: Sequence[str] = L4_SERVE,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
) -> Iterator[tuple[str, Served]]:
    """(address, server) of `l4 serve ARGUMENTS --port 0`; ended by SIGTERM, which must end it with status 0."""
    process = subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
    )
    served = Served(process)
    try:
        yield served.wait(), served
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=300) == 0, served.output
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        served.join()
