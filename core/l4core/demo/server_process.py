"""A server of our own for the demo: started as a user would start it, its output shown and remembered, stopped when the demo ends."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from l4core.errors import L4Error

READY_SECONDS = 180.0
STOP_SECONDS = 15.0
API_KEY = "L4_API_KEY"
"""A key that the user keeps for another server is none of the demo's."""


class ServerProcess:
    """`python -m l4core.launch_server` in a process of its own; a context manager that ends it."""

    def __init__(self, model: Path, *, name: str, port: int, flags: Sequence[str] = ()) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.lines: list[str] = []
        command = [
            sys.executable,
            "-m",
            "l4core.launch_server",
            "--model-path",
            str(model),
            "--served-model-name",
            name,
        ]
        print(f"$ python {' '.join(command[1:])} --port {port} {' '.join(flags)}".rstrip(), flush=True)
        self._process = subprocess.Popen(
            [*command, "--port", str(port), *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={name: value for name, value in os.environ.items() if name != API_KEY},
        )
        self._echo = threading.Thread(target=self._copy_output, daemon=True)
        self._echo.start()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._echo.join(STOP_SECONDS)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def wait_ready(self) -> float:
        """Seconds until /ready answered. L4Error when the server ends, or takes longer than three minutes."""
        began = time.perf_counter()
        while time.perf_counter() - began < READY_SECONDS:
            if self._process.poll() is not None:
                self._echo.join(STOP_SECONDS)
                raise L4Error(f"the server ended with exit code {self._process.returncode} before it was ready")
            if _answers(f"{self.url}/ready"):
                return time.perf_counter() - began
            time.sleep(0.1)
        raise L4Error(f"the server was not ready after {READY_SECONDS:.0f} seconds")

    def wait(self) -> None:
        """Block until the server ends."""
        self._process.wait()

    def report_line(self, label: str) -> str:
        """The value that stands behind a label in the start-up block, "unknown" when there is no such line."""
        found = (re.search(rf"\b{re.escape(label)}\s{{2,}}(.+)", line) for line in self.lines)
        return next((match[1].strip() for match in found if match), "unknown")

    def _copy_output(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line.rstrip("\n"))
            print(f"  | {line}", end="", flush=True)


def _answers(url: str) -> bool:
    """No proxy: one from the environment does not know our loopback."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def free_port(preferred: int) -> int:
    """The preferred port if nobody listens on it, else any free one."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise L4Error("no free port on 127.0.0.1")
