"""An engine without a model, for the engine process of the server's tests: same contract (check, step, has_work), torch-free, made in milliseconds.

It answers every prompt with one sentence that names the seed, TELL FIELD with the value of that field. Other words in the prompt make it
misbehave: see `_waits` and `_advance`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from l4core.chat.tokenizer import Tokenizer
from l4core.config import EngineConfig
from l4core.engine.inbox import Inbox
from l4core.errors import CheckpointError, RequestError
from l4core.request import FinishReason, Request, SequenceUpdate, StepOutput, StepStats, TokenLogprobs

SENTENCE = "Seed {seed}: the capital of France is Paris. é🙂"
STEP_SECONDS = 0.001
MAX_RUNNING = 200

if TYPE_CHECKING:
    from l4core.parallel.ranks import Ranks


@dataclass
class Live:
    request: Request
    prompt: str
    answer: list[int]
    output: list[int] = field(default_factory=list)
    num_steps: int = 0


@dataclass(frozen=True)
class Built:
    engine: FakeEngine
    report: tuple[str, ...]
    folder: Path
    context_length: int
    drafts: None = None


class FakeEngine:
    launched = None

    def __init__(self, tokenizer: Tokenizer, ranks: Ranks | None = None) -> None:
        """ranks: of one engine; they add something up in each step, as a model does."""
        self.tokenizer = tokenizer
        self.ranks = ranks
        self.live: dict[str, Live] = {}

    @property
    def has_work(self) -> bool:
        return bool(self.live)

    def check(self, request: Request) -> object:
        if request.params.sampler != "default":
            raise RequestError(f"unknown sampler {request.params.sampler!r}", param="sampler")
        return None

    def step(self, inbox: Inbox) -> StepOutput:
        for request in inbox.requests:
            prompt = self.tokenizer.decode(request.prompt_token_ids, skip_special=True)
            told = re.search(r"TELL (\w+)", prompt)
            text = tell(request, told[1]) if told else SENTENCE.format(seed=request.params.seed)
            self.live[request.request_id] = Live(request, prompt, self.tokenizer.encode_text(text, allow_special=False))
        aborted = [i for i in inbox.aborts if self.live.pop(i, None) is not None]
        time.sleep(STEP_SECONDS)
        self._add_up()
        updates = [SequenceUpdate(request_id=i, finish_reason=FinishReason.ABORT) for i in aborted]
        running = list(self.live.values())[:MAX_RUNNING]
        updates += [self._advance(live) for live in running if not self._waits(live)]
        return StepOutput(updates=updates, stats=self._stats(len(running)))

    def _add_up(self) -> None:
        """With another rank that is gone, or hangs, this fails, or never ends."""
        if self.ranks is None or not self.live:
            return
        import torch

        for live in self.live.values():
            if self._is_told("HANG", live):
                time.sleep(3600)
        assert self.ranks.all_reduce(torch.ones(1)).item() == self.ranks.size

    def _is_told(self, word: str, live: Live) -> bool:
        """WORD is for all ranks, WORD 1 for rank 1."""
        told = re.search(rf"{word}(?: (\d))?", live.prompt)
        rank = 0 if self.ranks is None else self.ranks.rank
        return told is not None and (told[1] is None or int(told[1]) == rank)

    def _waits(self, live: Live) -> bool:
        """STALL: for ever.  SLOW: one step in 200.  HOLD FILE: until the file is there, for all ranks in the same step."""
        live.num_steps += 1
        hold = re.search(r"HOLD (\S+)", live.prompt)
        return (
            "STALL" in live.prompt
            or ("SLOW" in live.prompt and live.num_steps % 200 != 1)
            or (hold is not None and not self._all_see(Path(hold[1])))
        )

    def _all_see(self, file: Path) -> bool:
        if self.ranks is None:
            return file.exists()
        import torch

        return bool(self.ranks.all_reduce(torch.tensor([float(file.exists())])).item() == self.ranks.size)

    def _advance(self, live: Live) -> SequenceUpdate:
        if self._is_told("RAISE", live):
            raise RuntimeError("a kernel went wrong")
        if self._is_told("DIE", live):
            os.kill(os.getpid(), signal.SIGKILL)
        if self._is_told("HANG", live):
            time.sleep(3600)
        if "NAN" in live.prompt and len(live.output) == ("LATER" in live.prompt) * 3:
            return self._end(live, FinishReason.ERROR, error="the logits are not numbers")
        params = live.request.params
        at = len(live.output)
        ended = at >= len(live.answer) and not params.ignore_eos
        token = live.request.eos_token_ids[0] if ended else live.answer[at % len(live.answer)]
        token += self._is_told("DRIFT", live)
        live.output.append(token)
        first = len(live.output) == 1
        reason = FinishReason.STOP if ended else None
        if reason is None and len(live.output) >= (params.max_tokens or 0):
            reason = FinishReason.LENGTH
        if reason is not None:
            del self.live[live.request.request_id]
        return SequenceUpdate(
            request_id=live.request.request_id,
            new_token_ids=[token],
            logprobs=() if params.logprobs is None else [self._score(token, at, params.logprobs)],
            prompt_logprobs=self._prompt_scores(live) if first and params.prompt_logprobs is not None else (),
            finish_reason=reason,
            stop_token_id=token if reason is FinishReason.STOP else None,
            num_cached_tokens=0,
        )

    def _end(self, live: Live, reason: FinishReason, error: str = "") -> SequenceUpdate:
        del self.live[live.request.request_id]
        return SequenceUpdate(request_id=live.request.request_id, finish_reason=reason, error=error)

    def _score(self, token: int, at: int, top: int) -> TokenLogprobs:
        """At odd positions the token is only second best."""
        best, chosen = -0.25, -0.25 - (at % 2) / 8
        others = [((token + 1 + k) % 256, best - (k + 1 - at % 2)) for k in range(top)]
        ranked = sorted([(token, chosen), *others], key=lambda pair: -pair[1])[:top]
        return TokenLogprobs(token_id=token, logprob=chosen, rank=1 + at % 2, top=ranked)

    def _prompt_scores(self, live: Live) -> list[TokenLogprobs | None]:
        ids, top = live.request.prompt_token_ids, live.request.params.prompt_logprobs or 0
        return [None, *(self._score(token, at, top) for at, token in enumerate(ids[1:], start=1))]

    def _stats(self, num_running: int) -> StepStats:
        return StepStats(
            num_running=min(num_running, len(self.live)),
            num_waiting=max(0, len(self.live) - MAX_RUNNING),
            pages_used={"global": 2 * len(self.live)},
            pages_total={"global": 1000},
            pages_cached={"global": 3},
            num_prefix_hits={"global": 5},
        )


def tell(request: Request, name: str) -> str:
    """The value of a field of the request or of its parameters."""
    return json.dumps(getattr(request, name) if hasattr(request, name) else getattr(request.params, name))


def build(config: EngineConfig, *, ranks: Ranks | None = None) -> Built:
    """`download_dir` makes the start go wrong: "refused", "killed", "broken", "slow", or "once:FILE" (killed on every start but the first); with
    "@1" behind it on rank 1 only."""
    mode, _, rank = (config.download_dir or "").partition("@")
    if rank and (ranks is None or ranks.rank != int(rank)):
        mode = ""
    if mode == "refused":
        raise CheckpointError("the shard model-1.safetensors is truncated", fix="download it again")
    if mode == "slow":
        time.sleep(3600)
    if mode == "broken":
        raise ZeroDivisionError("a bug")
    if mode == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode.startswith("once:"):
        marker = Path(mode.removeprefix("once:"))
        if marker.exists():
            os.kill(os.getpid(), signal.SIGKILL)
        marker.touch()
    folder = Path(config.model)
    return Built(
        engine=FakeEngine(Tokenizer.from_folder(folder), ranks),
        report=("model           fake", "attention       none"),
        folder=folder,
        context_length=config.context_length or 512,
    )
