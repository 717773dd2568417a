"""Graphs of decode steps on a GPU: a replay has the bits of the same step run eagerly, nothing waits for the device, tokens are those without."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from helpers.recording import greedy
from l4core import LLM, SamplingParams
from l4core.engine.inbox import Inbox
from l4core.engine.run.fixed_step import FixedStep, StepShape
from l4core.request import Request

pytestmark = pytest.mark.gpu


SIZES = (1, 3, 10, 14)


@pytest.fixture(autouse=True)
def few_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captures take most of these tests' time; four sizes have padding and none."""
    monkeypatch.setattr("l4core.engine.start.graph_sizes.batch_sizes", lambda largest: list(SIZES))


def build(folder: Path, **options: object) -> LLM:
    given = {"dtype": "float32", "device": "cuda", "max_running_requests": 14, "max_total_tokens": 8192}
    return LLM(folder.as_posix(), progress=False, **(given | options))


def prompts(count: int) -> list[list[int]]:
    return [[(7 * i + j) % 256 for j in range(20 + 23 * i % 150)] for i in range(count)]


def start(llm: LLM, count: int, new: int = 90) -> None:
    """`count` requests that have their first token."""
    requests = [
        Request(
            request_id=str(i),
            prompt_token_ids=ids,
            params=SamplingParams(
                max_tokens=new, temperature=i % 3 * 0.5, top_p=(1.0, 0.7)[i % 2], seed=i, ignore_eos=True
            ),
            eos_token_ids=(),
            max_total_tokens=400,
        )
        for i, ids in enumerate(prompts(count))
    ]
    engine = llm._built.engine
    engine.overlap, engine.scheduler.max_in_flight = False, 1
    engine.step(Inbox(requests=requests))
    while any(not seq.output_token_ids for seq in engine.scheduler.sequences):
        engine.step()


def clear(llm: LLM) -> None:
    engine = llm._built.engine
    engine.abort([seq.request.request_id for seq in engine.scheduler.sequences])
    engine.step()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_replay_has_the_bits_of_the_same_step_run_eagerly(tiny: Path, dtype: str) -> None:
    llm = build(tiny, dtype=dtype)
    engine, runner = llm._built.engine, llm._built.engine.runner
    for count, size in ((1, 1), (2, 3), (3, 3), (9, 10)):
        start(llm, count)
        for _ in range(70):  # over chunk borders
            batch = engine.scheduler.schedule()
            assert batch is not None
            step = runner.build(batch)
            assert isinstance(step, FixedStep)
            assert step.shape == StepShape(size, 1)
            twin = runner.fixed_step(step.shape)
            twin.inputs.copy_(step.inputs)
            last = runner._last_tokens.clone()
            eager = twin.run()
            runner._last_tokens.copy_(last)
            computed = runner.execute(step)
            assert torch.equal(computed.logits[:count], eager.logits[:count])
            assert torch.equal(computed.drawn[:, :count], eager.drawn[:, :count])
            assert computed.logits[:count].isfinite().all()
            engine.scheduler.commit(runner.draw(batch, step, computed, engine._parsed).wait())
        clear(llm)


def test_tokens_with_graphs_are_those_without(tiny: Path) -> None:
    """Greedy, sampled, top-p, penalties and log-probabilities beside each other, in float32."""
    kinds = [
        greedy(80),
        SamplingParams(temperature=0.9, seed=3, max_tokens=80, ignore_eos=True),
        SamplingParams(temperature=0.9, top_p=0.8, seed=4, max_tokens=80, ignore_eos=True),
        SamplingParams(temperature=0.7, frequency_penalty=0.5, seed=5, max_tokens=80, ignore_eos=True),
        greedy(80, logprobs=2),
        SamplingParams(temperature=1.0, seed=6, max_tokens=80, min_tokens=40),
    ]
    params = [kinds[i % len(kinds)] for i in range(14)]
    answers = {}
    for disabled in (False, True):
        llm = build(tiny, disable_cuda_graph=disabled)
        assert any("graphs" in line and ("off" in line) is disabled for line in llm.report)
        answers[disabled] = [o.outputs[0].token_ids for o in llm.generate(prompts(14), params, use_tqdm=False)]
        _no_sync(llm)
    assert answers[False] == answers[True]


def _no_sync(llm: LLM) -> None:
    """A step, with a graph or without, waits for nothing but its tokens."""
    start(llm, 5)
    engine, runner = llm._built.engine, llm._built.engine.runner
    for number in range(8):
        batch = engine.scheduler.schedule()
        assert batch is not None
        torch.cuda.synchronize()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it calls itself a prototype
            torch.cuda.set_sync_debug_mode("error" if number else "default")  # the first makes what is made once
        try:
            forward = runner.build(batch)
            pending = runner.draw(batch, forward, runner.execute(forward), engine._parsed)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        engine.scheduler.commit(pending.wait())
    clear(llm)
