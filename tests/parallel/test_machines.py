"""The double of two machines is one: they reach each other, and not when the line is cut."""

from __future__ import annotations

import subprocess
import sys

import pytest

from helpers.machines import Machine, two_machines, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

LISTEN = "import socket; s = socket.create_server(('', 29000)); print('up', flush=True)\nwhile True: s.accept()"
CALL = "import socket, sys; socket.create_connection((sys.argv[1], 29000), timeout=0.5)"


def reaches(caller: Machine | None, address: str) -> bool:
    arguments = [sys.executable, "-S", "-c", CALL, address]
    done = subprocess.run(caller.command(arguments) if caller else arguments, capture_output=True, check=False)
    return done.returncode == 0


def test_a_line_is_cut_and_mended() -> None:
    with two_machines() as (a, b):
        listener = subprocess.Popen(a.command([sys.executable, "-S", "-c", LISTEN]), stdout=subprocess.PIPE)
        try:
            assert listener.stdout is not None
            listener.stdout.readline()
            assert reaches(b, a.address)
            assert reaches(None, a.outside)
            assert not reaches(b, "127.0.0.1"), "a loopback of its own"
            b.cut()
            assert not reaches(b, a.address)
            assert reaches(None, a.outside), "the line to a client is another one"
            b.mend()
            assert reaches(b, a.address)
        finally:
            listener.kill()
            listener.communicate()
    assert a.name not in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
