"""What a step's draws make of its sequences: tokens taken in, full pages offered to the prefix cache, ends seen, and the update that tells of it.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from l4core.engine.batch import DrawnTokens, ScheduledSequence
from l4core.engine.schedule.choice import Decoded
from l4core.engine.schedule.sequence import NO_ROW, SequenceState
from l4core.engine.schedule.step_counts import StepCounts
from l4core.kv.manager import KVManager
from l4core.request import FinishReason, SequenceUpdate


def take_in_decoded(decoded: Decoded, kv: KVManager, end: Callable[[SequenceState], None]) -> Iterator[SequenceUpdate]:
    """One drawn token of each sequence that decoded; those that have ended since are passed over. end: called for each that its token ends.

    What `take_in` does, for nearly all there is to take in: between two events (`SequenceState.due`) a token is noted and no more.
    """
    for seq, token_id in zip(*decoded, strict=True):
        if seq.finished:
            continue
        output = seq.output_token_ids
        output.append(token_id)
        if len(output) < seq.due and token_id not in seq.end_ids:
            yield SequenceUpdate(request_id=seq.request_id, new_token_ids=(token_id,))
            continue
        if seq.row != NO_ROW:  # not evicted meanwhile
            _commit_pages(seq, seq.prompt_len + len(output) - 1, kv)
        reason = seq.end_by(token_id)
        if reason is not None:
            end(seq)
        yield SequenceUpdate(
            request_id=seq.request_id,
            new_token_ids=(token_id,),
            finish_reason=reason,
            stop_token_id=token_id if reason is FinishReason.STOP else None,
        )


def take_in(
    seq: SequenceState, entry: ScheduledSequence, drawn: DrawnTokens, kv: KVManager, counts: StepCounts
) -> SequenceUpdate | None:
    """What any part of a step drew → what is told of it, None = nothing yet; with a finish_reason the caller ends the sequence.
    ValueError for a draw that is not this entry's."""
    _check_draws(entry, drawn)
    if drawn.error and not drawn.token_ids:
        return SequenceUpdate(request_id=seq.request_id, finish_reason=FinishReason.ERROR, error=drawn.error)
    is_first = not seq.output_token_ids
    seq.settle(entry)
    token_ids, reason = seq.extend(drawn.token_ids)
    if seq.row != NO_ROW:  # not evicted meanwhile
        _commit_pages(seq, entry.start + (len(token_ids) if entry.is_decode else len(entry.token_ids)), kv)
    prompt_logprobs = seq.new_prompt_logprobs(entry.start, drawn.prompt_logprobs) if drawn.prompt_logprobs else ()
    if not token_ids:
        return SequenceUpdate(request_id=seq.request_id, prompt_logprobs=prompt_logprobs) if prompt_logprobs else None
    num_right = 0
    if entry.num_drafts:
        # Of what was drawn only the last token was nobody's guess. Where the sequence ends before it, or fails there, guesses behind are not judged.
        ends_at_guess = len(token_ids) < len(drawn.token_ids) or bool(drawn.error)
        num_right = len(token_ids) - (not ends_at_guess)
        counts.verified(entry, num_right, is_judged=not ends_at_guess)
        seq.judge_draft(num_right > 0)
    if reason is None and drawn.error:
        reason = FinishReason.ERROR
    return SequenceUpdate(
        request_id=seq.request_id,
        new_token_ids=token_ids,
        logprobs=drawn.logprobs[: len(token_ids)],
        prompt_logprobs=prompt_logprobs,
        finish_reason=reason,
        stop_token_id=token_ids[-1] if reason is FinishReason.STOP else None,
        error=drawn.error if reason is FinishReason.ERROR else "",
        num_cached_tokens=(seq.num_cached or 0) if is_first else 0,  # told once
        num_drafted=entry.num_drafts,
        num_accepted=num_right,
    )


def _commit_pages(seq: SequenceState, length: int, kv: KVManager) -> None:
    """The first `length` tokens are computed and stay."""
    if length >= seq.tables.next_commit:
        kv.commit(seq.tables, length, seq.hashes)
    # A decode that leaves `n` output tokens has computed prompt_len + n − 1.
    seq.due = min(seq.stops.max_output, seq.tables.next_commit - seq.prompt_len + 1)


def _check_draws(entry: ScheduledSequence, drawn: DrawnTokens) -> None:
    request_id, count = entry.request.request_id, len(drawn.token_ids)
    if drawn.request_id != request_id:
        raise ValueError(f"a draw for {drawn.request_id!r} came where {request_id!r} was scheduled")
    if (count > 0) is not entry.draws and not drawn.error:
        raise ValueError(
            f"{request_id}: {count} tokens were drawn; the piece {'ends' if entry.draws else 'does not end'} its known tokens"
        )
    if count > entry.num_drafts + 1:
        raise ValueError(f"{request_id}: {count} tokens were drawn to verify {entry.num_drafts} drafts")
