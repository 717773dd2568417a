"""No engine outlives its actor: the leash, on a command line that does nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from l4_ray.process import LeashedProcess, free_port

WAITS = "import time, l4core.cli; l4core.cli.main = lambda: (print('up', flush=True), time.sleep(60))"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
LEASHED = "from l4_ray import leash; leash.GRACE_SECONDS = 0.3; leash.main()"
OWNER = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(") ", 1)[1][0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
@pytest.mark.parametrize("before", ["", STUBBORN], ids=["asked", "killed"])
def test_it_ends_with_its_owner_however_that_ends(before: str) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, "\n".join((before, WAITS, LEASHED))], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    assert is_alive(pid)
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    deadline = time.monotonic() + 20
    while is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_how_it_ended_and_what_it_said_last() -> None:
    process = LeashedProcess(["serve", "/nowhere/at/all", "--port", str(free_port())])
    deadline = time.monotonic() + 60
    while process.code is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert process.code != 0
    assert "/nowhere/at/all" in process.last_lines
    process.stop()
