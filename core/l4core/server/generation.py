"""One HTTP call that generates: its prompts become sequences, their updates become text. Knows nothing of the reply's shape."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from msgspec import UNSET, UnsetType

from l4core.chat.assemble import Assembler, TextDelta
from l4core.errors import EngineDeadError, L4Error, RequestError
from l4core.request import FinishReason, Request, SamplingParams, SequenceUpdate
from l4core.server.replicas import Updates
from l4core.server.replies import CompletionTokensDetails, PromptTokensDetails, Usage
from l4core.server.service import Service, off_loop_if_long

SEQUENCE_WEIGHT = 512
"""What making one sequence costs, in tokens of a prompt that are checked."""


@dataclass(slots=True, kw_only=True)
class Answer:
    """One sequence of the call. index: OpenAI's choice index.  prompt: which of the call's prompts.  started: its first delta was told."""

    index: int
    prompt: int
    request: Request
    assembler: Assembler
    num_tokens: int = 0
    started: bool = False


Told: TypeAlias = list[tuple[Answer, TextDelta]]
"""News of a call, in order."""


class Generation:
    """Answers to the prompts of one call. Always `close()` it."""

    def __init__(
        self,
        generation_id: str,
        params: SamplingParams,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Answer],
        stream: Updates,
        *,
        counts_output: bool,
    ) -> None:
        self.id = generation_id
        self.params = params
        self.prompts = prompts
        self.answers = answers
        self._by_id = {answer.request.request_id: answer for answer in answers}
        self._stream = stream
        self._counts_output = counts_output
        self._failure: L4Error | None = None

    @classmethod
    async def start(
        cls,
        service: Service,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        prefix: str,
        priority: int | None = None,
        cache_salt: str | None = None,
        counts_output: bool = True,
    ) -> Generation:
        """Hand the sequences to the engine. cache_salt: cached prefixes are shared among equal salts only.
        counts_output: whether the usage has the generated tokens.

        Raises RequestError: 400 (prompt too long, a token id out of range, a bad parameter), 429, 503.
        """
        service.check_count(len(prompts) * params.n)
        generation_id = f"{prefix}-{uuid.uuid4().hex}"
        frontend, limit = service.loaded.frontend, service.loaded.context_length

        def make() -> list[Answer]:
            numbered = [
                (number, request)
                for number, prompt in enumerate(prompts)
                for request in frontend.requests(
                    f"{generation_id}-{number}",
                    prompt,
                    params,
                    limit,
                    priority=priority or 0,
                    cache_salt=cache_salt or "",
                )
            ]
            return [
                Answer(index=index, prompt=number, request=request, assembler=frontend.assembler(request))
                for index, (number, request) in enumerate(numbered)
            ]

        weight = sum(map(len, prompts)) + SEQUENCE_WEIGHT * len(prompts) * params.n
        answers = await off_loop_if_long(weight, make)
        stream = service.submit([answer.request for answer in answers])
        return cls(generation_id, params, prompts, answers, stream, counts_output=counts_output)

    @property
    def finished(self) -> bool:
        return all(answer.assembler.finished for answer in self.answers)

    async def next(self) -> Told:
        """What came since the last call, in order; [] once all answers have ended.

        Raises RequestError (500) when the engine ended a sequence with an error, EngineDeadError when the engine is gone.
        """
        told: Told = []
        while not told:
            if self._failure is not None:  # what came before it was told first
                raise self._failure
            if self.finished:
                break
            for update in await self._stream.next():
                told += self._take_in(update)
        return told

    def _take_in(self, update: SequenceUpdate) -> Told:
        answer = self._by_id[update.request_id]
        if answer.assembler.finished or self._failure is not None:
            return []
        delta = answer.assembler.feed(update)
        self._failure = _failure(delta)
        if self._failure is not None:
            return []
        if delta.must_abort:
            self._stream.stop(update.request_id)
        return [(answer, delta)]

    def tell(self, told: Told) -> Iterator[tuple[Answer, TextDelta]]:
        """One by one, each counted in the usage when it is told: several steps may have come at once."""
        for answer, delta in told:
            answer.num_tokens += len(delta.token_ids)
            yield answer, delta

    async def finish(self) -> None:
        """Until all answers have ended; `answers[i].assembler.output(...)` has them."""
        while told := await self.next():
            for _ in self.tell(told):
                pass

    def usage(self) -> Usage:
        """Tokens so far. Each prompt counts once, whatever n is."""
        num_prompt = sum(len(prompt) for prompt in self.prompts)
        num_output = sum(answer.num_tokens for answer in self.answers) if self._counts_output else 0
        cached = {answer.prompt: answer.assembler.num_cached_tokens for answer in reversed(self.answers)}
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=num_output,
            total_tokens=num_prompt + num_output,
            prompt_tokens_details=PromptTokensDetails(sum(cached.values())),
            completion_tokens_details=self._guesses(),
        )

    def _guesses(self) -> CompletionTokensDetails | UnsetType:
        drafted = sum(answer.assembler.num_drafted for answer in self.answers)
        accepted = sum(answer.assembler.num_accepted for answer in self.answers)
        return CompletionTokensDetails(accepted, drafted - accepted) if drafted else UNSET

    @property
    def num_candidates(self) -> int:
        """Tokens that the reply may have to spell: those of prompts and answers, each with its most likely ones."""
        top = max(self.params.logprobs or 0, self.params.prompt_logprobs or 0)
        num_prompt = sum(len(self.prompts[answer.prompt]) for answer in self.answers)
        return (1 + top) * (num_prompt + sum(answer.num_tokens for answer in self.answers))

    def close(self) -> None:
        """Abort what has not ended."""
        self._stream.close()


def _failure(delta: TextDelta) -> L4Error | None:
    if delta.finish_reason is FinishReason.ERROR:
        return RequestError(delta.error or "the engine gave up on this request", status=500, code="request_failed")
    if delta.finish_reason is FinishReason.ABORT:
        return EngineDeadError("the engine aborted this request")
    return None
