"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from l4core.chat.assemble import TextDelta
from l4core.server.generation import Answer, Generation
from l4core.server.limits import read_request
from l4core.server.logprobs import chat_logprobs, prompt_logprobs
from l4core.server.params import chat_params
from l4core.server.protocol import ChatRequest, Message
from l4core.server.replies import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Delta,
)
from l4core.server.service import FINGERPRINT, Service, off_loop_if_long
from l4core.server.sse import event
from l4core.server.streaming import UsageFields, respond

MESSAGE_WEIGHT = 32


async def chat_completions(service: Service, http: Request) -> Response:
    """A whole answer or, with `stream`, its events. What is wrong before the first token is an HTTP error in both cases."""
    body = await read_request(http, ChatRequest, service.max_body_bytes)
    service.check_model(body.model)
    params = chat_params(body, service.loaded.frontend.default_params())
    prompt = await chat_ids(service, body.messages)
    generation = await Generation.start(
        service, [prompt], params, prefix="chatcmpl", priority=body.priority, cache_salt=body.cache_salt
    )
    try:
        return await respond(http, generation, _ChatShaper(service, body, generation), body)
    except BaseException:
        generation.close()
        raise


async def chat_ids(service: Service, messages: Sequence[Message]) -> list[int]:
    """Messages → token ids, by the chat template. Raises RequestError for what cannot fit, before it is rendered, and for what the template does
    not take."""
    plain = [msgspec.to_builtins(message) for message in messages]
    told = [{name: value for name, value in message.items() if value is not None} for message in plain]
    frontend, context = service.loaded.frontend, service.loaded.context_length
    return await off_loop_if_long(sum(map(_weight, messages)), lambda: frontend.chat_ids(told, context_length=context))


def _weight(message: Message) -> int:
    """Characters; a message or a part without any is work for the template too."""
    parts = [message.content] if isinstance(message.content, str) else [part.text for part in message.content]
    return MESSAGE_WEIGHT + sum(MESSAGE_WEIGHT + len(part) for part in parts)


class _ChatShaper:
    """Of one call."""

    def __init__(self, service: Service, body: ChatRequest, generation: Generation) -> None:
        self._tokenizer = service.loaded.frontend.tokenizer
        self._model = service.model_name
        self._body = body
        self._generation = generation
        self._created = int(time.time())
        self._num_top = body.top_logprobs or 0
        self._usage = UsageFields.asked_by(body)

    def whole(self) -> ChatCompletion:
        asked, answers = self._body.prompt_logprobs, self._generation.answers
        return ChatCompletion(
            id=self._generation.id,
            created=self._created,
            model=self._model,
            choices=[self._choice(answer) for answer in answers],
            usage=self._generation.usage(),
            system_fingerprint=FINGERPRINT,
            prompt_logprobs=UNSET
            if asked is None
            else prompt_logprobs(self._tokenizer, answers[0].assembler.prompt_token_logprobs(), asked),
        )

    def _choice(self, answer: Answer) -> ChatChoice:
        output = answer.assembler.output(answer.index)
        logprobs: ChatLogprobs | None = None
        if self._body.logprobs:
            logprobs = chat_logprobs(self._tokenizer, output.token_logprobs or (), self._num_top)
        return ChatChoice(
            index=answer.index,
            message=AnswerMessage("assistant", output.text),
            logprobs=logprobs,
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
        )

    def end(self) -> ChatChunk:
        return self._frame([], last=True)

    def chunk(self, answer: Answer, delta: TextDelta) -> bytes:
        """b"" when the client would learn nothing: text is held back, and nothing else was asked for."""
        logprobs = chat_logprobs(self._tokenizer, delta.logprobs, self._num_top) if self._body.logprobs else None
        if not (delta.text or delta.finish_reason or (logprobs and logprobs.content) or not answer.started):
            return b""
        choice = ChatChunkChoice(
            index=answer.index,
            delta=Delta(role=None if answer.started else "assistant", content=delta.text),
            logprobs=logprobs,
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason if delta.finish_reason else UNSET,
        )
        answer.started = True
        return event(self._frame([choice], last=False))

    def _frame(self, choices: list[ChatChunkChoice], *, last: bool) -> ChatChunk:
        return ChatChunk(
            id=self._generation.id,
            created=self._created,
            model=self._model,
            choices=choices,
            system_fingerprint=FINGERPRINT,
            usage=self._usage.of(self._generation, last=last),
        )
