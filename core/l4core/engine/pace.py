"""Measures what steps take and tells the scheduler, which reads no clock: one `Pace` beside the loop that steps the engine (on rank 0)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from l4core.engine.batch import Inbox
from l4core.engine.step_costs import MIN_PREFILL_TOKENS, StepCosts
from l4core.request import StepOutput, StepStats

FIRST_PREFILL_TOKENS = 256
"""Where nothing is known yet; the limit doubles with every step that computed that many."""
MEMORY = 0.97
"""Weight of a step after one more: half of what is known comes from the last 23."""
UNITS = (1.0, 1024.0, 1024.0 * 8192.0, 64.0)
"""Steps, prompt tokens, scores and decodes that cost one unknown each: all four then lie between 0.1 and 100 ms."""
SWEEPS = 8


class Stepped(Protocol):
    """What is paced; `engine.engine.Engine` is one."""

    @property
    def has_work(self) -> bool: ...
    def step(self, inbox: Inbox) -> StepOutput: ...


def paced(engine: Stepped, target_ms: float | None) -> Callable[[Inbox], StepOutput]:
    """`engine.step`, with its steps measured and the target kept where there is one. For a loop that calls it whenever the engine has work."""
    if target_ms is None:
        return engine.step
    pace = Pace(target_ms)

    def step(inbox: Inbox) -> StepOutput:
        output = engine.step(pace.stamp(inbox))
        pace.observe(output.stats, busy=engine.has_work)
        return output

    return step


class Pace:
    """`stamp` what goes into a step and `observe` what came out; in between, costs are fitted to the steps that had prompts in them.

    Steps of decodes alone do not count: they read fewer experts.
    """

    def __init__(self, target_ms: float, clock: Callable[[], float] = time.perf_counter) -> None:
        """target_ms: wanted between two tokens of a request.  clock: seconds."""
        self._target_ms, self._clock = target_ms, clock
        self._since: float | None = None
        self._fit = Fit()
        self._error_ms = 0.0

    def stamp(self, inbox: Inbox) -> Inbox:
        """The same inbox with what is known of costs. Call it just before the step."""
        if self._since is None:
            self._since = self._clock()
        return replace(inbox, step_costs=self.costs())

    def observe(self, stats: StepStats, *, busy: bool) -> None:
        """Call it just after the step. busy: there is a next one at once, so the time until its end belongs to it."""
        now = self._clock()
        began, self._since = self._since, now if busy else None
        if began is None or not stats.num_prefill_tokens:
            return
        features = (1, stats.num_prefill_tokens, stats.num_prefill_scores, stats.num_decode_tokens)
        error_ms = self._fit.add(features, (now - began) * 1e3)
        if error_ms is not None:
            self._error_ms = 0.9 * self._error_ms + 0.1 * error_ms

    def costs(self) -> StepCosts:
        """What is known now. The target is lowered by three times the usual error of the prediction, by a half at most."""
        base_ms, token_ms, score_ms, decode_ms = self._fit.coefficients
        return StepCosts(
            target_ms=max(self._target_ms - 3 * self._error_ms, self._target_ms / 2),
            base_ms=base_ms,
            decode_ms=decode_ms,
            token_ms=token_ms,
            score_ms=score_ms,
            max_prefill_tokens=max(MIN_PREFILL_TOKENS, 2 * self._fit.largest)
            if self._fit.largest
            else FIRST_PREFILL_TOKENS,
        )


class Fit:
    """Least squares with coefficients ≥ 0 over steps whose weight fades: the normal equations, and a few sweeps of coordinate descent from the
    last solution. What recent steps cannot tell apart keeps the split it had. Whatever could be the step's own cost is taken for that first, so
    pieces grow until tokens are seen to cost something. largest: most prompt tokens in a step that is remembered.
    """

    def __init__(self) -> None:
        self._known = False
        self._strange = self.largest = 0
        self._solution, self._right = [0.0] * len(UNITS), [0.0] * len(UNITS)
        self._matrix = [[0.0] * len(UNITS) for _ in UNITS]

    @property
    def coefficients(self) -> tuple[float, ...]:
        """ms for one step, one prompt token, one score and one decode."""
        return tuple(value / unit for value, unit in zip(self._solution, UNITS, strict=True))

    def add(self, features: Sequence[float], ms: float) -> float | None:
        """Learn from one step → how far off the prediction was, in ms; None when there was none to judge.

        One that took over four times what was expected (a kernel being compiled, a stalled machine) is let go, and so is a second: a third in a
        row, or one that took less than a quarter, says that what was known is no longer so.
        """
        x = [value / unit for value, unit in zip(features, UNITS, strict=True)]
        expected = sum(a * b for a, b in zip(self._solution, x, strict=True))
        known = self._known
        if known and ms > 4 * expected and self._strange < 2:
            self._strange += 1
            return None
        if known and not expected / 4 <= ms <= 4 * expected:
            self._forget()
            known = False
        self._strange, self._known = 0, True
        self.largest = max(self.largest, int(features[1]))
        for i, row in enumerate(self._matrix):
            self._right[i] = MEMORY * self._right[i] + x[i] * ms
            for j in range(len(UNITS)):
                row[j] = MEMORY * row[j] + x[i] * x[j]
        self._solve()
        return abs(ms - expected) if known else None

    def _forget(self) -> None:
        fresh = Fit()
        self.largest, self._solution, self._right, self._matrix = 0, fresh._solution, fresh._right, fresh._matrix

    def _solve(self) -> None:
        solution = self._solution
        for _ in range(SWEEPS):
            for i, row in enumerate(self._matrix):
                if row[i] > 1e-12:
                    rest = sum(a * b for a, b in zip(row, solution, strict=True)) - row[i] * solution[i]
                    solution[i] = max(0.0, (self._right[i] - rest) / row[i])
