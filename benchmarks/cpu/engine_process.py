"""A process of `one.py`, stopped by a signal whenever it is not measured: an idle engine whose loops poll would take the others' cores."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from one import PREFIX


class EngineProcess:
    """One engine, ready. Raises SystemExit with the end of what it wrote to stderr where it ends by itself."""

    def __init__(self, python: str, engine: str, model: Path, dtype: str, threads: int) -> None:
        """threads: 0 = as many as the engine takes by itself."""
        self.engine = engine
        env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | {"HF_HUB_OFFLINE": "1"}
        if threads:
            env |= {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}"}
        script = str(Path(__file__).with_name("one.py"))
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 — lives as long as the process
        self._process = subprocess.Popen(
            [python, script, engine, str(model), "--dtype", dtype, "--threads", str(threads)],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,  # its children are stopped with it
        )
        self.ready_s: float = self._answer()["ready_s"]
        self._signal(signal.SIGSTOP)

    def measure(self, column: str) -> dict[str, float]:
        """→ seconds, `one.Columns.measure`."""
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.write(column + "\n")
        self._process.stdin.flush()
        found: dict[str, float] = {kind: round(value, 4) for kind, value in self._answer().items()}
        self._signal(signal.SIGSTOP)
        return found

    def memory_mib(self) -> int:
        """Of the process and its children now; a page that several share counts once."""
        return round(sum(_kib(pid) for pid in _session(self._process.pid)) / 1024)

    def close(self) -> None:
        """Ends it, with its children."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(PREFIX):
                found: dict[str, Any] = json.loads(line.removeprefix(PREFIX))
                return found
        self._errors.seek(0)
        raise SystemExit(f"{self.engine} ended:\n{self._errors.read()[-2000:]}")

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)


def _session(leader: int) -> list[int]:
    """Processes of the leader's session."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if os.getsid(int(folder.name)) == leader:
                    found.append(int(folder.name))
            except ProcessLookupError:
                continue  # ended meanwhile
    return found


def _kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    return 0
