"""One engine's benchmark as a process of its own: until when it may run, when it said that it was ready, and nothing of it left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO


def run(
    name: str, command: Sequence[str], env: Mapping[str, str], log: Path, limit_s: float
) -> tuple[float | None, str]:
    """→ (seconds from its start until it printed a line that begins with "ready", "" or why it did not end well). Its output goes to `log`.

    It gets a session of its own: what it started (compilers hold its output open) ends with it, whatever happens here.
    """
    began, ready = time.perf_counter(), list[float]()

    def read(output: IO[str]) -> None:
        with output, log.open("w") as file:
            for line in output:
                file.write(line)
                file.flush()
                if line.startswith("ready") and not ready:
                    ready.append(time.perf_counter() - began)
                if not line.startswith(("INFO", "WARNING", "DEBUG", "(")) and len(line) < 200:
                    print(f"{name:>8} | {line}", end="", flush=True)

    process = subprocess.Popen(
        command,
        env={**env, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None
    reader = threading.Thread(target=read, args=(process.stdout,), daemon=True)
    reader.start()
    error = ""
    try:
        status = process.wait(limit_s)
        seconds = time.perf_counter() - began
    except subprocess.TimeoutExpired:
        status, error = None, f"took longer than {limit_s:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(5)
    if status is None:
        time.sleep(2)  # a killed process gives the device's memory back a moment later
    elif status:
        tail = " ".join(log.read_text(errors="replace").split())[-300:]
        error = f"exit {status}: …{tail} after {seconds:.0f} s"
    return (ready or [None])[0], error


def end_children_when_terminated() -> None:
    """SIGTERM (`timeout` sends it) raises here as Ctrl-C does, so that the process that `run` waits for is ended too."""

    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)


def unpack(pieces: Sequence[Path], folder: Path, limit_s: float = 90) -> str:
    """An archive.tar.xz that may have been cut in pieces, into `folder` unless it is there → "" or what went wrong."""
    if folder.is_dir():
        return ""
    part = folder.with_name(folder.name + ".part")
    part.mkdir(parents=True, exist_ok=True)
    names = " ".join(map(str, pieces))
    try:
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; cat {names} | xz -d | tar x -C {part}"],
            capture_output=True,
            text=True,
            timeout=limit_s,
        )
    except subprocess.TimeoutExpired:
        return f"took longer than {limit_s:.0f} s"
    if done.returncode:
        return done.stderr.strip()[-300:] or f"exit {done.returncode}"
    part.rename(folder)
    return ""
