"""One sequence's answer: engine updates in, text out, with stop strings found and cut. Pure Python; the server and LLM both use it."""

from __future__ import annotations

from dataclasses import dataclass

from l4core.chat.detokenize import make_detokenizer
from l4core.chat.stops import StopMatch, StopMatcher
from l4core.chat.tokenizer import Tokenizer
from l4core.request import CompletionOutput, FinishReason, SamplingParams, SequenceUpdate, TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDelta:
    """What one update brought. text: may lag behind token_ids (incomplete characters, a possible beginning of a stop string).

    token_ids, logprobs: new tokens up to and including the one that ended the answer.  stop_reason: the stop string or stop token id that
    ended it, None for eos and length.  must_abort: a stop string ended it, so the engine must be told.  error: of FinishReason.ERROR.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    must_abort: bool = False
    error: str = ""


class Assembler:
    """Feed it every update of one request. What comes after the end is ignored: the engine may run a step ahead of an abort.

    num_cached_tokens: prompt tokens that were not computed anew.  num_drafted, num_accepted: guesses verified for it, and those that were right.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._params = params
        self._detokenizer = make_detokenizer(tokenizer, skip_special=params.skip_special_tokens)
        self._stops = StopMatcher(params.stop)
        self._pending = ""  # decoded, not yet told
        self._num_told = 0
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs: list[TokenLogprobs | None] = []
        self._end = TextDelta()
        self.num_cached_tokens = self.num_drafted = self.num_accepted = 0

    @property
    def finished(self) -> bool:
        return self._end.finish_reason is not None

    def feed(self, update: SequenceUpdate) -> TextDelta:
        """→ what is new; an empty TextDelta once the answer has ended."""
        if self.finished:
            return TextDelta()
        self._prompt_logprobs += update.prompt_logprobs
        self.num_cached_tokens = max(self.num_cached_tokens, update.num_cached_tokens)
        self.num_drafted += update.num_drafted
        self.num_accepted += update.num_accepted
        num_before = len(self._token_ids)
        match = self._take_tokens(update)
        if match is None and update.finish_reason is not None:
            match = self._look(self._detokenizer.finish(), update.finish_reason)
        delta = self._delta(update, match, num_before)
        self._texts.append(delta.text)
        self._end = delta
        return delta

    def output(self, index: int) -> CompletionOutput:
        """The answer so far (all of it once finished) as the index-th of its prompt."""
        reason = self._end.finish_reason
        asked = self._params.logprobs is not None
        return CompletionOutput(
            index=index,
            text="".join(self._texts),
            token_ids=list(self._token_ids),
            finish_reason=None if reason is None else reason.value,
            stop_reason=self._end.stop_reason,
            logprobs=[as_dict(p) for p in self._logprobs] if asked else None,
            token_logprobs=list(self._logprobs) if asked else None,
            error=self._end.error,
        )

    def prompt_token_logprobs(self) -> list[TokenLogprobs | None]:
        """Prompt logprobs as the engine sent them; the first is None."""
        return list(self._prompt_logprobs)

    def prompt_logprobs(self) -> list[dict[int, float] | None] | None:
        """Per prompt token: token id → logprob (the first None); None when they were not asked for."""
        if self._params.prompt_logprobs is None:
            return None
        return [None if p is None else as_dict(p) for p in self._prompt_logprobs]

    def _take_tokens(self, update: SequenceUpdate) -> StopMatch | None:
        """Detokenise token by token, so that a stop string ends the answer at the very token that completes it."""
        last = len(update.new_token_ids) - 1
        for i, token_id in enumerate(update.new_token_ids):
            self._token_ids.append(token_id)
            self._logprobs += update.logprobs[i : i + 1]
            hidden = i == last and update.stop_token_id == token_id and not self._shows_stop_token
            match = None if hidden else self._look(self._detokenizer.add((token_id,)))
            if match is not None:
                return match
        return None

    @property
    def _shows_stop_token(self) -> bool:
        return self._params.include_stop_str_in_output or not self._params.skip_special_tokens

    def _look(self, text: str, reason: FinishReason | None = None) -> StopMatch | None:
        """Add text and look for stop strings in it; an answer that was aborted or failed keeps that reason."""
        self._pending += text
        broken = reason in (FinishReason.ABORT, FinishReason.ERROR)
        return self._stops.feed(text, allowed=not broken and len(self._token_ids) > self._params.min_tokens)

    def _delta(self, update: SequenceUpdate, match: StopMatch | None, num_before: int) -> TextDelta:
        reason = update.finish_reason
        stop_reason: int | str | None
        if match is not None:
            end = match.end if self._params.include_stop_str_in_output else match.begin
            reason, stop_reason = FinishReason.STOP, match.stop
        else:
            end = self._num_told + len(self._pending) - (self._stops.num_open if reason is None else 0)
            stop_reason = update.stop_token_id if update.stop_token_id in self._params.stop_token_ids else None
        told, self._pending = self._pending[: end - self._num_told], self._pending[end - self._num_told :]
        self._num_told = end
        return TextDelta(
            text=told,
            token_ids=tuple(self._token_ids[num_before:]),
            logprobs=tuple(self._logprobs[num_before:]),
            finish_reason=reason,
            stop_reason=stop_reason,
            must_abort=match is not None and update.finish_reason is None,
            error=update.error,
        )


def as_dict(logprobs: TokenLogprobs) -> dict[int, float]:
    """token id → logprob: the token itself first, then the most likely ones."""
    return {logprobs.token_id: logprobs.logprob, **dict(logprobs.top)}
