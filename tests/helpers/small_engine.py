"""A scheduler over made-up memory and draws, small enough that what it does is known, and what a test asks of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from l4core.engine.batch import ScheduledBatch, StepTokens
from l4core.kv.blocks import KVGroup
from l4core.request import Request, SamplingParams, SequenceUpdate
from l4core.testing.simulation import SimulatedEngine

GROUPS = (
    KVGroup(name="global", layer_ids=tuple(range(1, 17)), chunk_size=None),
    KVGroup(name="local", layer_ids=(0,), chunk_size=8),
)
"""A superpage is one global page, or all local pages of a chunk: so a request takes one for each global page and one more."""


def engine(
    *,
    superpages: int = 200,
    max_running: int = 8,
    max_tokens_per_step: int = 64,
    max_context: int = 64,
    failing: Collection[str] = (),
    prefix_cache: bool = False,
) -> SimulatedEngine:
    """Pages of 2 tokens, chunks of 8. The prompts of most tests have one beginning, which is computed each time unless they ask otherwise."""
    return SimulatedEngine(
        GROUPS,
        page_size=2,
        num_superpages=superpages + 1,
        max_running=max_running,
        max_tokens_per_step=max_tokens_per_step,
        max_context=max_context,
        vocab_size=1000,
        failing=failing,
        prefix_cache=prefix_cache,
    )


def ask(
    request_id: str,
    prompt_len: int,
    max_tokens: int | None = 4,
    *,
    priority: int = 0,
    max_total_tokens: int = 64,
    eos: Sequence[int] = (),
    **params: object,
) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=list(range(prompt_len)),
        params=SamplingParams(max_tokens=max_tokens, **params),  # type: ignore[arg-type]
        eos_token_ids=eos,
        max_total_tokens=max_total_tokens,
        priority=priority,
    )


def pieces(batch: ScheduledBatch | None) -> list[tuple[str, int, int]]:
    """(request id, first token, end) of each part of a batch."""
    assert batch is not None
    return [(s.request.request_id, s.start, s.start + len(s.token_ids)) for s in batch.sequences]


def turns(made: SimulatedEngine) -> Iterator[int]:
    """Once for every step until all requests ended."""
    for turn in range(1000):
        if not made.scheduler.has_work:
            return
        yield turn
    raise AssertionError("1000 steps were not enough")


def steps(made: SimulatedEngine) -> list[list[tuple[str, int, int]]]:
    """Run to the end → what each step computed."""
    seen = []
    for _ in turns(made):
        batch = made.scheduler.schedule()
        if batch is not None:
            seen.append(pieces(batch))
        made.scheduler.commit(StepTokens() if batch is None else made.execute(batch))
    return seen


def run(made: SimulatedEngine) -> dict[str, list[SequenceUpdate]]:
    """Run to the end → updates of each request."""
    updates: dict[str, list[SequenceUpdate]] = {}
    for _ in turns(made):
        for update in made.step().updates:
            updates.setdefault(update.request_id, []).append(update)
    return updates
