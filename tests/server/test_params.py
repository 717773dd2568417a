"""Every field of a request reaches the engine; none is dropped on the way."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import httpx
import msgspec
import pytest

from l4core.errors import RequestError
from l4core.request import SamplingParams
from l4core.server.params import chat_params, completion_params
from l4core.server.protocol import ChatRequest, CompletionRequest, Message

SENT: dict[str, Any] = {
    "max_tokens": 90,
    "temperature": 0.5,
    "top_p": 0.25,
    "top_k": 7,
    "min_p": 0.125,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.5,
    "logit_bias": {"5": -2.0, "6": 3.0},
    "seed": 2**64 - 3,
    "stop": ["é", "ü"],  # the answer spells them as \\u00e9, so they do not cut it
    "stop_token_ids": [300, 301],
    "include_stop_str_in_output": True,
    "min_tokens": 3,
    "ignore_eos": True,
    "skip_special_tokens": False,
    "prompt_logprobs": 2,
    "sampler_args": {"a": [1, {"b": None}]},
    "priority": -5,
    "cache_salt": "tenant",
}
ELSEWHERE = {"model", "max_completion_tokens", "n", "sampler", "stream", "stream_options", "logprobs"}
BODY_ONLY = {"messages", "top_logprobs", "prompt", "echo", "add_special_tokens"}


def test_no_field_is_missing_from_this_page() -> None:
    fields = {f.name for s in (ChatRequest, CompletionRequest) for f in msgspec.structs.fields(s)}
    assert fields == SENT.keys() | ELSEWHERE | BODY_ONLY
    assert {f.name for f in dataclasses.fields(SamplingParams)} <= fields


@pytest.mark.parametrize("field", sorted(SENT))
@pytest.mark.parametrize("chat", [True, False])
def test_a_field_reaches_the_engine(http: httpx.Client, field: str, chat: bool) -> None:
    tell = f"TELL {field} "
    body = {"messages": [{"role": "user", "content": tell}]} if chat else {"prompt": tell}
    extra = {"max_tokens": 60} if field != "ignore_eos" else {"max_tokens": 4}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    reply = http.post(path, json={**body, **extra, field: SENT[field]})
    assert reply.status_code == 200, reply.text
    choice = reply.json()["choices"][0]
    text: str = choice["message"]["content"] if chat else choice["text"]
    assert json.loads(text.partition("<|")[0]) == SENT[field]


def test_logprobs_reach_the_engine_as_numbers() -> None:
    message = [Message(role="user", content="x")]
    for body, wanted in (
        (ChatRequest(messages=message, logprobs=True, top_logprobs=4), 4),
        (ChatRequest(messages=message, logprobs=True), 0),
        (ChatRequest(messages=message, logprobs=False), None),
        (ChatRequest(messages=message), None),
    ):
        assert chat_params(body, {}).logprobs == wanted
    for text, logprobs, prompt_logprobs in (
        (CompletionRequest(prompt="x", logprobs=3), 3, None),
        (CompletionRequest(prompt="x", logprobs=3, echo=True), 3, 3),
        (CompletionRequest(prompt="x", logprobs=3, echo=True, prompt_logprobs=5), 3, 5),
        (CompletionRequest(prompt="x", echo=True), None, None),
    ):
        params = completion_params(text, {})
        assert (params.logprobs, params.prompt_logprobs) == (logprobs, prompt_logprobs)


def test_what_is_not_given_is_the_servers_default() -> None:
    defaults = {"temperature": 0.6, "top_p": 0.9, "sampler": "xtc"}
    chat = chat_params(ChatRequest(messages=[Message(role="user", content="x")], top_p=0.5), defaults)
    assert (chat.temperature, chat.top_p, chat.sampler, chat.max_tokens) == (0.6, 0.5, "xtc", None)
    text = completion_params(CompletionRequest(prompt="x", sampler="default"), defaults)
    assert (text.temperature, text.top_p, text.sampler, text.max_tokens) == (0.6, 0.9, "default", 16)


def test_both_names_of_max_tokens_must_agree() -> None:
    message = [Message(role="user", content="x")]
    assert chat_params(ChatRequest(messages=message, max_tokens=5, max_completion_tokens=5), {}).max_tokens == 5
    with pytest.raises(RequestError, match="give one"):
        chat_params(ChatRequest(messages=message, max_tokens=5, max_completion_tokens=6), {})
