"""Response bodies, as typed structs. Field order is that of OpenAI's own replies; what L4 adds is marked."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType


class PromptTokensDetails(msgspec.Struct):
    """cached_tokens: of the prompt, taken from the prefix cache."""

    cached_tokens: int = 0


class CompletionTokensDetails(msgspec.Struct):
    """Guesses of speculation that were verified: right ones, which are part of the answer, and the others."""

    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


class Usage(msgspec.Struct, kw_only=True):
    """Tokens of one HTTP call: each prompt once, all answers. completion_tokens_details: where guesses were verified."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET


class PromptLogprob(msgspec.Struct, kw_only=True):
    """An extension (vLLM's shape): one candidate at one prompt position."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[int, PromptLogprob] | None]


class TopLogprob(msgspec.Struct):
    """One candidate token. bytes: its UTF-8, null where the token alone is not whole characters."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(msgspec.Struct):
    """The chosen token and the most likely ones."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatTokenLogprob]
    refusal: None = None


class AnswerMessage(msgspec.Struct):
    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(msgspec.Struct, kw_only=True):
    """stop_reason is an extension: the stop string or stop token id that ended the answer, null for eos and length."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None


class ChatCompletion(msgspec.Struct, kw_only=True):
    """Reply of POST /v1/chat/completions. prompt_logprobs is an extension, present when asked for."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Delta(msgspec.Struct, omit_defaults=True, kw_only=True):
    """role: in a choice's first chunk only."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(msgspec.Struct, kw_only=True):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | UnsetType | None = UNSET


class ChatChunk(msgspec.Struct, kw_only=True):
    """One event of a streamed chat answer. usage: absent unless asked for, null until the last chunk, whose choices are empty."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET


class CompletionLogprobs(msgspec.Struct, kw_only=True):
    """Parallel lists over the tokens; with echo the prompt's come first, its first token_logprob and top_logprobs null.
    text_offset: characters before each token in `text`, counted from the beginning of the whole answer."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, kw_only=True):
    """stop_reason and prompt_logprobs are extensions."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | UnsetType | None = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(msgspec.Struct, kw_only=True):
    """Reply of POST /v1/completions, and one event of its stream (where usage is as in ChatChunk)."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET


class Model(msgspec.Struct, kw_only=True):
    """max_model_len is an extension: prompt and answer together, in tokens."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "l4"
    max_model_len: int


class ModelList(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Model]


class Tokens(msgspec.Struct, kw_only=True):
    """Reply of POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(msgspec.Struct):
    """Reply of POST /detokenize."""

    prompt: str


class Status(msgspec.Struct):
    """Reply of GET /health and GET /ready. status: the engine's state, or draining."""

    status: str


class Version(msgspec.Struct):
    version: str


class ErrorDetail(msgspec.Struct, kw_only=True):
    """param: the field at fault.  code: for machines."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(msgspec.Struct):
    """Body of every reply that is not 2xx."""

    error: ErrorDetail
