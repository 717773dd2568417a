"""Stop strings in text that arrives bit by bit, one look at each character (Knuth–Morris–Pratt), however long the stop strings are.

The result does not depend on how the text is cut into bits: the stop string that is complete first counts; of those complete at the same
character, the longest.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StopMatch:
    """begin, end: the match in characters since the start of the text."""

    stop: str
    begin: int
    end: int


class StopMatcher:
    """Follows one text. `num_open`: characters at its end that may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [(s, _failure(s)) for s in stops]
        self._states = [0] * len(stops)  # per stop string: how many of its characters the text ends with
        self._seen = 0

    @property
    def num_open(self) -> int:
        return max(self._states, default=0)

    def feed(self, text: str, *, allowed: bool = True) -> StopMatch | None:
        """The next characters. allowed: whether a stop string completed here counts. After a match the matcher is of no more use."""
        if not self._stops:
            return None
        for character in text:
            self._seen += 1
            found = [stop for i, (stop, _) in enumerate(self._stops) if self._advance(i, character)]
            if found and allowed:
                stop = max(found, key=len)
                return StopMatch(stop=stop, begin=self._seen - len(stop), end=self._seen)
        return None

    def _advance(self, index: int, character: str) -> bool:
        """Move one stop string's state on; True when it is complete (its state then goes on as after a failure)."""
        stop, failure = self._stops[index]
        state = self._states[index]
        while state and stop[state] != character:
            state = failure[state - 1]
        state += stop[state] == character
        complete = state == len(stop)
        self._states[index] = failure[state - 1] if complete else state
        return complete


@functools.lru_cache(maxsize=128)
def _failure(stop: str) -> Sequence[int]:
    """failure[i]: length of the longest proper prefix of stop that ends stop[: i + 1]. Kept, for the n answers to a prompt have the same stops."""
    failure = [0] * len(stop)
    state = 0
    for i in range(1, len(stop)):
        while state and stop[i] != stop[state]:
            state = failure[state - 1]
        state += stop[i] == stop[state]
        failure[i] = state
    return failure
