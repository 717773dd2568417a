"""Request bodies, as typed structs: what may be sent, and the schema that /openapi.json publishes. Ranges are checked by `SamplingParams`.

Names are OpenAI's; the extensions are those that vLLM and SGLang share (top_k, min_p, min_tokens, ignore_eos, …) and `sampler`.
null means "not given" everywhere.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from l4core.request import MAX_LOGPROBS, MAX_SAMPLER_NAME, MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS, MIN_REPETITION_PENALTY

MAX_PRIORITY = (1 << 31) - 1
MAX_CACHE_SALT = 1024
"""Characters."""


def _range(low: float | None = None, high: float | None = None, *, above: float | None = None) -> Meta:
    """Bounds for the published schema only; SamplingParams words the errors."""
    bounds = {"minimum": low, "maximum": high, "exclusiveMinimum": above}
    return Meta(extra_json_schema={key: value for key, value in bounds.items() if value is not None})


Natural = Annotated[int, _range(0)]
Logprobs = Annotated[int, _range(0, MAX_LOGPROBS)]
TokenIds = list[Natural]
Penalty = Annotated[float, _range(-2, 2)]
NonEmpty = Annotated[str, Meta(extra_json_schema={"minLength": 1})]
StopStrings = Annotated[list[NonEmpty], Meta(extra_json_schema={"maxItems": MAX_STOP_STRINGS})]


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """include_usage: one more chunk at the end, with the usage.  continuous_usage_stats: usage so far in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class GenerationRequest(msgspec.Struct, kw_only=True):
    """What chat and completions have in common."""

    model: str | None = None
    max_tokens: Natural | None = None
    max_completion_tokens: Natural | None = None
    n: Annotated[int, _range(1, 128)] | None = None
    temperature: Annotated[float, _range(0, 100)] | None = None
    top_p: Annotated[float, _range(None, 1, above=0)] | None = None
    top_k: Annotated[int, _range(-1)] | None = None
    min_p: Annotated[float, _range(0, 1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, _range(MIN_REPETITION_PENALTY, 10)] | None = None
    logit_bias: dict[int, Annotated[float, _range(-100, 100)]] | None = None
    seed: Annotated[int, _range(-(2**63), 2**64 - 1)] | None = None
    stop: NonEmpty | StopStrings | None = None
    stop_token_ids: Annotated[TokenIds, Meta(extra_json_schema={"maxItems": MAX_STOP_TOKEN_IDS})] | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: Natural | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Logprobs | None = None
    sampler: Annotated[str, Meta(extra_json_schema={"maxLength": MAX_SAMPLER_NAME})] | None = None
    sampler_args: dict[str, Any] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Meta(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    cache_salt: Annotated[str, Meta(max_length=MAX_CACHE_SALT)] | None = None


class TextPart(msgspec.Struct):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(msgspec.Struct, kw_only=True):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]
    name: str | None = None
    tool_call_id: str | None = None


class ChatRequest(GenerationRequest, kw_only=True):
    """Body of POST /v1/chat/completions. max_tokens: until the context is full when not given."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None


PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
        {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
        {
            "type": "array",
            "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
            "minItems": 1,
        },
    ]
}


class CompletionRequest(GenerationRequest, kw_only=True):
    """Body of POST /v1/completions. prompt: a string, strings, token ids, or lists of token ids.  max_tokens: 16 when not given; 0 only with echo.
    add_special_tokens: whether a string prompt begins with the checkpoint's BOS (default yes; ids are taken as they are)."""

    prompt: Annotated[Any, Meta(extra_json_schema=PROMPT_SCHEMA)]
    echo: bool | None = None
    logprobs: Logprobs | None = None
    add_special_tokens: bool | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of POST /tokenize: a prompt, or messages that the chat template renders first."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of POST /detokenize."""

    tokens: TokenIds
    model: str | None = None
    skip_special_tokens: bool | None = None
