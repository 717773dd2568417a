"""The overlapped loop: each batch is chosen and queued before the tokens of the one before are known. Its tokens are the simple loop's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.profile import DEVICE
from l4core import LLM, SamplingParams
from l4core.engine.engine import Engine
from l4core.engine.inbox import Inbox
from l4core.request import FinishReason, Request

NUM = 64
Params = Callable[[int], SamplingParams]
BACKEND = "sdpa" if DEVICE == "cpu" else "triton"
"""On a GPU l4-triton: the one backend with IEEE float32 there."""


def build(folder: Path, *, overlap: bool, **options: object) -> LLM:
    given = {"max_running_requests": 24, "max_total_tokens": 6000, "chunked_prefill_size": 200, "page_size": 16}
    given |= {"dtype": "float32"}
    llm = LLM(
        folder.as_posix(),
        device=DEVICE,
        attention_backend=BACKEND,
        progress=False,
        **(given | options),
    )
    engine = llm._built.engine
    engine.overlap, engine.scheduler.max_in_flight = overlap, 2 if overlap else 1
    return llm


def prompts() -> list[list[int]]:
    """Lengths on both sides of the chunk borders; every third begins like others."""
    return [[(j if i % 3 == 0 else 7 * i + j) % 256 for j in range(1 + 29 * i % 140)] for i in range(NUM)]


def plain(i: int) -> SamplingParams:
    """Greedy or sampled; some end by themselves, some by length."""
    early = {"min_tokens": 12, "stop_token_ids": range(250)}  # half of all tokens end it, once they may
    kinds = [{}, {"top_p": 0.8}, {"top_k": 20}, {"logit_bias": {5: 1.0}}, early, {"logprobs": 1}]
    stops = {"stop_token_ids": range(3 * i % 200, 3 * i % 200 + 25)} if i % 2 else {}
    return SamplingParams(
        temperature=(0.0, 0.8, 1.3)[i % 3], seed=i, max_tokens=12 + 11 * i % 37, **(stops | kinds[i % len(kinds)])
    )


def looking_back(i: int) -> SamplingParams:
    return plain(i) if i % 9 else SamplingParams(temperature=0.9, seed=i, max_tokens=20, repetition_penalty=1.3)


Answers = list[tuple[list[int], str | None, list[dict[int, float]] | None]]


def answers(llm: LLM, params: Params) -> Answers:
    found = llm.generate(prompts(), [params(i) for i in range(NUM)], use_tqdm=False)
    engine = llm._built.engine
    while engine.has_work:
        engine.step()
    engine.scheduler.check_integrity()
    assert not any(engine.scheduler.kv.pages_used.values())
    return [(o.outputs[0].token_ids, o.outputs[0].finish_reason, o.outputs[0].logprobs) for o in found]


@pytest.fixture(scope="module")
def simple(tiny: Path) -> Callable[[Params], Answers]:
    """Of the simple loop with memory for all; made once."""
    return functools.cache(lambda params: answers(build(tiny, overlap=False), params))


@pytest.mark.parametrize(("params", "pool"), [(plain, 6000), (plain, 700), (looking_back, 700)])
def test_tokens_are_those_of_the_simple_loop(
    tiny: Path, simple: Callable[[Params], Answers], params: Params, pool: int
) -> None:
    """64 mixed requests; in the pool of 700 tokens they evict each other while batches are in flight. looking_back: penalties stop the overlap."""
    found, wanted = answers(build(tiny, overlap=True, max_total_tokens=pool), params), simple(params)
    assert [a[:2] for a in found] == [a[:2] for a in wanted]
    assert {reason for _, reason, _ in found} == {"stop", "length"}
    for mine, theirs in zip(found, wanted, strict=True):
        for a, b in zip(mine[2] or (), theirs[2] or (), strict=True):
            assert a == pytest.approx(b, abs=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "margin"), [("dense", 0.13), ("experts", 1.0)])
def test_in_bfloat16_tokens_part_only_where_two_are_nearly_equal(
    make_tiny: Callable[..., Path], kind: str, margin: float, record_property: Callable[[str, object], None]
) -> None:
    """The loops put other rows beside a request, so products may round otherwise. Where greedy answers part, the best two logits are two steps of
    bfloat16 apart at most. With experts a router's tie sends a token elsewhere, which moves logits by more than a rounding."""
    folder = make_tiny(step=100) if kind == "dense" else make_tiny()
    answers = {}
    for overlap in (False, True):
        llm = build(folder, overlap=overlap, dtype="bfloat16")
        params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, logprobs=2)
        answers[overlap] = [o.outputs[0] for o in llm.generate(prompts(), params, use_tqdm=False)]
    margins = []
    for mine, theirs in zip(answers[True], answers[False], strict=True):
        part = next((i for i, (a, b) in enumerate(zip(mine.token_ids, theirs.token_ids, strict=True)) if a != b), None)
        if part is not None:
            best, second = sorted(theirs.logprobs[part].values(), reverse=True)[:2]
            margins.append(best - second)
    record_property("answers that part", len(margins))
    print(f"{kind}: {len(margins)} of {NUM} answers part, at margins of {sorted(round(m, 4) for m in margins)}")
    assert max(margins, default=0.0) < margin, margins


def ask(request_id: str, max_tokens: int = 30, **params: object) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=[1, 2, 3],
        params=SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **params),
        eos_token_ids=(),
        max_total_tokens=100,
    )


def run(engine: Engine, steps: int) -> list[tuple[str, int]]:
    """(request id, token) as they come."""
    return [(u.request_id, t) for _ in range(steps) for u in engine.step().updates for t in u.new_token_ids]


def test_a_token_comes_one_step_later_and_the_last_one_is_seen_coming(tiny: Path) -> None:
    engine = build(tiny, overlap=True)._built.engine
    assert not engine.step(Inbox(requests=[ask("a", max_tokens=3)])).updates
    seen = [[(len(u.new_token_ids), u.finish_reason) for u in engine.step().updates] for _ in range(3)]
    assert seen == [[(1, None)], [(1, None)], [(1, FinishReason.LENGTH)]]
    assert not engine.has_work, "a step was computed behind the last token that max_tokens allows"


def test_what_is_computed_behind_an_end_is_dropped(tiny: Path) -> None:
    engine = build(tiny, overlap=True)._built.engine
    engine.step(Inbox(requests=[ask("a")]))
    tokens = [token for _, token in run(engine, 40)]
    stop = tokens[4]
    engine.step(Inbox(requests=[ask("b", stop_token_ids=(stop,))]))
    updates = [u for _ in range(40) for u in engine.step().updates]
    assert [t for u in updates for t in u.new_token_ids] == tokens[: tokens.index(stop) + 1]
    assert updates[-1].finish_reason is FinishReason.STOP
    assert not engine.has_work
    engine.scheduler.check_integrity()


def test_an_abort_in_flight_leaves_nothing_behind(tiny: Path) -> None:
    engine = build(tiny, overlap=True)._built.engine
    engine.step(Inbox(requests=[ask("a"), ask("b")]))
    run(engine, 3)
    output = engine.step(Inbox(aborts=["a"]))
    assert [u.finish_reason for u in output.updates if u.request_id == "a"] == [FinishReason.ABORT]
    assert {name for name, _ in run(engine, 40)} == {"b"}
    assert not engine.has_work
    assert not any(engine.scheduler.kv.pages_used.values())


def test_a_step_that_fails_gives_its_requests_back(tiny: Path) -> None:
    """Two batches are lost; both requests start over and get the tokens they would have got."""
    engine = build(tiny, overlap=True)._built.engine
    engine.step(Inbox(requests=[ask("a"), ask("b")]))
    before = run(engine, 5)
    execute = engine.runner.execute

    def fail(forward: object) -> None:
        raise KeyboardInterrupt

    engine.runner.execute = fail  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.runner.execute = execute  # type: ignore[method-assign]
    engine.scheduler.check_integrity()
    tokens = before + run(engine, 60)
    other = build(tiny, overlap=False)._built.engine
    other.step(Inbox(requests=[ask("x")]))
    wanted = [ask("x").request_id] and [t for _, t in run(other, 40)]
    assert [t for name, t in tokens if name == "a"][1:] == wanted
    assert [t for name, t in tokens if name == "a"] == [t for name, t in tokens if name == "b"]
