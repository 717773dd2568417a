"""Signs of life of the ranks that one process started. Ranks watch each other (parallel/watchdog.py), but one that is stopped, or stuck where no
thread of it can run, is ended by nobody else where no rank beside it lives on: it is alone on its machine, or all of them stand still."""

from __future__ import annotations

from collections.abc import Sequence

from l4core.parallel.place import Place
from l4core.parallel.watchdog import look_seconds

PATIENCE = 2
"""Time-outs: the ranks' own watchdogs come first, and know more …"""
LEAST_SECONDS = 4.0
"""… and a process that ends in good order takes a moment, too."""


class Pulse:
    """Of the ranks at `places`. As in the watchdog, looks are counted and not the clock: who was stopped itself finds no fault with others."""

    def __init__(self, places: Sequence[Place]) -> None:
        self.seconds = max(LEAST_SECONDS, PATIENCE * places[0].timeout)
        self.look_seconds = look_seconds(places[0].timeout)
        self._silent: dict[int, int] = {}  # looks, by rank; of those that gave a sign once

    def beat(self, rank: int) -> None:
        """That rank lives."""
        self._silent[rank] = 0

    def look(self) -> int | None:
        """A rank that was silent for too many looks."""
        for rank in self._silent:
            self._silent[rank] += 1
        most = self.seconds / self.look_seconds
        return next((rank for rank, count in self._silent.items() if count > most), None)
