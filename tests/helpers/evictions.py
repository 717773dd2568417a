"""Evictions at chosen times: pools small enough for them by chance let some tests pass without one."""

from __future__ import annotations

from typing import Any

from l4core.engine.engine import EMPTY, Engine
from l4core.engine.inbox import Inbox
from l4core.request import StepOutput


def evict_every(engine: Engine, steps: int) -> list[str]:
    """Before every so many steps the worst of several running requests is preempted, as one of higher priority would do, a batch in flight or not.
    → ids of those that were, while the engine is stepped."""
    evicted: list[str] = []
    step, scheduler, count = engine.step, engine.scheduler, 0

    def stepped(inbox: Inbox = EMPTY) -> StepOutput:
        nonlocal count
        count += 1
        if count % steps == 0 and len(scheduler._running) > 1:
            victim = scheduler._running.last
            scheduler._preempt(victim)
            evicted.append(victim.request.request_id)
        return step(inbox)

    owner: Any = engine
    owner.step = stepped
    return evicted
