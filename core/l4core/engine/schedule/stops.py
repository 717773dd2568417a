"""When a sequence ends. Torch-free, pure; the sampler asks which ids it may not draw yet, the scheduler whether the drawn one ends it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from l4core.request import Request


def forbidden_token_ids(request: Request, num_output: int) -> Sequence[int]:
    """Ids that must not be drawn as output token number `num_output` (from 0): what would end the answer before min_tokens."""
    if num_output >= request.params.min_tokens:
        return ()
    return (*request.eos_token_ids, *request.params.stop_token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRule:
    """One request's ends, worked out once. end_ids: eos and stop ids, which end it when at least `min_output` tokens came before.

    max_output: output tokens that max_tokens and the context leave; below 1 when the prompt leaves no room.
    """

    end_ids: frozenset[int]
    min_output: int
    max_output: int

    @classmethod
    def of(cls, request: Request) -> StopRule:
        """The rule of a request."""
        params, room = request.params, request.max_total_tokens - len(request.prompt_token_ids)
        return cls(
            end_ids=frozenset((*request.eos_token_ids, *params.stop_token_ids)),
            min_output=params.min_tokens,
            max_output=room if params.max_tokens is None else min(room, params.max_tokens),
        )
