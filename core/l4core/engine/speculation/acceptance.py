"""How often guesses are right, by depth: older ones fade."""

from __future__ import annotations

import math
from collections.abc import Sequence

SURE, HOPELESS = 40, 16
"""Drafts verified before acceptance is believed; fewer where hardly one of them was right."""
FLOOR = 0.15
"""Share of first guesses below which a draft is not merely weak but wrong."""
MEMORY, MANY = 0.995, 4
"""Weight of a draft after one more; a step of more than MANY counts as that many, or a large batch would forget what it saw a few steps ago."""
DOUBTED = 16
"""Drafts that all earlier ones are worth together while it is tried whether they still tell the truth."""


class Acceptance:
    """How often guess number i is right where all before it were."""

    def __init__(self, max_drafts: int) -> None:
        self._reached, self._right = [0.0] * max_drafts, [0.0] * max_drafts
        self._lengths = [1.0] * (max_drafts + 1)
        self._seen = 0

    def add(self, drafted_at: Sequence[int], accepted_at: Sequence[int]) -> None:
        """Of one step: sequences that had a guess number i, and those whose guesses up to it were right."""
        self._seen += drafted_at[0]
        before = drafted_at[0]
        for i, (drafted, accepted) in enumerate(zip(drafted_at, accepted_at, strict=True)):
            reached = min(before, drafted)
            fade = MEMORY ** min(reached, MANY)
            self._reached[i] = self._reached[i] * fade + reached
            self._right[i] = self._right[i] * fade + accepted
            before = accepted
        self._count()

    def doubt(self) -> None:
        """What comes from now on counts more than all before."""
        scale = min(1.0, DOUBTED / max(self._reached[0], 1.0))
        self._reached, self._right = ([scale * x for x in line] for line in (self._reached, self._right))
        self._count()

    @property
    def is_sure(self) -> bool:
        return self._seen >= SURE or (self._seen >= HOPELESS and self.first < FLOOR / 2)

    @property
    def first(self) -> float:
        """Share of first guesses that are right."""
        return self._chance(0)

    @property
    def is_wrong(self) -> bool:
        """Whether the draft is of no use, as far as is known."""
        return self.is_sure and self.first < FLOOR

    def length(self, num_drafts: int) -> float:
        """Tokens a sequence gains in a step with so many guesses, the target's own among them."""
        return self._lengths[num_drafts]

    def text(self) -> str:
        return ", ".join(f"{i + 1}: {100 * self._share(i):.0f} %" for i in range(len(self._reached)))

    def _count(self) -> None:
        """Once a step: it is looked up for each number of guesses."""
        self._lengths = [1.0 + sum(self._share(i) for i in range(k)) for k in range(len(self._lengths))]

    def _share(self, i: int) -> float:
        return math.prod(self._chance(d) for d in range(i + 1))

    def _chance(self, i: int) -> float:
        """What is hardly ever reached is as likely as the guess before it."""
        if self._reached[i] >= 4.0 or i == 0:
            return self._right[i] / max(self._reached[i], 1.0)
        return self._chance(i - 1)
