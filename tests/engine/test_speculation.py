"""Speculation changes no token: greedy and sampled, at any acceptance, across chunk borders, alone and in a crowd, on every CPU backend.

Freed pages hold NaN. The drafter knows the true answers and gets its guesses right with a chosen probability, so all the ways a draft can be
accepted, cut or refused are met.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers.evictions import evict_every
from helpers.profile import FULL
from helpers.ties import is_tie
from l4core import LLM, SamplingParams
from l4core.engine.speculation.drafter import PluginSpeculation
from l4core.plugin_api import DraftRow
from l4core.request import RequestOutput
from l4core.testing.recorded_drafter import RecordedDrafter

NUM_PROMPTS, NUM_TOKENS = (500, 200) if FULL else (50, 100)
SHAPE = {"layers": 4, "hidden": 64, "heads": 4, "head_dim": 16, "inter": 128, "chunk": 32, "floor_scale": 32}
OPTIONS: Mapping[str, Any] = {
    "speculative_adaptive": "off",
    "dtype": "float32",
    "device": "cpu",
    "progress": False,
    "page_size": 16,
}
NUM_DRAFTS = 3
MODES: Sequence[Mapping[str, Any]] = (
    {"temperature": 0.0},
    {"temperature": 0.7, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"temperature": 1.3, "top_p": 0.95, "repetition_penalty": 1.2, "min_p": 0.01},
    {"temperature": 0.0, "frequency_penalty": 0.7, "logprobs": 2},
    {"temperature": 1.0, "min_tokens": 30, "logprobs": 0, "stop_token_ids": tuple(range(150))},
)


@pytest.fixture(scope="module")
def folder(make_tiny) -> Path:
    made: Path = make_tiny(**SHAPE)
    return made


def prompts(count: int = NUM_PROMPTS) -> list[list[int]]:
    """Lengths around every border of the first three chunks; many begin alike, so that prefixes are found."""
    return [[(7 * i + i // 9) % 250 for i in range(5 + 7 * n % 90)] + [n % 250] for n in range(count)]


def params(count: int = NUM_PROMPTS) -> list[SamplingParams]:
    """Every mode; some end at a stop id of their own."""
    return [
        SamplingParams(
            **{"stop_token_ids": (17,) if n % 7 == 0 else (), **MODES[n % 5]},
            max_tokens=NUM_TOKENS,
            seed=n,
            ignore_eos=n % 4 != 0,
        )
        for n in range(count)
    ]


def open_llm(folder: Path, **options: Any) -> LLM:
    llm = LLM(folder.as_posix(), **{**OPTIONS, **options})
    engine = llm._built.engine
    engine.scheduler.kv._on_empty = engine.runner.memory.poison
    return llm


Answers = Mapping[tuple[tuple[int, ...], int | None], Sequence[int]]


@pytest.fixture(scope="module")
def plain(folder: Path) -> list[RequestOutput]:
    """Without speculation."""
    return open_llm(folder).generate(prompts(), params(), use_tqdm=False)


def speculate(
    llm: LLM,
    outputs: Sequence[RequestOutput],
    *,
    acceptance: float | None = None,
    drafts: int = NUM_DRAFTS,
    branches: int = 1,
) -> None:
    """Makes `llm` guess from these recorded outputs of `params()`. acceptance None: a fifth of the requests each at 0, ¼, ½, ¾ and 1."""
    answers = {
        (tuple(o.prompt_token_ids), p.seed): o.outputs[0].token_ids
        for o, p in zip(outputs, params(len(outputs)), strict=True)
    }

    def chance(row: DraftRow) -> float:
        return acceptance if acceptance is not None else (row.params.seed or 0) // 5 % 5 / 4

    vocab_size = llm._built.model_config.vocab_size
    drafter = RecordedDrafter(
        lambda row: answers[tuple(row.prompt_token_ids), row.params.seed],
        chance,
        num_draft_tokens=drafts,
        vocab_size=vocab_size,
        branches=branches,
    )
    llm._built.engine.speculation = PluginSpeculation(
        "recorded", drafter, num_drafts=drafts, vocab_size=vocab_size, trees=branches > 1
    )


def assert_same(found: Sequence[RequestOutput], wanted: Sequence[RequestOutput], ties: LLM | None = None) -> None:
    """ties: an engine without speculation, where so many tokens are compared that rounding decides one now and then: at most one in 20,000, and
    only between tokens whose scores it cannot tell apart."""
    num_ties = 0
    for n, (mine, theirs) in enumerate(zip(found, wanted, strict=True)):
        mine_, theirs_ = mine.outputs[0], theirs.outputs[0]
        if ties is not None and mine_.token_ids != theirs_.token_ids:
            pairs = enumerate(zip(mine_.token_ids, theirs_.token_ids, strict=False))
            index, tokens = next((i, (a, b)) for i, (a, b) in pairs if a != b)
            assert is_tie(ties, mine.prompt_token_ids, params(n + 1)[n], index, tokens), (n, index, tokens)
            num_ties += 1
            continue
        assert mine_.token_ids == theirs_.token_ids
        assert (mine_.finish_reason, mine_.stop_reason, mine_.text) == (
            theirs_.finish_reason,
            theirs_.stop_reason,
            theirs_.text,
        )
        for a, b in zip(mine_.logprobs or [], theirs_.logprobs or [], strict=True):
            assert a == pytest.approx(b, abs=1e-4)
            assert next(iter(a)) == next(iter(b))
    assert num_ties <= sum(len(o.outputs[0].token_ids) for o in wanted) / 20_000


FLAGS = {"speculative_algorithm": "NGRAM", "speculative_num_steps": NUM_DRAFTS}


@pytest.fixture(scope="module")
def guessing(folder: Path, plain: list[RequestOutput]) -> Iterator[LLM]:
    llm = open_llm(folder, max_running_requests=16, **FLAGS)
    speculate(llm, plain)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def alone(folder: Path) -> LLM:
    """Without speculation, one request at a time."""
    return open_llm(folder, max_running_requests=1, disable_radix_cache=True)


def test_sixteen_at_a_time(guessing: LLM, plain: list[RequestOutput], alone: LLM) -> None:
    """All prompts: chunked prefill beside verification, prefix hits, stops inside an accepted draft."""
    assert_same(guessing.generate(prompts(), params(), use_tqdm=False), plain, alone if FULL else None)


def test_one_at_a_time(folder: Path, plain: list[RequestOutput], alone: LLM) -> None:
    count = NUM_PROMPTS if FULL else 10
    llm = open_llm(folder, max_running_requests=1, disable_radix_cache=True, **FLAGS)
    speculate(llm, plain)
    assert_same(llm.generate(prompts(count), params(count), use_tqdm=False), plain[:count], alone if FULL else None)


def test_pieces_and_preemption(folder: Path, plain: list[RequestOutput], alone: LLM) -> None:
    """Seven tokens a step, and memory for about three requests: drafts get what is left of both."""
    count = NUM_PROMPTS if FULL else 10
    options = {"chunked_prefill_size": 7, "max_running_requests": 6, "max_total_tokens": 600, "context_length": 300}
    llm = open_llm(folder, **options, **FLAGS)
    speculate(llm, plain, acceptance=0.7)
    evicted = evict_every(llm._built.engine, 17)
    assert_same(llm.generate(prompts(count), params(count), use_tqdm=False), plain[:count], alone if FULL else None)
    assert len(evicted) > 5
    assert not any(llm._built.engine.scheduler.kv.pages_used.values())


@pytest.mark.parametrize("drafts", [1, 7, 31])
def test_drafts_of_other_lengths(folder: Path, plain: list[RequestOutput], alone: LLM, drafts: int) -> None:
    """31 guesses and the last token fill a whole chunk."""
    count = NUM_PROMPTS if FULL else 10
    llm = open_llm(folder, speculative_algorithm="NGRAM", speculative_num_steps=drafts)
    speculate(llm, plain, acceptance=0.9, drafts=drafts)
    assert_same(llm.generate(prompts(count), params(count), use_tqdm=False), plain[:count], alone if FULL else None)


def test_the_reference_backend(folder: Path, plain: list[RequestOutput], alone: LLM) -> None:
    count = NUM_PROMPTS if FULL else 5
    llm = open_llm(folder, attention_backend="reference", **FLAGS)
    speculate(llm, plain)
    assert_same(llm.generate(prompts(count), params(count), use_tqdm=False), plain[:count], alone if FULL else None)


@pytest.mark.parametrize(("drafts", "branches"), [(7, 2), (12, 3), (31, 4)])
def test_trees(folder: Path, plain: list[RequestOutput], alone: LLM, drafts: int, branches: int) -> None:
    """Nodes stand in slots in the order of the draft; those of the accepted path move together, in chunked layers too, over every border."""
    count = NUM_PROMPTS if FULL else 12
    llm = open_llm(
        folder,
        attention_backend="reference",
        speculative_algorithm="NGRAM",
        speculative_num_steps=drafts,
        max_running_requests=4,
    )
    speculate(llm, plain, acceptance=0.8, drafts=drafts, branches=branches)
    assert_same(llm.generate(prompts(count), params(count), use_tqdm=False), plain[:count], alone if FULL else None)


def test_trees_and_chains_in_one_step(folder: Path, plain: list[RequestOutput]) -> None:
    """Preempted, in pieces, with prefix hits."""
    options = {"chunked_prefill_size": 16, "max_running_requests": 4, "max_total_tokens": 600, "context_length": 300}
    llm = open_llm(folder, attention_backend="reference", **options, **FLAGS)
    speculate(llm, plain, acceptance=0.6, branches=2)
    assert_same(llm.generate(prompts(8), params(8), use_tqdm=False), plain[:8])


def test_a_right_draft_saves_steps(folder: Path, plain: list[RequestOutput]) -> None:
    """At acceptance 1 a step brings four tokens: the guesses are verified, not merely thrown away."""
    llm = open_llm(folder, **FLAGS)
    speculate(llm, plain, acceptance=1.0)
    steps = 0
    step = llm._built.engine.step

    def counted(*args: Any) -> Any:
        nonlocal steps
        steps += 1
        return step(*args)

    llm._built.engine.step = counted  # type: ignore[method-assign]
    assert_same(llm.generate(prompts()[3], params()[3], use_tqdm=False), plain[3:4])
    assert steps <= len(plain[3].outputs[0].token_ids) / (NUM_DRAFTS + 1) + 3


def test_the_ngram_drafter(folder: Path) -> None:
    """Prompts that repeat themselves, greedy answers that loop."""
    texts = ["the cat and the dog and the cat and", "one two three one two three one", "a" * 80]
    wanted = open_llm(folder).generate(texts, SamplingParams(max_tokens=80, temperature=0.0, ignore_eos=True))
    llm = open_llm(folder, **FLAGS)
    assert_same(llm.generate(texts, SamplingParams(max_tokens=80, temperature=0.0, ignore_eos=True)), wanted)
