"""What a user asks (SamplingParams, Request) and what comes back. Plain data: no torch, no tokenizer, safe to send between processes.

All records are frozen and msgspec-friendly: dataclasses, or msgspec structs (a fourteenth of the time to create) where one is made per token.
`SamplingParams` checks itself, so a bad value never reaches the engine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import msgspec

from l4core.errors import RequestError

MAX_STOP_STRINGS = 16
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIASES = 1024
MAX_LOGPROBS = 20
MAX_SAMPLER_NAME = 100
MIN_REPETITION_PENALTY = 0.01
"""Logits are divided by it: far below, they leave float32."""
MAX_SHOWN, MAX_LISTED = 200, 8
"""Characters and entries of a wrong value that an error repeats."""


class FinishReason(StrEnum):
    """Why a sequence ended. STOP and LENGTH are OpenAI's words; ABORT = client gone; ERROR = this request failed."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens.

    n: answers per prompt.  max_tokens: None = until the context is full.  temperature: ≥ 0, 0 = greedy.  top_p ∈ (0, 1].  top_k: 0 or −1 = off.
    min_p ∈ [0, 1]: tokens below min_p × the best probability are dropped.  presence_penalty, frequency_penalty ∈ [−2, 2] over output tokens;
    repetition_penalty ∈ [0.01, 10] over prompt and output.  logit_bias: token id → added.  seed: None = drawn by the front end.  stop: strings;
    stop_token_ids: ids, beside the checkpoint's eos ids unless ignore_eos.  min_tokens: no end before that many.  logprobs: number of top
    entries per output token (0 = the chosen one only), None = off; prompt_logprobs the same over the prompt.  Log-probabilities are those of
    the model's raw logits, before penalties and temperature.  sampler, sampler_args: a named sampler plugin and its arguments.
    None for stop, stop_token_ids, logit_bias or sampler_args means none, as in vLLM.
    """

    n: int = 1
    max_tokens: int | None = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    sampler: str = "default"
    sampler_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids"):
            object.__setattr__(self, name, _as_tuple(getattr(self, name)))
        for name in ("logit_bias", "sampler_args"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, {})
        for name, ok, wanted in self._rules():
            if not ok:
                raise RequestError(f"{name} is {_shown(getattr(self, name))}; wanted {wanted}", param=name)

    def _rules(self) -> list[tuple[str, bool, str]]:
        """(field, is it fine, what was wanted)."""
        return [
            ("n", _is_int(self.n) and 1 <= self.n <= 128, "a whole number from 1 to 128"),
            (
                "max_tokens",
                self.max_tokens is None or (_is_int(self.max_tokens) and self.max_tokens >= 1),
                "a whole number of at least 1",
            ),
            ("temperature", _in(self.temperature, 0.0, 100.0), "a finite number from 0 to 100"),
            ("top_p", _in(self.top_p, 0.0, 1.0) and self.top_p > 0, "a number above 0 and at most 1"),
            ("top_k", _is_int(self.top_k) and self.top_k >= -1, "a whole number of at least −1 (0 and −1 mean off)"),
            ("min_p", _in(self.min_p, 0.0, 1.0), "a number from 0 to 1"),
            ("presence_penalty", _in(self.presence_penalty, -2.0, 2.0), "a number from −2 to 2"),
            ("frequency_penalty", _in(self.frequency_penalty, -2.0, 2.0), "a number from −2 to 2"),
            (
                "repetition_penalty",
                _in(self.repetition_penalty, MIN_REPETITION_PENALTY, 10.0),
                f"a number from {MIN_REPETITION_PENALTY} to 10",
            ),
            (
                "logit_bias",
                isinstance(self.logit_bias, Mapping)
                and len(self.logit_bias) <= MAX_LOGIT_BIASES
                and all(_is_int(k) and k >= 0 and _in(v, -100.0, 100.0) for k, v in self.logit_bias.items()),
                f"at most {MAX_LOGIT_BIASES} entries, token id → a number from −100 to 100",
            ),
            (
                "seed",
                self.seed is None or (_is_int(self.seed) and -(2**63) <= self.seed < 2**64),
                "a whole number of 64 bits",
            ),
            (
                "stop",
                len(self.stop) <= MAX_STOP_STRINGS and all(isinstance(s, str) and s for s in self.stop),
                f"at most {MAX_STOP_STRINGS} non-empty strings",
            ),
            (
                "stop_token_ids",
                len(self.stop_token_ids) <= MAX_STOP_TOKEN_IDS
                and all(_is_int(t) and t >= 0 for t in self.stop_token_ids),
                f"at most {MAX_STOP_TOKEN_IDS} token ids",
            ),
            (
                "min_tokens",
                _is_int(self.min_tokens)
                and self.min_tokens >= 0
                and (self.max_tokens is None or self.min_tokens <= self.max_tokens),
                "a whole number from 0 to max_tokens",
            ),
            (
                "logprobs",
                self.logprobs is None or (_is_int(self.logprobs) and 0 <= self.logprobs <= MAX_LOGPROBS),
                f"a whole number from 0 to {MAX_LOGPROBS}",
            ),
            (
                "prompt_logprobs",
                self.prompt_logprobs is None
                or (_is_int(self.prompt_logprobs) and 0 <= self.prompt_logprobs <= MAX_LOGPROBS),
                f"a whole number from 0 to {MAX_LOGPROBS}",
            ),
            *((name, isinstance(getattr(self, name), bool), "true or false") for name in _FLAGS),
            (
                "sampler",
                isinstance(self.sampler, str) and len(self.sampler) <= MAX_SAMPLER_NAME,
                f"a name of at most {MAX_SAMPLER_NAME} characters",
            ),
            ("sampler_args", isinstance(self.sampler_args, Mapping), "names and values"),
        ]


_FLAGS = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens")


def _as_tuple(value: Any) -> tuple[Any, ...]:
    """Users write stop="x" as often as stop=["x"]; what is inside is checked by the rules."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)


def _shown(value: object) -> str:
    """As an error repeats it: a wrong value may be megabytes long."""
    if isinstance(value, (tuple, Mapping)) and len(value) > MAX_LISTED:
        return f"a list of {len(value)} entries"
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def _is_int(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _in(x: object, low: float, high: float) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) and low <= x <= high


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sequence to generate, as the engine sees it (a prompt with n > 1 becomes n of these). params.seed is set, params.n is 1.

    eos_token_ids: what ends it beside params.stop_token_ids (empty under ignore_eos).  max_total_tokens: prompt + output, at most the context.
    priority: higher first.  cache_salt: only requests of the same salt share cached prefixes.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    eos_token_ids: Sequence[int]
    max_total_tokens: int
    priority: int = 0
    cache_salt: str = ""


class TokenLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Logprobs at one position. logprob, rank: of the token itself (rank 1 = most likely).  top: the most likely (id, logprob), best first."""

    token_id: int
    logprob: float
    rank: int
    top: Sequence[tuple[int, float]] = ()


class SequenceUpdate(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What one step brought to one request: new tokens (with logprobs if asked), prompt logprobs as they are computed, the end if it came.
    num_drafted: guesses verified for it.  num_accepted: new tokens that were among them, all but the last, or all where the sequence ends at one."""

    request_id: str
    new_token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs] = ()
    prompt_logprobs: Sequence[TokenLogprobs | None] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str = ""
    num_cached_tokens: int = 0
    num_drafted: int = 0
    num_accepted: int = 0


SLOWER, NO_GUESSES = DRAFT_PAUSES = ("slower", "no_guesses")
"""Why guessing pauses: plain steps are faster, or none was made for a while although some were wanted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """Gauges and counters after a step; the server's /metrics and the logs are made of these. Pages are counted per KV group.

    pages_total: were all memory that group's.  pages_cached: held by nobody, still findable.  num_prefix_hits: tokens that started sequences
    found computed in this step.
    drafted_at[i]: sequences that had a guess number i + 1 judged in this step (behind the end of an answer none is); accepted_at[i]: those whose
    guesses up to it were right.  num_drafted_tokens: all guesses verified; of a tree there are several at one depth.
    num_guesses: made for a sequence, as deep as any; None = nothing decoded.  draft_pause: one of DRAFT_PAUSES where guessing has paused.
    num_prefill_scores: tokens that the prompt tokens looked at, summed, of a layer without chunks.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_preemptions: int = 0
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    num_prefill_scores: float = 0.0
    pages_used: Mapping[str, int] = field(default_factory=dict)
    pages_total: Mapping[str, int] = field(default_factory=dict)
    pages_cached: Mapping[str, int] = field(default_factory=dict)
    num_prefix_hits: Mapping[str, int] = field(default_factory=dict)
    drafted_at: tuple[int, ...] = ()
    accepted_at: tuple[int, ...] = ()
    num_drafted_tokens: int = 0
    num_guesses: float | None = None
    draft_pause: str = ""

    @property
    def num_accepted_tokens(self) -> int:
        """Guesses that were right, and all before them."""
        return sum(self.accepted_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """All that leaves `Engine.step`."""

    updates: Sequence[SequenceUpdate] = ()
    stats: StepStats = field(default_factory=StepStats)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One answer. logprobs[i]: token id → logprob for output token i (the chosen token first).  text excludes the stop string unless asked.
    error: why, when finish_reason is "error"."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None = None
    logprobs: list[dict[int, float]] | None = None
    token_logprobs: list[TokenLogprobs] | None = None
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """All answers to one prompt. prompt_logprobs[0] is None (the first token has no predecessor)."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, float] | None] | None = None
    num_cached_tokens: int = 0
    finished: bool = True
