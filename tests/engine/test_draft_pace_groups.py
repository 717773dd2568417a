"""Groups of requests on machines whose steps take what they were measured to take: with a draft never slower than 0.98 times without.

The demo checkpoint and its draft, 30 small layers: a device that waits for launches, one that computes in float32, two CPU cores. Decisions are
made as in earnest; the loop, its tokens and its clock are made up. Measured by benchmarks/cpu/speculation_steps.py.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any, Protocol

import pytest

from helpers.bare_request import bare_request
from l4core.engine.inbox import Inbox
from l4core.engine.speculation.draft_pace import DraftPace
from l4core.engine.speculation.step_times import VerifyCosts
from l4core.request import StepStats

MAX = 3
COSTS = VerifyCosts(fixed=379e6, expert=159e6, num_experts=4, draft=52e6)
RIGHT = 0.62
"""Share of guesses that are right where those before were; a sequence's own differs by SPREAD at most."""
SPREAD = 0.2


@dataclass(frozen=True)
class Machine:
    """Milliseconds, by sequences. plain: a step without the draft.  reading: in which it reads along.  waiting: with nothing to guess, while tokens
    are waited for.  guessing: with 1, 2, … guesses.  prompts: of a group.  draft_prompts: what the draft adds to them.  ahead: one step is launched
    while another is waited for."""

    plain: Mapping[int, float]
    reading: Mapping[int, float]
    waiting: Mapping[int, float]
    guessing: Mapping[int, Sequence[float]]
    prompts: Mapping[int, float]
    draft_prompts: Mapping[int, float]
    ahead: bool


BFLOAT16 = Machine(
    plain={1: 0.74, 4: 0.83, 8: 0.85, 16: 0.89},
    reading={1: 0.87, 4: 0.89, 8: 0.90, 16: 1.11},
    waiting={1: 1.09, 4: 1.22, 8: 1.41, 16: 1.61},
    guessing={1: [1.36, 1.37, 1.39], 4: [1.48, 1.51, 1.57], 8: [1.78, 2.11, 2.01], 16: [2.06, 2.06, 2.06]},
    prompts={1: 16, 4: 18, 8: 19, 16: 20},
    draft_prompts={1: 2.5, 4: 2.8, 8: 2.8, 16: 3.0},
    ahead=True,
)
FLOAT32 = Machine(
    plain={1: 2.88, 4: 4.02, 8: 4.14, 16: 4.40},
    reading={1: 2.95, 4: 4.16, 8: 4.27, 16: 4.57},
    waiting={1: 3.27, 4: 5.01, 8: 4.68, 16: 5.12},
    guessing={1: [4.12, 4.59, 4.67], 4: [5.03, 5.14, 5.18], 8: [5.22, 9.59, 9.80], 16: [10.1, 10.1, 10.1]},
    prompts={1: 17, 4: 18, 8: 19, 16: 22},
    draft_prompts={1: 2.5, 4: 2.8, 8: 2.8, 16: 3.0},
    ahead=True,
)
CPU = Machine(
    plain={1: 46, 4: 64.7, 8: 82.3, 16: 101.4},
    reading={1: 48.4, 4: 69.7, 8: 85.0, 16: 104.5},
    waiting={1: 48.4, 4: 69.9, 8: 87.6, 16: 104.5},
    guessing={1: [61.2, 71.0, 77.0], 4: [90.5, 107, 125], 8: [122, 152, 182], 16: [188, 245, 292]},
    prompts={1: 107, 4: 230, 8: 414, 16: 771},
    draft_prompts={1: 5, 4: 24, 8: 30, 16: 60},
    ahead=False,
)


@pytest.mark.parametrize("machine", [BFLOAT16, FLOAT32, CPU], ids=["bfloat16", "float32", "cpu"])
@pytest.mark.parametrize("batch", [1, 4, 8, 16])
def test_never_slower(machine: Machine, batch: int) -> None:
    """After two rounds of questions, over eight."""
    ratios = [Served(machine, seed).rounds(batch, skipped=2, counted=8) for seed in range(8)]
    assert mean(ratios) >= 0.98
    assert min(ratios) >= 0.93


@pytest.mark.parametrize(("machine", "batch"), [(FLOAT32, 1), (FLOAT32, 4), (CPU, 1), (CPU, 4)])
def test_faster_where_it_pays(machine: Machine, batch: int) -> None:
    best = 1.2 if machine is FLOAT32 or batch == 1 else 1.04
    assert mean(Served(machine, seed).rounds(batch, skipped=2, counted=8) for seed in range(8)) >= best


class Paced(Protocol):
    def stamp(self, inbox: Inbox) -> Inbox: ...
    def observe(self, stats: StepStats, *, busy: bool) -> None: ...


class Off:
    """Never a guess."""

    def stamp(self, inbox: Inbox) -> Inbox:
        return Inbox(requests=inbox.requests, num_drafts=0, draft_reads=False)

    def observe(self, stats: StepStats, *, busy: bool) -> None:
        pass


@dataclass(frozen=True)
class Batch:
    """guesses: by sequence that decodes; prompts: it computes those instead.  is_read: by the draft."""

    guesses: Mapping[int, int] = field(default_factory=dict)
    prompts: int = 0
    is_read: bool = False

    @property
    def is_verified(self) -> bool:
        return any(self.guesses.values())


class Served:
    """One engine with a draft, which answers group after group."""

    def __init__(self, machine: Machine, seed: int) -> None:
        self.machine, self.random, self.ms = machine, random.Random(seed), 0.0
        self.pace = DraftPace("test", MAX, COSTS, clock=lambda: self.ms / 1e3, max_running=16)

    def rounds(self, batch: int, *, skipped: int, counted: int) -> float:
        """Eight questions or one group of `batch` a round → tokens a second, over those without a draft."""
        took = {"draft": 0.0, "plain": 0.0}
        for number in range(skipped + counted):
            for _ in range(max(1, 8 // batch)):
                lengths = [self.random.choice([9, 16, 30, 64, 64, 64]) for _ in range(batch)]
                paces: Mapping[str, Paced] = {"draft": self.pace, "plain": Off()}
                for name, pace in paces.items():
                    began = self.ms
                    Group(self, lengths, pace).run()
                    took[name] += (self.ms - began) * (number >= skipped)
        return took["plain"] / took["draft"]

    def noise(self) -> float:
        return self.random.uniform(0.96, 1.04) * (self.random.uniform(1, 5) if self.random.random() < 0.01 else 1.0)


class Group:
    """Requests that come together to an idle engine. left: tokens of each that are still to come."""

    def __init__(self, served: Served, lengths: Sequence[int], pace: Paced) -> None:
        self.served, self.machine, self.pace = served, served.machine, pace
        self.left, self.num = list(lengths), len(lengths)
        self.right = [RIGHT + served.random.uniform(-SPREAD, SPREAD) for _ in lengths]
        self.is_new, self.has_holes = True, False
        self.in_flight: Batch | None = None

    def run(self) -> None:
        while self.step():
            pass

    def step(self) -> bool:
        """→ whether there is a next one."""
        requests = [bare_request(str(n)) for n in range(self.num)] if self.is_new else []
        inbox = self.pace.stamp(Inbox(requests=requests))
        guesses, reads = inbox.num_drafts or 0, bool(inbox.num_drafts or inbox.draft_reads)
        self.has_holes |= not reads
        waits = guesses > 0 or (self.in_flight is not None and self.in_flight.is_verified)
        if not self.machine.ahead:
            done = self.launch(guesses, reads)
            ms, counts = self.cost(done, waits), self.take(done)
        elif waits:
            done = self.in_flight
            ms, counts = self.cost(done, waits), self.take(done)
            self.in_flight = self.launch(guesses, reads)
            ms += self.launching(self.in_flight)
        else:
            done, self.in_flight = self.in_flight, self.launch(guesses, reads)
            ms, counts = self.launching(self.in_flight) + self.cost(done, waits), self.take(done)
        self.served.ms += ms
        num_running = sum(left > 0 for left in self.left)
        busy = num_running > 0 or self.in_flight is not None
        self.pace.observe(StepStats(num_running=num_running, **counts), busy=busy)
        return busy

    def launch(self, guesses: int, reads: bool) -> Batch | None:
        if self.is_new:
            self.is_new = False
            return Batch(prompts=self.num, is_read=reads)
        wanted = {i: 0 if self.has_holes else min(guesses, left) for i, left in enumerate(self.left) if left > 0}
        return Batch(guesses=wanted, is_read=reads) if wanted else None

    def launching(self, batch: Batch | None) -> float:
        """Prompts are launched for longer than they are waited for."""
        if batch is None or not batch.prompts:
            return 0.0
        return _near(self.machine.prompts, self.num) + batch.is_read * _near(self.machine.draft_prompts, self.num)

    def cost(self, batch: Batch | None, waits: bool) -> float:
        if batch is None:
            return 0.0
        if batch.prompts:
            return 0.4 if self.machine.ahead else self.launching(batch)
        most, num = max(batch.guesses.values()), len(batch.guesses)
        if most:
            return self.served.noise() * _near(self.machine.guessing, num)[most - 1]
        machine = self.machine
        times = machine.waiting if waits else machine.reading if batch.is_read else machine.plain
        return self.served.noise() * _near(times, num)

    def take(self, batch: Batch | None) -> dict[str, Any]:
        """Its tokens → what the step counts."""
        if batch is None:
            return {}
        if batch.prompts:
            return {"num_prefill_tokens": 20 * batch.prompts}
        drafted, accepted, decodes = [0] * MAX, [0] * MAX, 0
        for i, guesses in batch.guesses.items():
            if self.left[i] <= 0:
                continue
            wrong = (n for n in range(guesses) if self.served.random.random() >= self.right[i])
            right = next(wrong, guesses)
            decodes += 1
            self.left[i] -= 1 + right
            for depth in range(guesses):
                drafted[depth] += 1
                accepted[depth] += depth < right
        depth = sum(count > 0 for count in drafted)
        return {
            "num_decode_tokens": decodes,
            "drafted_at": tuple(drafted[:depth]),
            "accepted_at": tuple(accepted[:depth]),
        }


def _near(times: Mapping[int, Any], num: int) -> Any:
    sizes = sorted(times)
    return times[sizes[min(bisect_left(sizes, num), len(sizes) - 1)]]
