"""Whether a request may start: refused for ever, or not now, and behind how much of its prompt. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile

from l4core.engine.schedule.choice import Part
from l4core.engine.schedule.sequence import RankedQueue, SequenceState
from l4core.engine.schedule.stops import StopRule
from l4core.kv.manager import KVManager, Superpages
from l4core.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """max_running: block-table rows.  max_tokens_per_step: tokens computed in one step, decodes first.  chunk_size: attention chunk in tokens,
    None = no layer is chunked.  max_context: prompt + output of one request.  draft_floor: share of right first guesses, lately, below which a
    request is given no more: its text is not the drafter's kind, or beyond its context. Raises ValueError for a number below 1."""

    max_running: int
    max_tokens_per_step: int
    chunk_size: int | None
    max_context: int
    draft_floor: float = 0.0

    def __post_init__(self) -> None:
        for name in ("max_running", "max_tokens_per_step", "max_context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; wanted at least 1")


def refusal(request: Request, stops: StopRule, limits: SchedulerLimits, kv: KVManager) -> str:
    """Why this request can never finish, with the numbers; "" when it can."""
    prompt, total = len(request.prompt_token_ids), request.max_total_tokens
    if not prompt:
        return "the prompt has 0 tokens; wanted at least 1"
    if total > limits.max_context:
        return f"the request may grow to {total} tokens; the context holds {limits.max_context} (--context-length)"
    if stops.max_output < 1:
        return f"the prompt has {prompt} tokens and the request may have {total} in all; wanted room for at least 1 new token"
    needed = prompt + stops.max_output
    if not kv.could_finish_alone(needed):
        return (
            f"{prompt} prompt tokens and up to {stops.max_output} new ones are {needed} tokens, more than KV memory holds for one request "
            f"({kv.largest_alone()}); lower max_tokens, or give the engine more memory (--mem-fraction-static, --max-total-tokens)"
        )
    return ""


def lacking(seq: SequenceState, kv: KVManager) -> Superpages:
    """Superpages kept free for `seq` when another is admitted: those of its known tokens, and one page of tokens to come.

    Known tokens, because a half-computed prompt that finds no page is the first to be evicted, and its work would be lost again and again. One
    page more, because the others' next page would otherwise be taken from the newcomer. Simulated on 300 requests of 500 + 300 tokens (means)
    in a pool of 60,000: no page kept = 32 % of the prompt tokens computed twice, one page = 0 % and 3 % more steps, eight pages = 31 % more.
    """
    if seq.is_decode:
        return [0] * (len(kv.groups) - 1) + [1]
    end = max(seq.num_computed, min(seq.num_tokens + kv.page_size, seq.last_slot))
    return kv.needed(seq.tables, seq.num_computed, end)


def victims_for(
    seq: SequenceState, running: RankedQueue, limits: SchedulerLimits, kv: KVManager
) -> list[SequenceState] | None:
    """Which running sequences of strictly lower priority must go, worst first, so that `seq` can start: [] = none, None = it has to wait."""
    priority = seq.request.priority
    lower = list(takewhile(lambda other: other.request.priority < priority, reversed(running)))
    if len(running) >= limits.max_running and not lower:
        return None
    wanted = list(lacking(seq, kv))
    if not lower and not kv.has_room(wanted):
        return None
    others = [other for other in running if not other.is_decode]
    wanted[-1] += len(running) - len(others)  # what a decode lacks, of nearly all
    for other in others:
        _add(wanted, lacking(other, kv))
    for count in range(len(lower) + 1):
        if kv.has_room(wanted) and len(running) - count < limits.max_running:
            return lower[:count]
        if count < len(lower):
            _add(wanted, kv.held(lower[count].tables), -1)
            _add(wanted, lacking(lower[count], kv), -1)
    return None


def take_prefix(seq: SequenceState, kv: KVManager) -> None:
    """Start behind the tokens whose pages are still there; the last known token is always computed, for its logits."""
    if seq.wants_prompt_logprobs:
        return
    length = kv.find_prefix(seq.hashes, min(seq.num_tokens - 1, seq.num_hashable))
    kv.take_prefix(seq.tables, seq.hashes, length)
    if not kv.fits_alone(seq.tables, length, seq.last_slot):  # too scattered to finish beside
        kv.release(seq.tables)
        length = 0
    seq.num_prefilled = length


def is_computed_now(seq: SequenceState, parts: Iterable[Part], kv: KVManager) -> bool:
    """Whether the first page that `seq` would compute is among these parts of steps, chosen or in flight: then it waits a step and finds it."""
    if not kv.prefix_cache or seq.wants_prompt_logprobs:
        return False
    page_size = kv.page_size
    most = min(seq.num_tokens - 1, seq.num_hashable)
    index = kv.find_prefix(seq.hashes, most, from_last=True) // page_size
    end = (index + 1) * page_size
    if end > most:
        return False
    return any(
        entry.start // page_size <= index < (entry.start + len(entry.token_ids)) // page_size
        and end <= other.num_hashable
        and other.hashes[index] == seq.hashes[index]
        for other, entry in parts
        if not entry.is_decode and not other.finished
    )


def _add(total: list[int], more: Superpages, times: int = 1) -> None:
    for number, count in enumerate(more):
        total[number] += times * count
