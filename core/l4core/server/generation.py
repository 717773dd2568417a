"""One HTTP call that generates: its prompts become sequences, their updates become text. Knows nothing of the reply's shape."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from l4core.chat.assemble import Assembler, TextDelta
from l4core.errors import EngineDeadError, RequestError
from l4core.request import FinishReason, Request, SamplingParams
from l4core.server.replies import PromptTokensDetails, Usage
from l4core.server.service import Service


@dataclass(slots=True, kw_only=True)
class Answer:
    """One sequence of the call. index: OpenAI's choice index.  prompt: which of the call's prompts.  started: its first delta was told."""

    index: int
    prompt: int
    request: Request
    assembler: Assembler
    num_tokens: int = 0
    started: bool = False


class Generation:
    """Hands the sequences to the engine at once. Always `close()` it. counts_output: whether the usage has the generated tokens.

    Raises RequestError: 400 (prompt too long, a token id out of range, a bad parameter), 429, 503.
    """

    def __init__(
        self,
        service: Service,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        prefix: str,
        priority: int | None = None,
        counts_output: bool = True,
    ) -> None:
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self.params = params
        self.prompts = prompts
        self._counts_output = counts_output
        self.answers = [
            Answer(index=index, prompt=prompt, request=request, assembler=service.loaded.frontend.assembler(request))
            for index, (prompt, request) in enumerate(self._requests(service, priority or 0))
        ]
        self._by_id = {answer.request.request_id: answer for answer in self.answers}
        self._stream = service.submit([answer.request for answer in self.answers])

    @property
    def finished(self) -> bool:
        return all(answer.assembler.finished for answer in self.answers)

    async def next(self) -> list[tuple[Answer, TextDelta]]:
        """What came since the last call, in order; [] once all answers have ended.

        Raises RequestError (500) when the engine ended a sequence with an error, EngineDeadError when the engine is gone.
        """
        told: list[tuple[Answer, TextDelta]] = []
        while not (told or self.finished):
            for update in await self._stream.next():
                answer = self._by_id[update.request_id]
                if answer.assembler.finished:
                    continue
                delta = answer.assembler.feed(update)
                if delta.must_abort:
                    self._stream.abort(update.request_id)
                _raise_failure(delta)
                answer.num_tokens += len(delta.token_ids)
                told.append((answer, delta))
        return told

    async def finish(self) -> None:
        """Until all answers have ended; `answers[i].assembler.output(...)` has them."""
        while not self.finished:
            await self.next()

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
        )

    def close(self) -> None:
        """Abort what has not ended."""
        self._stream.close()

    def _requests(self, service: Service, priority: int) -> list[tuple[int, Request]]:
        """(which prompt, sequence) in the order of choice indices."""
        frontend, limit = service.loaded.frontend, service.loaded.context_length
        return [
            (number, request)
            for number, prompt in enumerate(self.prompts)
            for request in frontend.requests(f"{self.id}-{number}", prompt, self.params, limit, priority=priority)
        ]


def _raise_failure(delta: TextDelta) -> None:
    if delta.finish_reason is FinishReason.ERROR:
        raise RequestError(delta.error or "the engine gave up on this request", status=500, code="request_failed")
    if delta.finish_reason is FinishReason.ABORT:
        raise EngineDeadError("the engine aborted this request")
