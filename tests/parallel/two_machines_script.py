"""One engine over two machines, by torchrun or by --nnodes: the tokens of one machine; a killed rank and a cut line end in 503 and then in recovery.
Prints what was seen as JSON, times in seconds. Needs root (helpers/machines.py).

    PYTHONPATH=tests python tests/parallel/two_machines_script.py CHECKPOINT [--ranks 2] [--by torchrun | options]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil

from helpers.machines import Machine, two_machines
from helpers.one_engine import OPTIONS, alone, answers, family, health, trouble, until

PORT = 30000
DIST_TIMEOUT = 5
CUT_SECONDS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--by", choices=("torchrun", "options"), default="torchrun")
    args = parser.parse_args()
    expected = alone(args.checkpoint)
    found: dict[str, Any] = {"ranks": args.ranks, "by": args.by}
    with two_machines() as machines:
        began = time.monotonic()
        with launched(machines, args.checkpoint, args.ranks, args.by) as (first, second):
            url = f"http://{machines[0].outside}:{PORT}"
            until(lambda: health(url) == 200, "ready", (first, second))
            found["ready_s"] = time.monotonic() - began
            found["same"] = answers(url) == expected
            found["killed"] = trouble(url, expected, lambda: kill_a_rank(second), lambda: None, (first, second))
            found["cut"] = trouble(url, expected, machines[1].cut, machines[1].mend, (first, second), after=CUT_SECONDS)
            ours = [process.pid for launcher in (first, second) for process in family(launcher)]
        found["left"] = sum(psutil.pid_exists(pid) for pid in ours)
    print("RESULT " + json.dumps(found), flush=True)


@contextlib.contextmanager
def launched(
    machines: tuple[Machine, Machine], checkpoint: str, ranks: int, by: str
) -> Iterator[tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]]]:
    """A launcher on each machine, ended by SIGTERM. by: torchrun, or options."""
    started = []
    for index, machine in enumerate(machines):
        command = [sys.executable, "-m"]
        if by == "torchrun":
            where = f"--nnodes 2 --node-rank {index} --nproc-per-node {ranks // 2}"
            meeting = f"--master-addr {machines[0].address} --master-port 29500"
            command += ["torch.distributed.run", *where.split(), *meeting.split(), "-m"]
        command += ["l4core.launch_server", "--model-path", checkpoint, "--served-model-name", "tiny"]
        if by == "options":
            command += f"--nnodes 2 --node-rank {index} --dist-init-addr {machines[0].address}:29500".split()
        options = {
            **OPTIONS,
            "tp": ranks,
            "dist_timeout": DIST_TIMEOUT,
            "host": "0.0.0.0",
            "port": PORT,
            "chunked_prefill_size": 48,
        }
        command += [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        started.append(
            subprocess.Popen(machine.command(command), stdout=sys.stderr, stderr=sys.stderr, env=environment)
        )
    first, second = started
    try:
        yield first, second
    finally:
        for launcher in started:
            launcher.send_signal(signal.SIGTERM)
        for launcher in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                launcher.wait(timeout=60)
            launcher.kill()


def kill_a_rank(launcher: subprocess.Popen[bytes]) -> None:
    """The process that computes, on that machine."""
    ranks = [process for process in family(launcher) if "l4core.engine.process.worker" in process.cmdline()]
    ranks[-1].kill()


if __name__ == "__main__":
    main()
