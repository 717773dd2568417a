"""Guessing that pays is kept up, or comes back, whatever the traffic: bursts larger than a batch, closed loops, requests as they come."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from helpers.bare_request import bare_request
from l4core.engine.inbox import Inbox
from l4core.engine.speculation.draft_pace import DraftPace
from l4core.engine.speculation.step_times import VerifyCosts
from l4core.request import StepStats

MAX = 3
COSTS = VerifyCosts(fixed=100.0, expert=0.0, num_experts=0, draft=3.0)
Arrivals = Callable[[int, int], int]
"""(step, requests that run or wait) → requests that come."""


class Server:
    """Sequences of 150 to 450 tokens, whose prompts are computed in the step that admits them. A plain step takes 10 ms, one in which the draft reads
    3 % more, a guess `cost` plain steps; a guess is right with probability `right`, for sequences of which the draft has read all."""

    def __init__(self, max_running: int, cost: float, right: float, seed: int) -> None:
        self.random, self.now, self.max_running = random.Random(seed), 0.0, max_running
        self.cost, self.right = cost, right
        self.pace = DraftPace("test", MAX, COSTS, clock=lambda: self.now, max_running=max_running)
        self.waiting, self.running = 0, list[list[int]]()  # [tokens left, whether all was read]
        self.guessing = list[bool]()

    def run(self, steps: int, arrivals: Arrivals) -> list[bool]:
        """→ of each step that decoded, whether most sequences were guessed for."""
        for step in range(steps):
            come = arrivals(step, len(self.running) + self.waiting)
            if come or self.running or self.waiting:
                self.step(come)
        return self.guessing

    def step(self, come: int) -> None:
        inbox = self.pace.stamp(Inbox(requests=[bare_request()] * come))
        guesses, reads = inbox.num_drafts or 0, bool(inbox.num_drafts or inbox.draft_reads)
        decodes, drafted, accepted = len(self.running), [0] * MAX, [0] * MAX
        for sequence in self.running:
            sequence[1] &= reads
            right = 0
            if guesses and sequence[1]:
                right = next((i for i in range(guesses) if self.random.random() >= self.right), guesses)
                for depth in range(guesses):
                    drafted[depth] += 1
                    accepted[depth] += depth < right
            sequence[0] -= 1 + right
        made = drafted[0]
        self.running = [sequence for sequence in self.running if sequence[0] > 0]
        admitted = min(self.waiting + come, self.max_running - len(self.running))
        self.waiting += come - admitted
        self.running += [[self.random.randint(150, 450), reads] for _ in range(admitted)]
        took = 1.0 + self.cost * guesses if made else 1.03 if reads else 1.0
        self.now += (1e-2 * took + 5e-3 * admitted) * self.random.uniform(0.99, 1.01)
        stats = StepStats(
            num_running=len(self.running),
            num_waiting=self.waiting,
            num_decode_tokens=decodes,
            num_prefill_tokens=100 * admitted,
            drafted_at=tuple(drafted[:guesses]) if made else (),
            accepted_at=tuple(accepted[:guesses]) if made else (),
        )
        self.pace.observe(stats, busy=bool(self.running or self.waiting))
        if decodes:
            self.guessing.append(2 * made > decodes)


@pytest.mark.parametrize("max_running", [1, 4, 32])
@pytest.mark.parametrize("cost", [0.06, 0.12])
def test_a_burst_larger_than_a_batch(max_running: int, cost: float) -> None:
    """Those who wait are new to the draft, too."""
    server = Server(max_running, cost, right=0.7, seed=0)
    guessing = server.run(4000, lambda step, _: 30 * max_running if step == 0 else 0)
    assert sum(guessing) > 0.9 * len(guessing)


@pytest.mark.parametrize("max_running", [4, 16, 64])
@pytest.mark.parametrize(("cost", "seed"), [(0.06, 0), (0.06, 1), (0.3, 0), (0.3, 1)])
def test_a_closed_loop(max_running: int, cost: float, seed: int) -> None:
    """At 0.3 plain steps a guess, three bring about 5 %, or two 12: what plain steps take is looked at first, and newcomers are waited for."""
    server = Server(max_running, cost, right=0.62, seed=seed)
    guessing = server.run(6000, lambda _, live: max_running - live)
    assert sum(guessing[-2000:]) > 1900


def test_requests_that_come_as_they_like() -> None:
    server, coin = Server(64, 0.1, right=0.62, seed=2), random.Random(3)
    guessing = server.run(8000, lambda *_: int(coin.random() < 0.07) + int(coin.random() < 0.03))
    assert sum(guessing[-4000:]) > 3800


def test_what_does_not_pay_stays_away_in_a_closed_loop() -> None:
    server = Server(16, 0.6, right=0.62, seed=0)
    guessing = server.run(8000, lambda _, live: 16 - live)
    assert sum(guessing) < 80
