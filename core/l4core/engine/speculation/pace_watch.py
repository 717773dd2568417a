"""What a `DraftPace` sees in a row of steps: those whose time counts, prompts among decodes, and guesses that do not come."""

from __future__ import annotations

from typing import NamedTuple

from l4core.engine.speculation.step_times import FREE, READING, Recent, bucket_of
from l4core.request import StepStats

BARREN, LONGEST_BREAK = 12, 256
"""Steps in a row that brought no guess although some were wanted, after which none are wanted for as many, then twice as many: a loop that waits
for guesses does not overlap."""
LATELY = 0.999
"""Weight of a step after one more, where prompts are weighed against decodes."""
START, MOST, ENOUGH, RATE = 32.0, 12.0, 6.0, 0.005
"""Plain steps that may be lost at first, at most later and as many on credit, before anything is tried again, and for each one that is made."""
WORST = 4.0
"""Plain steps that one step gains or loses at most; the rest of what it took is an accident."""
COLD, UNUSUAL = 4, 8
"""Steps with a prompt in which kernels may have been compiled, and times the usual one that a later one counts as at most."""


class Wish(NamedTuple):
    """For a step. num_drafts: guesses for each sequence.  reads: without any, whether the draft reads along."""

    num_drafts: int
    reads: bool = True


class SteadySteps:
    """Finds the steps whose time tells what one of their kind takes: those that follow one of the same kind, and have no prompt in them or launch
    one, for a step is launched while another is waited for."""

    def __init__(self) -> None:
        self._kind: tuple[int, Wish] | None = None
        self._held: list[tuple[int, int, float]] = []

    def add(self, stats: StepStats, wish: Wish, ms: float, *, busy: bool) -> list[tuple[int, int, float]]:
        """Of the step just made → (bucket, kind, ms) of the steps now known to count, kinds as in StepTimes."""
        known = [] if stats.num_prefill_tokens else self._held
        self._held = []
        made, kind = len(stats.drafted_at), (len(stats.drafted_at), wish)
        before, self._kind = self._kind, kind if busy else None
        counts = ms > 0.0 and stats.num_decode_tokens and not stats.num_prefill_tokens
        few = made and 2 * stats.drafted_at[0] < stats.num_decode_tokens  # a step of others
        if counts and before == kind and not few and (made or not wish.num_drafts):
            self._held = [(bucket_of(stats.num_decode_tokens), made or (READING if wish.reads else FREE), ms)]
        if not busy:
            known, self._held = known + self._held, []
        return known


class Prompts:
    """Milliseconds that went into prompts and into decodes, lately. A step that launches or computes a prompt counts as one.

    cost: of the draft's part in prompts, as a part of the decodes that it is to make up for, when requests came last: what is read is read.
    """

    def __init__(self, share: float) -> None:
        """share: of a prompt, what the draft adds to it."""
        self.share, self._prompts, self._decodes = share, 0.0, 0.0
        self._usual = Recent()
        self.cost = 0.0

    def count(self, ms: float, has_prompts: bool) -> None:
        self._prompts, self._decodes = LATELY * self._prompts, LATELY * self._decodes
        if not has_prompts:
            self._decodes += ms
            return
        self._usual.add(ms)
        if self._usual.count > COLD:
            self._prompts += min(ms, UNUSUAL * self._usual.value)

    def weigh(self) -> None:
        """Requests come."""
        if self._decodes:
            self.cost = self.share * self._prompts / self._decodes


class Holes:
    """Sequences that decoded while the draft did not read: no guesses can be made for them any more. num: of those that run, if the oldest end first.
    coming: requests that wait, or have just come."""

    def __init__(self) -> None:
        self.num = self.coming = 0
        self._live = self._come = 0

    def come(self, num: int) -> None:
        """So many requests, into the next step."""
        self._come = num
        self.coming += num

    def count(self, stats: StepStats, *, is_read: bool) -> None:
        """After a step that was read, or was not."""
        live = stats.num_running + stats.num_waiting
        ended = max(0, self._live + self._come - live)
        self.num = min(max(0, self.num - ended), stats.num_running) if is_read else stats.num_running
        self._live, self._come, self.coming = live, 0, stats.num_waiting


class Budget:
    """Plain steps that may be lost: by finding out what pays, and by what only seemed to. left: now."""

    def __init__(self) -> None:
        self.left, self._is_closed, self._is_trying = START, False, True

    @property
    def is_spent(self) -> bool:
        """Whether nothing is to be guessed: once it is overdrawn, until there is ENOUGH again."""
        self._is_closed = self.left < (ENOUGH if self._is_closed else -MOST)
        return self._is_closed

    @property
    def allows_trying(self) -> bool:
        """Whether there is something for what may not pay: once there is not, until there is ENOUGH again."""
        self._is_trying = self.left > (0.0 if self._is_trying else ENOUGH)
        return self._is_trying

    def spend(self, took: float, worth: float) -> None:
        """Of one step, in plain ones. What speculation gains is not hoarded."""
        won = min(max(worth - took, -WORST), WORST) + RATE * took
        self.left = max(self.left, min(self.left + won, MOST)) if won > 0 else self.left + won


class Breaks:
    """Steps that bring no guess although some were wanted. left: steps for which none are to be wanted.  num: breaks so far."""

    def __init__(self) -> None:
        self.left = self.num = 0
        self._barren, self._next = 0, BARREN

    def end(self) -> None:
        """There is something new to guess."""
        self.left = self._barren = 0

    def count(self, made: int, wanted: int, *, alone: bool) -> bool:
        """Of one step → whether a break begins. alone: it had no prompt in it, whose sequence may be guessed for later."""
        self.left = max(0, self.left - 1)
        if made:
            self._barren, self._next = 0, BARREN
        elif wanted and alone:
            self._barren += 1
            if self._barren >= BARREN:
                self._barren, self.left, self._next = 0, self._next, min(2 * self._next, LONGEST_BREAK)
                self.num += 1
                return True
        return False
