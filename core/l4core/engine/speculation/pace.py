"""Decides how many tokens to guess, from what steps took and how many guesses were right: one `DraftPace` beside the loop that steps the engine.

The engine reads no clock; the number travels in its inbox. Never slower is the rule: k guesses are made where (tokens a step brings) / (ms it takes)
is best, and none where nothing beats a plain step. Batches are told apart by powers of two. What was not measured yet is predicted by counting bytes:
verifying k + 1 tokens reads the experts that so many tokens hit, and each guess reads the draft once.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from l4core.engine.inbox import Inbox
from l4core.request import NO_GUESSES, SLOWER, StepStats

FEW = 4
"""Steps of a kind that must have been timed before its time is believed."""
GAIN = 1.03
"""Guessing must beat plain steps by this much before it is taken up, and be slower before it is given up, so that noise does not decide."""
SURE = 40
"""Drafts verified before acceptance is believed …"""
FLOOR = 0.15
"""… and the share of first guesses below which a draft is not merely weak but wrong."""
MEMORY, MANY = 0.98, 4
"""Weight of a draft after one more; a step of more than MANY counts as that many, or a large batch would forget what it saw a few steps ago."""
REFRESH = 200
"""Speculating steps between two plain ones, which keep the plain time true."""
BARREN, LONGEST_BREAK = 12, 256
"""Steps in a row that brought no guess although some were wanted, after which none are wanted for as many, then twice as many: a loop that waits
for guesses does not overlap."""
GRACE = 8
"""Plain steps in a row for which a draft still reads what the target computes, so that it can go on guessing."""
TRIAL = 12
"""Steps for which a pause is broken off, fewer where each brings more than MANY drafts: after …"""
REST, LONGEST_REST = 256, 4096
"""… so many plain steps, twice as many after each trial in vain; a quarter of it when requests come."""

READING, FREE = -1, -2
"""Plain steps apart, beside numbers of guesses: in which the draft reads along, and in which it does not."""
CROWD = 3
"""Batches of 2 ** (CROWD - 1) sequences and more are timed without the draft once acceptance is known, though it can then guess for later sequences
only: where reading along takes long (a small target) guessing would seem to pay beside it."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyCosts:
    """Bytes that a step reads. fixed: whatever its tokens.  expert: one routed expert in all layers that have some.  num_experts: of a layer, 0 =
    none.  draft: one pass of the drafter."""

    fixed: float
    expert: float
    num_experts: int
    draft: float

    def ratio(self, batch: int, num_drafts: int) -> float:
        """Of a step with `num_drafts` guesses for each of `batch` sequences to a plain one. The draft's pass over the rows just verified makes the
        first guess, and each further guess takes one pass."""
        return (self._read(batch * (num_drafts + 1)) + num_drafts * self.draft) / self._read(batch)

    def share_of_target(self, batch: int) -> float:
        """Of a plain step in which the draft reads along."""
        return self._read(batch) / (self._read(batch) + self.draft)

    def distinct(self, num_tokens: int) -> float:
        """Experts that so many tokens hit in a layer, each as likely as another."""
        if not self.num_experts:
            return 0.0
        return self.num_experts * (1.0 - (1.0 - 1.0 / self.num_experts) ** num_tokens)

    def _read(self, num_tokens: int) -> float:
        return self.fixed + self.expert * self.distinct(num_tokens)


TRAINED = (
    "a draft that fits has 50 to 80 %. Was it trained for this model and template? Does it read the layers it was trained on (the start-up block "
    "names them; --speculative-option aux_layers=…)? Is this its kind of text (a chat-only draft is of little use on /v1/completions)?"
)
UNTRAINED = "it is of no use for this kind of text"


class DraftPace:
    """`stamp` what goes into a step, `observe` what came out. num_pauses: times that guessing stopped being worth it."""

    def __init__(
        self,
        name: str,
        max_drafts: int,
        costs: VerifyCosts,
        clock: Callable[[], float] = time.perf_counter,
        *,
        fixed: bool = False,
        advice: str = TRAINED,
    ) -> None:
        """clock: seconds.  fixed: guess always; a draft that is wrong is named all the same.  advice: what to say of one."""
        self.num_pauses = 0
        self._fixed, self._advice = fixed, advice
        self._name, self._max, self._costs, self._clock = name, max_drafts, costs, clock
        self._acceptance = _Acceptance(max_drafts)
        self._times: dict[tuple[int, int], _Mean] = {}
        self._shares: dict[int, float] = {}
        self._since: float | None = None
        self._asked = self._bucket = 0
        self._paused: dict[int, bool] = {}
        self._since_plain = self._trial = self._rested = self._idle = 0
        self._barren = self._left = 0
        self._break = BARREN
        self._rest = REST
        self._warned = self._told_barren = False
        self._pause = ""

    def stamp(self, inbox: Inbox) -> Inbox:
        """The same inbox with the number of guesses wanted. Call it just before the step."""
        if self._fixed:
            return inbox
        if (
            self._paused.get(self._bucket)
            and not self._trial
            and self._rested >= (self._rest // 4 if inbox.requests else self._rest)
        ):
            self._trial, self._rested, self._rest = TRIAL, 0, min(2 * self._rest, LONGEST_REST)
        if self._since is None:
            self._since = self._clock()
        if inbox.requests:
            self._barren = self._left = 0
        self._asked = 0 if self._left else self._choose()
        return replace(inbox, num_drafts=self._asked)

    def observe(self, stats: StepStats, *, busy: bool) -> None:
        """Call it just after the step. busy: there is a next one at once, so the time until its end belongs to it."""
        now = self._clock()
        began, self._since = self._since, now if busy else None
        if stats.drafted_at:
            self._acceptance.add(stats.drafted_at, stats.accepted_at)
            self._warn()
        decodes = stats.num_decode_tokens
        self._bucket = (
            stats.num_running or decodes
        ).bit_length() or self._bucket  # the next step's, whose prompts decode by then
        if not decodes or self._fixed:
            return
        self._look_for_guesses(bool(stats.drafted_at), alone=not stats.num_prefill_tokens)
        self._idle = 0 if self._asked else self._idle + 1
        is_clean = began is not None and not stats.num_prefill_tokens
        made = len(stats.drafted_at)
        if is_clean and began is not None and (made or not self._asked):
            self._learn(decodes, made, (now - began) * 1e3)
        self._since_plain = self._since_plain + 1 if made else 0
        self._trial = max(0, self._trial - max(1, sum(stats.drafted_at[:1]) // MANY))
        self._rested = 0 if made else self._rested + 1

    def _learn(self, decodes: int, made: int, ms: float) -> None:
        """What a plain step takes without the draft is put down to bytes until it was measured."""
        bucket = decodes.bit_length()
        if made:
            self._time(bucket, made).add(ms)
            return
        plain, reading, free = (self._time(bucket, kind) for kind in (0, READING, FREE))
        if self._idle <= GRACE:
            reading.add(ms)
            plain.add(ms * self._shares.get(bucket, self._costs.share_of_target(decodes)))
            return
        free.add(ms)
        plain.add(ms)
        if free.count >= FEW and reading.count >= FEW:
            if bucket not in self._shares:
                plain.value = free.value
            self._shares[bucket] = min(1.0, free.value / reading.value)

    def take_pause(self) -> str:
        """Why guessing paused since the last call: one of DRAFT_PAUSES, "" = it did not."""
        pause, self._pause = self._pause, ""
        return pause

    def _look_for_guesses(self, any_made: bool, *, alone: bool) -> None:
        """alone: the step had no prompt in it, whose sequence may be guessed for later."""
        self._left = max(0, self._left - 1)
        if any_made:
            self._barren, self._break = 0, BARREN
        elif self._asked and alone:
            self._barren += 1
            if self._barren >= BARREN:
                self._barren, self._left, self._break = 0, self._break, min(2 * self._break, LONGEST_BREAK)
                self._pause = NO_GUESSES
                self._say_barren()

    # --- the choice --------------------------------------------------------------------------------------------------------------------

    def _choose(self) -> int:
        bucket = self._bucket
        if not bucket:
            return self._max
        plain = self._time(bucket, 0)
        if self._trial and plain.count >= FEW:
            return max(range(1, self._max + 1), key=lambda k: self._gain(bucket, k))
        if plain.count < FEW or self._since_plain >= REFRESH:
            return 0 if self._acceptance.is_sure or plain.count < FEW else self._max
        if not self._acceptance.is_sure:
            return self._max
        if bucket >= CROWD and self._time(bucket, FREE).count < FEW:
            return 0
        margin = 1.0 if self._paused.get(bucket) is False else GAIN
        best = max(range(self._max + 1), key=lambda k: self._gain(bucket, k) * (margin if k == 0 else 1.0))
        self._note(bucket, best)
        return best

    def _gain(self, bucket: int, num_drafts: int) -> float:
        """Tokens a millisecond, as a multiple of a plain step's."""
        return self._acceptance.length(num_drafts) / self._slowdown(bucket, num_drafts)

    def _slowdown(self, bucket: int, num_drafts: int) -> float:
        """Time of a step with so many guesses as a multiple of a plain one: measured, or from its neighbours, or by counting bytes. It does more, so
        less than one is noise."""
        if num_drafts == 0:
            return 1.0
        plain, own = self._time(bucket, 0), self._time(bucket, num_drafts)
        batch = max(1, 3 << bucket >> 2)
        predicted = self._costs.ratio(batch, num_drafts)
        if own.count >= FEW:
            return max(1.0, own.value / plain.value)
        measured = [k for k in range(1, self._max + 1) if self._time(bucket, k).count >= FEW]
        if not measured:
            return predicted
        near = min(measured, key=lambda k: abs(k - num_drafts))
        share = (predicted - 1.0) / max(self._costs.ratio(batch, near) - 1.0, 1e-9)
        return max(1.0, 1.0 + (self._time(bucket, near).value / plain.value - 1.0) * share)

    def _time(self, bucket: int, num_drafts: int) -> _Mean:
        return self._times.setdefault((bucket, num_drafts), _Mean())

    # --- what it says ------------------------------------------------------------------------------------------------------------------

    def _note(self, bucket: int, best: int) -> None:
        pauses = best == 0
        before, self._paused[bucket] = self._paused.get(bucket, False), pauses
        if before is pauses:
            return
        self.num_pauses += pauses
        self._pause = SLOWER if pauses else self._pause
        self._rest = self._rest if pauses else REST
        k = self._max if pauses else best
        logger.info(
            "speculation (%s) %s at about %d sequences: %d guesses bring %.2f tokens a step in %.2f times a plain step's time (right at depth %s)",
            self._name,
            "pauses" if pauses else "goes on",
            max(1, 3 << bucket >> 2),
            k,
            self._acceptance.length(k),
            self._slowdown(bucket, k),
            self._acceptance.text(),
        )

    def _say_barren(self) -> None:
        """Once: text that repeats nothing, or contexts beyond the draft's, come and go."""
        if not self._told_barren:
            self._told_barren = True
            logger.info(
                "speculation (%s) found nothing to guess in %d steps in a row; it is asked less often until it does",
                self._name,
                BARREN,
            )

    def _warn(self) -> None:
        if self._warned or not self._acceptance.is_sure or self._acceptance.first >= FLOOR:
            return
        self._warned = True
        logger.warning(
            "speculation (%s): %.0f %% of first guesses are right; %s",
            self._name,
            100 * self._acceptance.first,
            self._advice,
        )


class _Acceptance:
    """How often guess number i is right where all before it were; older drafts fade."""

    def __init__(self, max_drafts: int) -> None:
        self._reached, self._right = [0.0] * max_drafts, [0.0] * max_drafts
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

    @property
    def is_sure(self) -> bool:
        return self._seen >= SURE

    @property
    def first(self) -> float:
        return self._chance(0)

    def length(self, num_drafts: int) -> float:
        """Tokens a step brings with so many guesses, the target's own among them."""
        return 1.0 + sum(self._share(i) for i in range(num_drafts))

    def text(self) -> str:
        return ", ".join(f"{i + 1}: {100 * self._share(i):.0f} %" for i in range(len(self._reached)))

    def _share(self, i: int) -> float:
        return math.prod(self._chance(d) for d in range(i + 1))

    def _chance(self, i: int) -> float:
        """What is hardly ever reached is as likely as the guess before it."""
        if self._reached[i] >= 4.0 or i == 0:
            return self._right[i] / max(self._reached[i], 1.0)
        return self._chance(i - 1)


class _Mean:
    """A mean that follows: of the last 16 values or so; one four times as large (a stalled machine, a kernel compiled) does not count."""

    def __init__(self) -> None:
        self.value, self.count = 0.0, 0

    def add(self, value: float) -> None:
        if self.count >= FEW and value > 4 * self.value:
            return
        self.count += 1
        self.value += (value - self.value) / min(self.count, 16)
