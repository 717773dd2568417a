"""POST /v1/completions: prompts as text or token ids, one or many; `echo` with logprobs scores a prompt."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from l4core.chat.assemble import TextDelta
from l4core.errors import RequestError
from l4core.request import TokenLogprobs
from l4core.server.generation import Answer, Generation
from l4core.server.limits import read_request
from l4core.server.logprobs import CompletionLogprobShaper, prompt_logprobs
from l4core.server.params import completion_params, max_tokens
from l4core.server.protocol import CompletionRequest
from l4core.server.replies import Completion, CompletionChoice, CompletionLogprobs
from l4core.server.service import FINGERPRINT, Service, off_loop_if_long, text_ids
from l4core.server.sse import event
from l4core.server.streaming import UsageFields, respond


@dataclass(frozen=True, slots=True)
class Prompt:
    """text: as given, None when ids were given."""

    token_ids: Sequence[int]
    text: str | None


async def completions(service: Service, http: Request) -> Response:
    """Whole answers or, with `stream`, their events; choice index = prompt number × n + answer."""
    body = await read_request(http, CompletionRequest, service.max_body_bytes)
    service.check_model(body.model)
    params = completion_params(body, service.loaded.frontend.default_params())
    prompts = await read_prompts(service, body.prompt, add_special=body.add_special_tokens is not False)
    hidden = bool(body.echo) and max_tokens(body) == 0
    generation = await Generation.start(
        service,
        [p.token_ids for p in prompts],
        params,
        prefix="cmpl",
        priority=body.priority,
        cache_salt=body.cache_salt,
        counts_output=not hidden,
    )
    try:
        return await respond(http, generation, _CompletionShaper(service, body, generation, prompts, hidden), body)
    except BaseException:
        generation.close()
        raise


async def read_prompts(service: Service, given: Any, *, add_special: bool) -> list[Prompt]:
    """A string, strings, ids, or lists of ids. Raises RequestError (400, param "prompt") for anything else and for an empty prompt."""
    loaded, frontend = service.loaded, service.loaded.frontend
    many = isinstance(given, list) and bool(given) and type(given[0]) in (str, list)
    items: list[Any] = given if many else [given]
    service.check_count(len(items))

    def read() -> list[Prompt]:
        for index, item in enumerate(items):
            if not (isinstance(item, str) and item) and not _is_ids(item):
                raise _bad_prompt(f"prompt[{index}]" if many else "prompt", item)
            if isinstance(item, str):
                frontend.check_length(len(item), loaded.context_length, param="prompt")
        return [
            Prompt(text_ids(frontend, i, add_special=add_special), i) if isinstance(i, str) else Prompt(i, None)
            for i in items
        ]

    return await off_loop_if_long(sum(len(i) for i in items if isinstance(i, (str, list))), read)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and set(map(type, value)) == {int}


def _bad_prompt(where: str, value: Any) -> RequestError:
    found = "empty" if value in ("", []) else f"{_kind(value)} that is neither text nor token ids"
    return RequestError(
        f"{where} is {found}; wanted a non-empty string or list of token ids, or a list of those", param="prompt"
    )


def _kind(value: Any) -> str:
    """JSON's word for it."""
    words = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number"}
    return words.get(type(value), "null")


class _CompletionShaper:
    """Of one call. hides_output: the one token that max_tokens 0 needs is not shown."""

    def __init__(
        self,
        service: Service,
        body: CompletionRequest,
        generation: Generation,
        prompts: Sequence[Prompt],
        hides_output: bool,
    ) -> None:
        self._tokenizer = service.loaded.frontend.tokenizer
        self._model = service.model_name
        self._body = body
        self._generation = generation
        self._prompts = prompts
        self._hides_output = hides_output
        self._skip_special = generation.params.skip_special_tokens
        self._created = int(time.time())
        self._usage = UsageFields.asked_by(body)
        self._scores = [
            CompletionLogprobShaper(self._tokenizer, num_top=body.logprobs or 0, skip_special=self._skip_special)
            for _ in generation.answers
        ]

    def whole(self) -> Completion:
        return self._frame([self._choice(answer) for answer in self._generation.answers], last=True)

    def _choice(self, answer: Answer) -> CompletionChoice:
        output = answer.assembler.output(answer.index)
        return CompletionChoice(
            index=answer.index,
            text=self._text(answer, output.text, first=True),
            logprobs=self._logprobs(answer, output.token_ids, output.token_logprobs or (), first=True),
            finish_reason="length" if self._hides_output else output.finish_reason,
            stop_reason=output.stop_reason,
            prompt_logprobs=UNSET
            if self._body.prompt_logprobs is None
            else prompt_logprobs(self._tokenizer, answer.assembler.prompt_token_logprobs(), self._body.prompt_logprobs),
        )

    def _text(self, answer: Answer, text: str, *, first: bool) -> str:
        shown = "" if self._hides_output else text
        if not (first and self._body.echo):
            return shown
        prompt = self._prompts[answer.prompt]
        if prompt.text is not None:
            return prompt.text + shown
        return self._tokenizer.decode(prompt.token_ids, skip_special=self._skip_special) + shown

    def _logprobs(
        self, answer: Answer, token_ids: Sequence[int], entries: Sequence[TokenLogprobs], *, first: bool
    ) -> CompletionLogprobs | None:
        if self._body.logprobs is None:
            return None
        ids, all_entries = ([], []) if self._hides_output else (list(token_ids), list[TokenLogprobs | None](entries))
        if first and self._body.echo:
            ids = [*self._prompts[answer.prompt].token_ids, *ids]
            all_entries = [*answer.assembler.prompt_token_logprobs(), *all_entries]
        return self._scores[answer.index].shape(ids, all_entries)

    def end(self) -> Completion:
        return self._frame([], last=True)

    def chunk(self, answer: Answer, delta: TextDelta) -> bytes:
        """b"" when the client would learn nothing, or while an echoed prompt is still being scored."""
        if not answer.started and not delta.token_ids and not delta.finish_reason:
            return b""
        first, answer.started = not answer.started, True
        logprobs = self._logprobs(answer, delta.token_ids, delta.logprobs, first=first)
        text = self._text(answer, delta.text, first=first)
        if not (text or delta.finish_reason or (logprobs and logprobs.tokens)):
            return b""
        reason = "length" if self._hides_output and delta.finish_reason else delta.finish_reason
        choice = CompletionChoice(
            index=answer.index,
            text=text,
            logprobs=logprobs,
            finish_reason=reason,
            stop_reason=delta.stop_reason if delta.finish_reason else UNSET,
        )
        return event(self._frame([choice], last=False))

    def _frame(self, choices: list[CompletionChoice], *, last: bool) -> Completion:
        return Completion(
            id=self._generation.id,
            created=self._created,
            model=self._model,
            choices=choices,
            system_fingerprint=FINGERPRINT,
            usage=self._usage.of(self._generation, last=last),
        )
