"""One `l4` process on a leash, as an actor sees it: start it, ask how it is, read its last lines, end it. Knows no ray."""

from __future__ import annotations

import collections
import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence

KEPT_LINES = 60
STOP_SECONDS = 15.0


class LeashedProcess:
    """What it prints goes on to this process's stdout, from where Ray brings it to the driver; the last lines are kept for an error."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """arguments: of `l4`.  environment: beside this process's."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "l4_ray.leash", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
        )
        self._lines: collections.deque[str] = collections.deque(maxlen=KEPT_LINES)
        self._reader = threading.Thread(target=self._read, name="l4-output", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def code(self) -> int | None:
        """Exit status, None while it runs."""
        return self._process.poll()

    @property
    def last_lines(self) -> str:
        """Of what it printed; once it has ended, all that there was."""
        if self.code is not None:
            self._reader.join(timeout=2)
        return "\n".join(self._lines)

    def stop(self, patience: float = STOP_SECONDS) -> None:
        """Let go of the leash, and kill it if it is still there `patience` seconds later."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for raw in output:
                line = raw.decode(errors="replace").rstrip("\n")
                self._lines.append(line)
                print(line, flush=True)


def free_port(host: str = "127.0.0.1") -> int:
    """A port that is free there now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.bind((host, 0))
        return int(sock.getsockname()[1])
