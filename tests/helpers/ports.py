"""Ports for processes that must be told theirs: found free, and not among those that the kernel hands out to whoever asks for any."""

from __future__ import annotations

import random
import socket

LOWEST, HIGHEST = 10_000, 29_999
"""Below every system's own range (32768 up on Linux), so that no connection of a test in another process takes it before it is used."""


def free_port() -> int:
    """On the loopback."""
    for port in random.SystemRandom().sample(range(LOWEST, HIGHEST + 1), 100):
        if is_free(port):
            return port
    raise AssertionError(f"no free port among 100 of {LOWEST} … {HIGHEST}")


def is_free(port: int) -> bool:
    """Nobody listens there, on any address."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
