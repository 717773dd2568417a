"""The same requests through an engine of one rank and through engines of several, and what every row of every step computed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from l4core.config import EngineConfig
from l4core.engine.batch import Draft, DraftRequest, ScheduledBatch
from l4core.engine.inbox import Inbox
from l4core.engine.run.fixed_step import Computed
from l4core.engine.run.runner import Forward, Runner
from l4core.engine.speculation.drafter import Speculation
from l4core.engine.start.build import BuiltEngine, build_engine
from l4core.parallel.ranks import Ranks
from l4core.request import Request, SamplingParams, TokenLogprobs
from l4core.testing.ranks.threads import run_ranks

CHUNK = 64
AT_ONCE = 44
"""Requests in the first inbox; every second step brings one more."""


@dataclass(kw_only=True)
class Served:
    """By request id: tokens, logprobs, prompt_logprobs.  logits: (request id, position) → row."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    logits: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    num_steps: int = 0
    guesses: list[tuple[str, Draft]] = field(default_factory=list)


def mixed_requests(count: int, vocab: int, *, max_tokens: int = 12) -> list[Request]:
    """Prompts that end around chunk borders and in between, half of a common beginning; every way to draw there is."""
    dice = random.Random(7)
    beginning = [dice.randrange(vocab) for _ in range(3 * CHUNK)]
    lengths = [1, 5, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - 1, 2 * CHUNK + 1, 100]
    ways: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.8},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 0.9, "min_p": 0.1},
        {"temperature": 1.2, "top_k": 9, "repetition_penalty": 1.3},
        {"temperature": 0.7, "logprobs": 3},
        {"temperature": 0.0, "logprobs": 0, "prompt_logprobs": 2},
        {"temperature": 0.5, "logit_bias": {5: 4.0}, "frequency_penalty": 0.5},
    ]
    made = []
    for i in range(count):
        length, way = lengths[i % len(lengths)], ways[i * 5 // 3 % len(ways)]
        prompt = beginning[:length] if i % 2 else [dice.randrange(vocab) for _ in range(length)]
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=i, **way)
        made.append(
            Request(
                request_id=str(i),
                prompt_token_ids=prompt,
                params=params,
                eos_token_ids=(),
                max_total_tokens=len(prompt) + max_tokens,
            )
        )
    return made


def serve(folder: Path, requests: Sequence[Request], ranks: Ranks, *, keep: bool = True, **options: Any) -> Served:
    """One rank's part. keep: logits of every row, a gather a step."""
    built = build_engine(rank_config_of(folder, ranks, **options), ranks=ranks, progress=False)
    return serve_with(built, requests, ranks, keep=keep)


def rank_config_of(folder: Path, ranks: Ranks, **options: Any) -> EngineConfig:
    """Small pieces and pages, on a CPU in float32 unless `options` say otherwise."""
    small = {
        "max_total_tokens": 16384,
        "page_size": 16,
        "chunked_prefill_size": 96,
        "device": "cpu",
        "dtype": "float32",
    }
    return EngineConfig(model=folder.as_posix(), tp=ranks.size, **{**small, **options})


def serve_with(built: BuiltEngine, requests: Sequence[Request], ranks: Ranks, *, keep: bool = True) -> Served:
    """`serve` with an engine that is there already."""
    served = Served()
    if keep:
        record(built.engine.runner, served)
    if built.engine.speculation is not None:
        note_guesses(built.engine.speculation, served)
    waiting = list(requests)
    inbox = Inbox(requests=[waiting.pop(0) for _ in range(min(AT_ONCE, len(waiting)))])
    for step in itertools.count():
        for update in built.engine.step(inbox).updates:
            served.tokens.setdefault(update.request_id, []).extend(update.new_token_ids)
            served.logprobs.setdefault(update.request_id, []).extend(update.logprobs or ())
            if update.error:
                served.errors.append(update.error)
        inbox = Inbox(requests=[waiting.pop(0)] if waiting and step % 2 else [])
        if not (waiting or built.engine.has_work):
            served.num_steps = step + 1
            served.counts = dict(ranks.counts)
            return served
    raise AssertionError


def serve_over(size: int, folder: Path, requests: Sequence[Request], **options: Any) -> list[Served]:
    """`serve` on `size` ranks that are threads."""
    return run_ranks(size, lambda ranks: serve(folder, requests, ranks, **options))


def record(runner: Runner, served: Served) -> None:
    """Keeps the logits of every row of every step from now on."""
    build, execute = runner.build, runner.execute
    last: list[ScheduledBatch] = []

    def recording_build(batch: ScheduledBatch) -> Forward:
        last[:] = [batch]
        return build(batch)

    def recording_execute(forward: Forward) -> Computed:
        computed = execute(forward)
        rows = iter(runner.model.logits(computed.hidden).cpu())
        for seq in last[0].sequences:
            for offset in range(len(seq.token_ids)):
                served.logits[seq.request.request_id, seq.start + offset] = next(rows)
        return computed

    runner.build, runner.execute = recording_build, recording_execute  # type: ignore[method-assign]


def note_guesses(speculation: Speculation, served: Served) -> None:
    """Keeps what is proposed from now on."""
    propose = speculation.propose

    def noting(asked: Sequence[DraftRequest], **how: Any) -> Mapping[str, Draft]:
        drafts = propose(asked, **how)
        served.guesses += sorted(drafts.items(), key=lambda item: item[0])
        return drafts

    speculation.propose = noting  # type: ignore[assignment, method-assign]


def compare(served: Sequence[Served], alone: Served, *, tolerance: float = 1e-4) -> float:
    """All ranks gave the same bits, and those of a rank alone up to `tolerance`; the same tokens → the largest difference of a logit."""
    first = served[0]
    assert not first.errors
    for other in served[1:]:
        assert other.tokens == first.tokens
        assert other.logits.keys() == first.logits.keys()
        assert all(torch.equal(row, first.logits[key]) for key, row in other.logits.items())
    assert first.logits.keys() == alone.logits.keys()
    worst = max(float((row - alone.logits[key]).abs().max()) for key, row in first.logits.items())
    assert worst <= tolerance, worst
    assert first.tokens == alone.tokens
    return worst
