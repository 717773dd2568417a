"""Why several processes that compute together have ended: of all that they say, and of how each ended, the one thing that explains the rest."""

from __future__ import annotations

import signal
from collections.abc import Sequence

import msgspec

from l4core.engine.process.messages import LOST_STATUS, Ended, Failed
from l4core.errors import RankLostError
from l4core.parallel.place import Place


class LastWords:
    """Of the processes at `places`."""

    def __init__(self, places: Sequence[Place]) -> None:
        self._places = places
        self._failed: list[Failed] = []
        self._ends: list[Ended] = []

    @property
    def all_ended(self) -> bool:
        return len(self._ends) == len(self._places)

    def failed(self, place: Place, words: Failed) -> None:
        is_named = words.heard or place.rank == 0
        self._failed.append(words if is_named else msgspec.structs.replace(words, message=f"{place}: {words.message}"))

    def ended(self, end: Ended) -> None:
        self._ends.append(end)

    def cause(self) -> Failed | None:
        """What they say, once. What one says itself is better than what another has heard of it; and that another one ended is worth saying only
        where that is not one of these, whose end is known."""
        failed, self._failed = self._failed, []
        causes = [words for words in failed if words.kind != RankLostError.__name__]
        own = [words for words in causes if not words.heard]
        known = any(end.is_cause for end in self._ends)
        return next(iter([*own, *causes] if known else [*own, *causes, *failed]), None)

    def ending(self, status: int | None) -> str:
        """ "the engine process …". status: of their parent, or of the one process."""
        if not self._ends:
            return _describe(status)
        first = next((end for end in self._ends if end.is_cause), self._ends[0])
        return f"of {self._places[first.index]} {_describe(first.status)}"


def _describe(status: int | None) -> str:
    if status == LOST_STATUS:
        return "ended"
    if status is None or status >= 0:
        return f"ended with exit status {status}"
    return f"was ended by signal {signal.Signals(-status).name}"
