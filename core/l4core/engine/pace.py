"""Measures what steps take and tells the scheduler, which reads no clock: one `Pace` beside the loop that steps the engine (on rank 0)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from l4core.engine.inbox import Inbox
from l4core.engine.schedule.step_costs import MIN_PREFILL_TOKENS, StepCosts
from l4core.engine.speculation.draft_pace import DraftPace
from l4core.request import StepOutput, StepStats

FIRST_PREFILL_TOKENS = 256
"""Where nothing is known yet. A step has at most twice the prompt tokens of the one before."""
MEMORY = 0.97
"""Weight of a step after one more: half of what is known comes from the last 23."""
OWN_UNITS = (1.0, 64.0)
"""Steps and decodes …"""
PIECE_UNITS = (1024.0, 1024.0 * 8192.0)
"""… and prompt tokens and scores that cost one unknown each: all of them then lie between 0.1 and 100 ms."""
DRIFT = 8
SWEEPS = 8


class Stepped(Protocol):
    """What is paced; `engine.engine.Engine` is one."""

    @property
    def has_work(self) -> bool: ...
    def step(self, inbox: Inbox) -> StepOutput: ...


def paced(engine: Stepped, target_ms: float | None, drafts: DraftPace | None = None) -> Callable[[Inbox], StepOutput]:
    """`engine.step`, with its steps measured, the target kept where there is one and guesses made where they pay. For a loop that calls it whenever
    the engine has work."""
    paces = [pace for pace in (None if target_ms is None else Pace(target_ms), drafts) if pace is not None]
    if not paces:
        return engine.step

    def step(inbox: Inbox) -> StepOutput:
        for pace in paces:
            inbox = pace.stamp(inbox)
        output = engine.step(inbox)
        for pace in paces:
            pace.observe(output.stats, busy=engine.has_work)
        pause = "" if drafts is None else drafts.take_pause()
        return replace(output, stats=replace(output.stats, draft_pause=pause)) if pause else output

    return step


class Pace:
    """`stamp` what goes into a step and `observe` what came out; in between, costs are fitted to what steps took.

    Steps without a prompt tell what decodes cost. What a step with one takes beyond that is put down to its prompt tokens, all of it: a step may
    have a cost of its own besides (prompts hit experts that decodes do not), but a length is chosen that gave the target, whatever it is made of.
    """

    def __init__(self, target_ms: float, clock: Callable[[], float] = time.perf_counter) -> None:
        """target_ms: wanted between two tokens of a request.  clock: seconds."""
        self._target_ms, self._clock = target_ms, clock
        self._since: float | None = None
        self._own, self._pieces = Fit(OWN_UNITS, patience=2), Fit(PIECE_UNITS, patience=6)
        self._num_decodes = 0
        self._most = FIRST_PREFILL_TOKENS

    def stamp(self, inbox: Inbox) -> Inbox:
        """The same inbox with what is known of costs. Call it just before the step."""
        if self._since is None:
            self._since = self._clock()
        return replace(inbox, step_costs=self.costs())

    def observe(self, stats: StepStats, *, busy: bool) -> None:
        """Call it just after the step. busy: there is a next one at once, so the time until its end belongs to it."""
        now = self._clock()
        began, self._since = self._since, now if busy else None
        if began is None:
            return
        ms, tokens, decodes = (now - began) * 1e3, stats.num_prefill_tokens, stats.num_decode_tokens
        own = (1, decodes)
        if not tokens:
            if decodes:
                self._own.add(own, ms)
        elif self._pieces.add((tokens, stats.num_prefill_scores), ms, beside=self._own.expected(own)):
            self._most = max(MIN_PREFILL_TOKENS, int(0.8 * self._most), 2 * tokens)
            self._num_decodes = decodes

    def costs(self) -> StepCosts:
        """What is known now. The target is lowered by three times the usual error of the prediction; by half of what is left for prompts at most,
        since most of a restless machine's errors come whatever prompts do."""
        (base_ms, decode_ms), (token_ms, score_ms) = self._own.coefficients, self._pieces.coefficients
        room_ms = max(0.0, self._target_ms - base_ms - decode_ms * self._num_decodes)
        return StepCosts(
            target_ms=self._target_ms - min(3 * self._pieces.error_ms, room_ms / 2),
            base_ms=base_ms,
            decode_ms=decode_ms,
            token_ms=token_ms,
            score_ms=score_ms,
            max_prefill_tokens=self._most,
        )


class Fit:
    """Least squares with coefficients ≥ 0 over steps whose weight fades: the normal equations, and a few sweeps of coordinate descent from the
    last solution. What recent steps cannot tell apart keeps the split it had. error_ms: usual error of a prediction.
    """

    def __init__(self, units: Sequence[float], patience: int) -> None:
        """patience: slow steps in a row that are taken for accidents."""
        self._units, self._patience = units, patience
        self._known, self._strange, self._drift = False, 0, 0
        self._forget()

    @property
    def coefficients(self) -> tuple[float, ...]:
        """ms for one of each feature."""
        return tuple(value / unit for value, unit in zip(self._solution, self._units, strict=True))

    def expected(self, features: Sequence[float]) -> float:
        """ms."""
        return sum(a * b for a, b in zip(self.coefficients, features, strict=True))

    def add(self, features: Sequence[float], ms: float, *, beside: float = 0.0) -> bool:
        """Learn from one step → whether it counted. beside: ms of it that are known to be for something else.

        One that took over twice what was expected (a kernel being compiled, a stalled machine) is let go, `patience` times in a row. If that goes
        on, what was known is no longer so: costs double with each such step until they fit. One that took less than half says so at once, for
        nothing makes a step too fast; and so do DRIFT steps in a row that all took longer, or all shorter, by more than a tenth.
        """
        expected = beside + self.expected(features)
        if self._known and ms > 2 * expected:
            self._strange += 1
            if self._strange <= self._patience:
                return False
            self._forget()
            ms = 2 * expected
        elif self._known:
            self._strange = 0
            if ms < expected / 2 or self._drifts(ms / expected):
                self._forget()
            else:
                self.error_ms += 0.1 * (abs(ms - expected) - self.error_ms)
        self._known = True
        self._learn([value / unit for value, unit in zip(features, self._units, strict=True)], max(0.0, ms - beside))
        return True

    def _drifts(self, ratio: float) -> bool:
        """ratio: of what a step took to what was expected."""
        side = (ratio > 1.1) - (ratio < 1 / 1.1)
        self._drift = 0 if not side else self._drift + side if self._drift * side > 0 else side
        return abs(self._drift) >= DRIFT

    def _forget(self) -> None:
        self._drift = 0
        num = len(self._units)
        self._solution, self._right = [0.0] * num, [0.0] * num
        self._matrix = [[0.0] * num for _ in range(num)]
        self.error_ms = 0.0

    def _learn(self, x: Sequence[float], ms: float) -> None:
        for i, row in enumerate(self._matrix):
            self._right[i] = MEMORY * self._right[i] + x[i] * ms
            for j in range(len(x)):
                row[j] = MEMORY * row[j] + x[i] * x[j]
        solution = self._solution
        for _ in range(SWEEPS):
            for i, row in enumerate(self._matrix):
                if row[i] > 1e-12:
                    rest = sum(a * b for a, b in zip(row, solution, strict=True)) - row[i] * solution[i]
                    solution[i] = max(0.0, (self._right[i] - rest) / row[i])
