"""One sequence's rows of logits: what each is drawn with, and which of the draws become tokens. The comparison itself is sampling.verify."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from l4core.engine.batch import DrawnTokens, ScheduledSequence
from l4core.engine.schedule.stops import forbidden_token_ids
from l4core.plugin_ops.sampling import UNCHANGED
from l4core.request import TokenLogprobs
from l4core.sampling.records import Draw, DrawRow
from l4core.sampling.verify import accepted_path, paths


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """path: rows of the piece's last num_drafts + 1 whose draws count, row 0 first.  tokens: for the scheduler."""

    path: Sequence[int]
    tokens: DrawnTokens


def draw_rows(seq: ScheduledSequence, parsed: object) -> list[DrawRow]:
    """One row, or one more than drafts: each sees the outputs before it and the guesses on its own path. parsed: what its sampler parsed."""
    position = seq.start + len(seq.token_ids) - seq.num_drafts
    num_output = position - len(seq.request.prompt_token_ids)  # the newest may be in flight, and not in the list yet
    looks_back = parsed is not UNCHANGED
    return [
        DrawRow(
            params=seq.request.params,
            parsed=parsed,
            prompt_token_ids=seq.request.prompt_token_ids,
            output_token_ids=[*seq.output_token_ids, *path] if path and looks_back else seq.output_token_ids,
            position=position + len(path),
            forbidden=forbidden_token_ids(seq.request, num_output + len(path)),
        )
        for path in paths(guesses_of(seq), seq.parents)
    ]


def verified(
    seq: ScheduledSequence, draws: Sequence[Draw], prompt_logprobs: Sequence[TokenLogprobs | None] = ()
) -> Verified:
    """draws: of `draw_rows(seq)`, none while the prompt is unfinished. A row without a token ends the request after the tokens before it."""
    path = accepted_path(guesses_of(seq), seq.parents, [draw.token_id for draw in draws]) if draws else []
    chosen = [draws[row] for row in path]
    tokens = DrawnTokens(
        request_id=seq.request.request_id,
        token_ids=[draw.token_id for draw in chosen if draw.token_id is not None],
        logprobs=[draw.logprobs for draw in chosen if draw.logprobs is not None],
        prompt_logprobs=prompt_logprobs,
        error=chosen[-1].error if chosen else "",
    )
    return Verified(path=path, tokens=tokens)


def guesses_of(seq: ScheduledSequence) -> Sequence[int]:
    """The piece's draft, in the order of its rows."""
    return seq.token_ids[len(seq.token_ids) - seq.num_drafts :]
