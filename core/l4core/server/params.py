"""From a request's fields and the server's defaults to SamplingParams, which checks every value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from l4core.errors import RequestError
from l4core.request import MAX_LOGPROBS, SamplingParams
from l4core.server.protocol import ChatRequest, CompletionRequest, GenerationRequest

COMPLETION_TOKENS = 16
MAX_SAMPLER_ARGS_DEPTH = 16
MAX_SAMPLER_ARGS_BYTES = 16_384
"""As JSON. Each of the n sequences of a prompt carries them to the engine."""
SAME_NAME = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "min_tokens",
    "ignore_eos",
    "skip_special_tokens",
    "prompt_logprobs",
    "sampler",
    "sampler_args",
)


def chat_params(body: ChatRequest, defaults: Mapping[str, Any]) -> SamplingParams:
    """defaults: of the checkpoint or OpenAI's (`Frontend.default_params`). Raises RequestError (400)."""
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs is given but logprobs is not true", param="top_logprobs")
    given = _given(body)
    if body.logprobs:
        given["logprobs"] = body.top_logprobs or 0
        if not 0 <= given["logprobs"] <= MAX_LOGPROBS:  # told here by the name that the client used
            raise RequestError(
                f"top_logprobs is {body.top_logprobs}; wanted a whole number from 0 to {MAX_LOGPROBS}",
                param="top_logprobs",
            )
    return SamplingParams(**{**defaults, "max_tokens": None, **given})


def completion_params(body: CompletionRequest, defaults: Mapping[str, Any]) -> SamplingParams:
    """The same for completions. With echo and max_tokens 0 one token is drawn (the engine cannot draw none) and not shown."""
    given = _given(body)
    if given.get("max_tokens") == 0 and body.echo:
        given |= {"max_tokens": 1, "min_tokens": 0}
    if body.logprobs is not None:
        given["logprobs"] = body.logprobs
        if body.echo:
            given["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
    return SamplingParams(**{**defaults, "max_tokens": COMPLETION_TOKENS, **given})


def max_tokens(body: GenerationRequest) -> int | None:
    """max_completion_tokens is OpenAI's new name of max_tokens; both with different values is an error."""
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise RequestError(
            f"max_tokens is {old} and max_completion_tokens is {new}; give one", param="max_completion_tokens"
        )
    return new if old is None else old


def _given(body: GenerationRequest) -> dict[str, Any]:
    if body.stream and body.prompt_logprobs is not None:
        raise RequestError("prompt_logprobs cannot be streamed; leave out stream", param="prompt_logprobs")
    if _depth(body.sampler_args) > MAX_SAMPLER_ARGS_DEPTH:
        raise RequestError(f"sampler_args is nested deeper than {MAX_SAMPLER_ARGS_DEPTH}", param="sampler_args")
    if len(msgspec.json.encode(body.sampler_args)) > MAX_SAMPLER_ARGS_BYTES:
        raise RequestError(f"sampler_args has more than {MAX_SAMPLER_ARGS_BYTES:,} bytes", param="sampler_args")
    given = {name: value for name in SAME_NAME if (value := getattr(body, name)) is not None}
    limit = max_tokens(body)
    return given if limit is None else {**given, "max_tokens": limit}


def _depth(value: Any) -> int:
    """Levels of lists and objects, without recursion: the value is the client's."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, (dict, list))]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth
