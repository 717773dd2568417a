"""Decides how many tokens to guess, from what steps took and how many guesses were right: one `DraftPace` beside the loop that steps the engine.

The engine reads no clock; what is wanted travels in its inbox. Never slower is the rule: k guesses are made where (tokens a step brings) / (ms it
takes) is best, and none where nothing beats a plain step by enough to pay for the draft's part in prompts, and for doubt. A step without guesses is
one of three:

    held      the draft reads what it computes, and can go on guessing afterwards: for a few steps, to see what a plain one takes
    free      the draft does nothing, and can guess only for requests that come later
    barren    guesses were wanted, and there were none
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from l4core.engine.inbox import Inbox
from l4core.engine.speculation.acceptance import Acceptance
from l4core.engine.speculation.pace_watch import BARREN, Breaks, Budget, Holes, Prompts, SteadySteps, Wish
from l4core.engine.speculation.step_times import StepTimes, VerifyCosts, batch_of, bucket_of
from l4core.request import NO_GUESSES, SLOWER, StepStats

TAKE, KEEP = 1.10, 1.06
"""Times the tokens of plain steps that guessing must bring before it is taken up, and to be kept up. More than 1 for what no step shows: an
answer ends in the middle of its last guesses, and no step is launched behind a prompt whose token is waited for."""
CLOSE, CLOSE_IN_CROWD, CROWD = 1.15, 1.5, 4
"""Where guessing seems to bring less, for one to three sequences and for so many, plain steps are timed without the draft too before it goes on."""
REFRESH, HOLD = 400, 5
"""Speculating steps, after which so many plain ones keep their time true."""
HALF = 0.5
"""Sequences for which guesses can be made, of those that run, before they are made."""
PATIENCE = 40
"""Steps for which a draft reads along in vain, because each had a prompt in it and none could be timed."""
TRIAL, TRIAL_STEPS = 24, 6
"""Drafts for which a pause is broken off, and steps at least: after …"""
REST, LONGEST_REST = 1024, 16384
"""… so many plain steps, twice as many after each trial in vain."""

logger = logging.getLogger(__name__)

TRAINED = (
    "a draft that fits has 50 to 80 %. Was it trained for this model and template? Does it read the layers it was trained on (the start-up block "
    "names them; --speculative-option aux_layers=…)? Is this its kind of text (a chat-only draft is of little use on /v1/completions)?"
)
UNTRAINED = "it is of no use for this kind of text"


HELD, RELEASED = Wish(0), Wish(0, reads=False)


class DraftPace:
    """`stamp` what goes into a step, `observe` what came out. num_pauses: times that guessing stopped being worth it.  costs: by bytes."""

    def __init__(
        self,
        name: str,
        max_drafts: int,
        costs: VerifyCosts,
        clock: Callable[[], float] = time.perf_counter,
        *,
        max_running: int,
        fixed: bool = False,
        reads: bool = True,
        advice: str = TRAINED,
    ) -> None:
        """clock: seconds.  max_running: sequences of the largest batch.  fixed: guess always; a draft that is wrong is named all the same.  reads: it
        guesses only for sequences of which it has read all that the target computed.  advice: what to say of a wrong one."""
        self.num_pauses, self.costs = 0, costs
        self._fixed, self._reads, self._advice = fixed, reads, advice
        self._name, self._max, self._clock = name, max_drafts, clock
        self._max_running = max_running
        self._acceptance = Acceptance(max_drafts)
        self._times = StepTimes(costs, max_drafts)
        self._steady = SteadySteps()
        self._breaks = Breaks()
        self._prompts = Prompts(costs.share_of_prompt())
        self._since: float | None = None
        self._wish = Wish(max_drafts)
        self._num_running = 0
        self._holes, self._arrived = Holes(), False
        self._paused: dict[int, bool] = {}
        self._share: dict[int, float] = {}
        self._num_held = self._hold = self._since_plain = 0
        self._budget, self._was_spent = Budget(), False
        self._trial = self._trial_steps = self._rested = 0
        self._rest = REST
        self._warned = False
        self._pause = ""

    def stamp(self, inbox: Inbox) -> Inbox:
        """The same inbox with what is wanted of the draft. Call it just before the step."""
        if self._fixed:
            return inbox
        if self._since is None:
            self._since = self._clock()
        self._arrived = bool(inbox.requests)
        if self._arrived:
            self._breaks.end()
            self._prompts.weigh()
        self._holes.come(len(inbox.requests))
        bucket = bucket_of(min(self._num_running + len(inbox.requests), self._max_running))
        self._wish = self._choose(bucket)
        return replace(inbox, num_drafts=self._wish.num_drafts, draft_reads=self._wish.reads)

    def observe(self, stats: StepStats, *, busy: bool) -> None:
        """Call it just after the step. busy: there is a next one at once, so the time until its end belongs to it."""
        now = self._clock()
        began, self._since = self._since, now if busy else None
        if stats.drafted_at:
            self._acceptance.add(stats.drafted_at, stats.accepted_at)
            self._warn()
        self._num_running = stats.num_running
        self._holes.count(stats, is_read=self._wish != RELEASED or not self._reads)
        if self._fixed:
            return
        ms = 0.0 if began is None else (now - began) * 1e3
        self._prompts.count(ms, self._arrived or stats.num_prefill_tokens > 0)
        self._account(stats, ms)
        for bucket, kind, took in self._steady.add(stats, self._wish, ms, busy=busy):
            self._times.learn(bucket, kind, took)
        if stats.num_decode_tokens:
            self._count(stats, ms)

    def take_pause(self) -> str:
        """Why guessing paused since the last call: one of DRAFT_PAUSES, "" = it did not."""
        pause, self._pause = self._pause, ""
        return pause

    # --- counts ------------------------------------------------------------------------------------------------------------------------

    def _count(self, stats: StepStats, ms: float) -> None:
        made, wanted, decodes = len(stats.drafted_at), self._wish.num_drafts, stats.num_decode_tokens
        if self._breaks.count(made, wanted, alone=not stats.num_prefill_tokens):
            self._pause = NO_GUESSES
            self._say_barren()
        bucket = bucket_of(decodes)
        if made:
            share = min(1.0, stats.drafted_at[0] / max(1, decodes - self._holes.num))
            self._share[bucket] = share + 0.9 * (self._share.get(bucket, share) - share)
        self._since_plain = self._since_plain + 1 if made else 0
        self._hold -= self._hold > 0 and not made
        self._num_held = 0 if wanted else self._num_held + (self._wish == HELD)
        self._rested += self._wish == RELEASED
        if self._trial > 0 and wanted:
            self._try(sum(stats.drafted_at[:1]))

    def _try(self, num_drafted: int) -> None:
        """One step of a trial."""
        self._trial -= max(1, num_drafted)
        self._trial_steps += 1
        if self._trial > 0 or self._trial_steps < TRIAL_STEPS:
            self._trial = max(self._trial, 1)
            return
        self._trial, self._rest = 0, min(2 * self._rest, LONGEST_REST)

    def _account(self, stats: StepStats, ms: float) -> None:
        """Of one step, in plain ones: what it took, and what it was worth."""
        decodes, reads = stats.num_decode_tokens, self._wish != RELEASED
        bucket = bucket_of(decodes or self._num_running)
        if not self._times.knows_plain(bucket):
            return
        took = self._times.plain_steps(bucket, ms)
        if self._arrived or stats.num_prefill_tokens:
            self._budget.spend(took, took * (1.0 - self._prompts.share * reads))
        elif decodes:
            self._budget.spend(took, 1.0 + sum(stats.accepted_at) / decodes if reads else took)

    # --- the choice --------------------------------------------------------------------------------------------------------------------

    def _choose(self, bucket: int) -> Wish:
        if not bucket:
            return self._wish
        if self._is_spent() or self._breaks.left:
            return RELEASED
        if self._holes.num:
            return self._fill_holes(bucket)
        return self._choose_whole(bucket)

    def _fill_holes(self, bucket: int) -> Wish:
        """The draft has not read some of those that run. Who comes is read, if guessing would pay, until it is worth guessing for them."""
        running = max(1, min(self._num_running + self._holes.coming, self._max_running))
        whole = max(0, running - self._holes.num) / running
        if not whole and not self._holes.coming and self._paused.get(bucket):
            return RELEASED  # as all through a pause: nothing to think about
        wish = self._choose_whole(bucket)
        if wish.num_drafts and whole >= HALF:
            return wish
        return HELD if wish != RELEASED and (whole or self._holes.coming) else RELEASED

    def _choose_whole(self, bucket: int) -> Wish:
        """As if the draft had read all."""
        best, found = 0, self._find_out(bucket)
        if found is None:
            best = self._best(bucket)
            found = self._try_out(bucket, best)
        if found is not None:
            return found if self._budget.allows_trying else RELEASED
        if self._paused.get(bucket) and self._wish.num_drafts and not self._arrived:
            return self._go_on(bucket)
        self._note(bucket, best)
        if best and self._since_plain >= REFRESH:
            self._hold = HOLD
        return RELEASED if not best else HELD if self._hold else Wish(best)

    def _find_out(self, bucket: int) -> Wish | None:
        """What is to be done to know what plain steps take and guesses are worth, in a pause now and then. None = it is known."""
        if not self._times.knows_plain(bucket):
            return HELD if self._num_held < PATIENCE else RELEASED
        self._num_held = 0
        if not self._acceptance.is_sure:
            return Wish(self._max)
        if self._paused.get(bucket) and self._is_tried():
            return Wish(self._untimed(bucket) or self._most_gained(bucket, range(1, self._max + 1)))
        return None

    def _try_out(self, bucket: int, best: int) -> Wish | None:
        """What is to be done to know whether `best` guesses pay, where nothing was decided yet. None = it is known."""
        if not best or bucket in self._paused:
            return None
        if best not in self._times.known(bucket):
            return Wish(self._untimed(bucket) or best)
        return RELEASED if not self._times.knows_free(bucket) and self._is_close(bucket, best) else None

    def _go_on(self, bucket: int) -> Wish:
        """In a pause, with sequences that are guessed for: what the draft has read of them is paid for, so they go on while they lose nothing."""
        best = self._most_gained(bucket, self._times.known_nearby(bucket) or [self._wish.num_drafts])
        if self._gain(bucket, best) >= TAKE + self._prompts.cost:
            self._note(bucket, best)
        return Wish(best) if self._gain(bucket, best) >= 1.0 else RELEASED

    def _is_spent(self) -> bool:
        """Says so when it is, for once."""
        before, self._was_spent = self._was_spent, self._budget.is_spent
        if self._was_spent and not before:
            self.num_pauses += 1
            self._pause = SLOWER
            logger.info(
                "speculation (%s) pauses: it has lost time (right at depth %s)", self._name, self._acceptance.text()
            )
        return self._was_spent

    def _untimed(self, bucket: int) -> int:
        """What was wanted last, as long as it is not timed: another number each step would time none. 0 = it is, or none was."""
        before = self._wish.num_drafts
        return 0 if before in self._times.known(bucket) else before

    def _is_tried(self) -> bool:
        """Whether a pause is broken off now. A draft that reads can guess only for those who come."""
        if self._trial <= 0 and self._rested >= self._rest and (self._arrived or not self._reads):
            self._trial, self._trial_steps, self._rested = TRIAL, 0, 0
            self._share.clear()
            self._acceptance.doubt()
        return self._trial > 0

    def _best(self, bucket: int) -> int:
        """0 = none. What was not timed is tried where it is expected to pay, unless only a smaller batch was timed and none pays by that. Who comes
        will be in a smaller batch before long: where it is known not to pay there, it does not pay to begin."""
        wanted = self._wanted(bucket)
        known = self._times.known(bucket)
        nearby = [] if known else self._times.known(bucket - 1)
        if nearby and all(self._gain(bucket, k) < wanted for k in nearby):
            return 0
        later = self._times.known(bucket - 1) if self._arrived else []
        if later and all(self._gain(bucket - 1, k) < wanted for k in later):
            return 0
        best = self._most_gained(bucket, range(1, self._max + 1))
        return best if self._gain(bucket, best) >= wanted else 0

    def _wanted(self, bucket: int) -> float:
        """Gain. What sequences under way have cost in prompts is spent: to let them go on without guesses would not bring it back."""
        if self._wish.num_drafts and not self._arrived and not self._paused.get(bucket, True):
            return 1.0
        return (KEEP if self._paused.get(bucket) is False else TAKE) + self._prompts.cost

    def _most_gained(self, bucket: int, numbers: Iterable[int]) -> int:
        return max(numbers, key=lambda k: self._gain(bucket, k))

    def _is_close(self, bucket: int, num_drafts: int) -> bool:
        return self._gain(bucket, num_drafts) < (CLOSE if batch_of(bucket) < CROWD else CLOSE_IN_CROWD)

    def _gain(self, bucket: int, num_drafts: int) -> float:
        """Tokens a millisecond, as a multiple of a plain step's."""
        return self._length(bucket, num_drafts) / self._times.slowdown(bucket, num_drafts)

    def _length(self, bucket: int, num_drafts: int) -> float:
        """Tokens a sequence gains in a step; not each may have guesses."""
        return 1.0 + self._share.get(bucket, 1.0) * (self._acceptance.length(num_drafts) - 1.0)

    # --- what it says ------------------------------------------------------------------------------------------------------------------

    def _note(self, bucket: int, best: int) -> None:
        pauses = best == 0
        before = self._paused.get(bucket, False)
        self._paused[bucket] = pauses
        if before is pauses:
            return
        self.num_pauses += pauses
        self._pause = SLOWER if pauses else self._pause
        self._rest = self._rest if pauses else REST
        k = best or self._most_gained(bucket, self._times.known_nearby(bucket) or range(1, self._max + 1))
        logger.info(
            "speculation (%s) %s at about %d sequences: %d guesses bring %.2f tokens a step in %.2f times a plain step's time (right at depth %s)",
            self._name,
            "pauses" if pauses else "goes on",
            batch_of(bucket),
            k,
            self._length(bucket, k),
            self._times.slowdown(bucket, k),
            self._acceptance.text(),
        )

    def _say_barren(self) -> None:
        """Once: text that repeats nothing, or contexts beyond the draft's, come and go."""
        if self._breaks.num == 1:
            logger.info(
                "speculation (%s) found nothing to guess in %d steps in a row; it is asked less often until it does",
                self._name,
                BARREN,
            )

    def _warn(self) -> None:
        if self._warned or not self._acceptance.is_wrong:
            return
        self._warned = True
        logger.warning(
            "speculation (%s): %.0f %% of first guesses are right; %s",
            self._name,
            100 * self._acceptance.first,
            self._advice,
        )
