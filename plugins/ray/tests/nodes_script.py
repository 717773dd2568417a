"""`l4-ray serve` over a cluster of two nodes, each a machine with an address of its own: the tokens of one rank on one machine; a killed engine and
killed actors of either rank end in recovery; SIGTERM leaves nothing. Prints what was seen as JSON, times in seconds. Needs root.

    PYTHONPATH=tests python plugins/ray/tests/nodes_script.py CHECKPOINT
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil

from helpers.machines import Machine, two_machines
from helpers.one_engine import OPTIONS, alone, answers, health, trouble, until

PORT = 30000
RAY = [sys.executable, "-c", "from ray.scripts.scripts import main; main()"]
START = "start --num-cpus 2 --object-store-memory 80000000 --disable-usage-stats --block"
ENVIRONMENT = {
    **os.environ,
    "PYTHONUNBUFFERED": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "RAY_AUTH_MODE": "disabled",
}


def main() -> None:
    checkpoint = sys.argv[1]
    expected = alone(checkpoint)
    found: dict[str, Any] = {}
    with two_machines() as machines, cluster(machines) as nodes:
        began = time.monotonic()
        launcher, lines = launch(machines[0], checkpoint)
        started = [*nodes, launcher]
        try:
            until(lambda: bool(address_in(lines)), "address", started)
            first, second = sorted(machines, key=lambda machine: machine.address != address_in(lines))
            url = f"http://{first.outside}:{PORT}"
            until(lambda: health(url) == 200, "ready", started)
            found["ready_s"] = time.monotonic() - began
            found["engines"] = [len(named(machine, "l4core.engine.process.worker")) for machine in machines]
            found["same"] = answers(url) == expected
            for name, machine, what in (
                ("engine of rank 1", second, "l4core.engine.process.worker"),
                ("actor of rank 1", second, "ray::RankActor"),
                ("actor of rank 0", first, "ray::RankActor"),
            ):
                kill = named(machine, what)[-1].kill
                found[name] = trouble(url, expected, kill, lambda: None, started, gone=name == "actor of rank 0")
        finally:
            launcher.send_signal(signal.SIGTERM)
            found["exit"] = launcher.wait(60)
        found["left"] = sum(
            len(named(m, "l4core.engine.process.worker")) + len(named(m, "l4_ray.leash")) for m in machines
        )
    print("RESULT " + json.dumps(found), flush=True)


@contextlib.contextmanager
def cluster(machines: tuple[Machine, Machine]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """A Ray node on each machine."""
    first, second = machines
    nodes = []
    try:
        for machine, more in (
            (first, "--head --port 6379 --include-dashboard false"),
            (second, f"--address {first.address}:6379"),
        ):
            command = [*RAY, *START.split(), *more.split(), f"--node-ip-address={machine.address}"]
            nodes.append(
                subprocess.Popen(machine.command(command), stdout=sys.stderr, stderr=sys.stderr, env=ENVIRONMENT)
            )
            time.sleep(8 if machine is first else 4)
        yield nodes
    finally:
        for node in nodes:
            node.send_signal(signal.SIGTERM)
        for node in nodes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait(timeout=30)
            node.kill()
        for machine in machines:
            for process in on(machine):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def launch(machine: Machine, checkpoint: str) -> tuple[subprocess.Popen[bytes], list[str]]:
    """`l4-ray serve` there → (it, the lines that it prints)."""
    options = {
        **OPTIONS,
        "tp": 2,
        "served_model_name": "tiny",
        "dist_timeout": 5,
        "host": "0.0.0.0",
        "port": PORT,
        "chunked_prefill_size": 48,
    }
    command = [sys.executable, "-c", "from l4_ray.cli import main; main()", "serve", checkpoint, "--nnodes", "2"]
    command += ["--ray-address", f"{machine.address}:6379"]
    command += [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    process = subprocess.Popen(
        machine.command(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=ENVIRONMENT
    )
    lines: list[str] = []

    def read() -> None:
        assert process.stdout is not None
        for raw in process.stdout:
            lines.append(raw.decode(errors="replace"))
            print(lines[-1], end="", file=sys.stderr, flush=True)

    threading.Thread(target=read, daemon=True).start()
    return process, lines


def address_in(lines: list[str]) -> str:
    """Of rank 0's node, "" before it is known."""
    found = re.search(r"meet at ([0-9.]+):", "".join(lines))
    return found[1] if found else ""


def on(machine: Machine) -> Iterator[psutil.Process]:
    """All processes there."""
    done = subprocess.run(["ip", "netns", "pids", machine.name], capture_output=True, text=True, check=True)
    for pid in done.stdout.split():
        with contextlib.suppress(psutil.NoSuchProcess):
            yield psutil.Process(int(pid))


def named(machine: Machine, what: str) -> list[psutil.Process]:
    found = []
    for process in on(machine):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(part.startswith(what) for part in process.cmdline()):
                found.append(process)
    return found


if __name__ == "__main__":
    main()
