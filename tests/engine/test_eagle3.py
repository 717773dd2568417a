"""EAGLE3 in the engine: tokens are those without it, and every guess is the one that the draft's definition gives for the tokens known then.

The target's hidden states come from transformers. Guesses are mixed with the true answers, so that drafts are accepted, cut and refused at every
depth while the draft's keys and values must stay right: across chunk borders, in pieces, after prefix hits and preemption.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.eagle3_runs import (
    COUNT,
    LONGEST,
    OPTIONS,
    STEPS,
    TOKENS,
    Recorder,
    check_guesses,
    greedy,
    open_llm,
    prompts,
    target_of,
)
from helpers.evictions import evict_every
from l4core import LLM, SamplingParams
from l4core.engine.batch import Draft, DraftRequest, ScheduledBatch
from l4core.engine.engine import EMPTY
from l4core.engine.inbox import Inbox
from l4core.engine.run.fixed_step import StepShape
from l4core.engine.speculation.draft_steps import FixedExtend, FixedGuess
from l4core.errors import BackendUnavailable, CheckpointError, ConfigError
from l4core.request import RequestOutput, StepOutput
from l4core.testing.models.eagle3 import make_tiny_draft

SHAPE = {"layers": 6, "hidden": 64, "heads": 4, "head_dim": 16, "inter": 128, "chunk": 32, "floor_scale": 32}
DRAFTS: Sequence[Mapping[str, Any]] = (
    {"layout": "eagle", "draft_vocab": 200},
    {"layout": "speculators", "norm_before_residual": True, "norm_before_fc": True, "norm_output": True},
    {
        "layout": "speculators",
        "norm_before_residual": False,
        "fc_norm": True,
        "own_embed": True,
        "aux_layers": [1, 3, 5],
    },
    {"layout": "eagle", "norm_before_residual": True, "draft_vocab": 100},
)
LAYERS = ((1, 2, 4), (0, 2, 4), (0, 2, 4), (0, 4))
"""Whose outputs these drafts read, as they are counted inside."""


@pytest.fixture(scope="module")
def folder(make_tiny) -> Path:
    made: Path = make_tiny(**SHAPE)
    return made


@pytest.fixture(scope="module")
def plain(folder: Path) -> list[RequestOutput]:
    return open_llm(folder).generate(prompts(), greedy(), use_tqdm=False)


@pytest.mark.parametrize(("number", "relay"), [(0, False), (1, False), (0, True), (1, True), (2, True), (3, True)])
def test_guesses_are_the_definitions_and_tokens_are_the_targets(
    folder: Path, plain: list[RequestOutput], tmp_path: Path, number: int, relay: bool
) -> None:
    """Two requests at a time, in pieces of at most 20 tokens, with prefix hits; in every format and with every flag."""
    options = dict(DRAFTS[number])
    layers = LAYERS[number]
    options["aux_layers"] = [i + 1 for i in layers] if options["layout"] == "speculators" else list(layers)
    draft = make_tiny_draft(tmp_path / "draft", target_of(folder), **options)
    llm = open_llm(folder, draft, relay=relay, max_running_requests=2, chunked_prefill_size=20)
    recorder = Recorder(llm, plain, acceptance=(0.0, 0.8, 0.5, 1.0)[number])
    for mine, theirs in zip(llm.generate(prompts(), greedy(), use_tqdm=False), plain, strict=True):
        assert mine.outputs[0].token_ids == theirs.outputs[0].token_ids
    assert check_guesses(recorder, folder, draft, layers, plain) > 50
    assert (recorder.num_late > 50) is relay


def test_a_page_is_found_by_who_goes_on_as_it_was_read(folder: Path, tmp_path: Path) -> None:
    """The draft reads each position with the token after it, so the last entry of a page is another one where another token follows."""
    draft = make_tiny_draft(tmp_path / "draft", target_of(folder), aux_layers=[1, 2, 4])
    begin = prompts()[3][:32]
    asked = [[*begin, 7], [*begin, 8], [*begin, 8, 9, 10], [*begin, 7, 9, 10]]  # two pages, and one token or three
    plain = open_llm(folder).generate(asked, greedy(), use_tqdm=False)
    llm = open_llm(folder, draft)
    recorder = Recorder(llm, plain, acceptance=0.3)
    found = [llm.generate([prompt], greedy(), use_tqdm=False)[0] for prompt in asked]
    assert [one.num_cached_tokens for one in found] == [0, 16, 32, 32]
    assert [one.outputs[0].token_ids for one in found] == [one.outputs[0].token_ids for one in plain]
    assert check_guesses(recorder, folder, draft, (1, 2, 4), plain) > 50


class Eager:
    """In place of captured graphs: the same steps of fixed shape, run as they are."""

    def __init__(self, make: Callable[[StepShape], Any], shapes: Sequence[StepShape]) -> None:
        self._steps = {shape: make(shape) for shape in shapes}
        self.replays = 0

    def find(self, num_seqs: int, num_tokens: int) -> Any:
        fitting = [(s.num_tokens, s) for s in self._steps if s.num_tokens >= num_tokens and s.num_seqs >= num_seqs]
        return self._steps[min(fitting)[1]] if fitting else None

    def replay(self, step: Any) -> Any:
        self.replays += 1
        return step.run()


@pytest.mark.parametrize("relay", [False, True])
def test_steps_of_fixed_shape(
    folder: Path, plain: list[RequestOutput], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relay: bool
) -> None:
    """What graphs are captured from. Sizes 1, 2 and 4, of one row or four: of three sequences, some with one guess or two, and some without, because
    they have grown too long or none are wanted."""
    draft = make_tiny_draft(tmp_path / "draft", target_of(folder), aux_layers=[1, 2, 4], draft_vocab=200)
    llm = open_llm(folder, draft, relay=relay, max_running_requests=3, speculative_option=("longest_context=90",))
    engine = llm._built.engine
    speculation: Any = engine.speculation
    shapes = [StepShape(size, rows) for size in (1, 2, 4) for rows in (1, STEPS + 1)]
    aux = torch.zeros(4 * (STEPS + 1), 3 * 64)
    speculation._extends = Eager(lambda shape: FixedExtend(shape, speculation._state, aux), shapes)
    speculation._guesses = {
        sampled: Eager(
            partial(FixedGuess, state=speculation._state, sampled=sampled), [StepShape(s, STEPS) for s in (1, 2, 4)]
        )
        for sampled in (False, True)
    }
    shared, fill, step, count = [], FixedExtend.fill, engine.step, 0

    def filled(extend: FixedExtend, rows: Any, starts: Any, lengths: Any, *given: Any) -> None:
        shared.append((extend.shape.num_tokens, *sorted(lengths.tolist())))
        fill(extend, rows, starts, lengths, *given)

    def stepped(inbox: Inbox = EMPTY) -> StepOutput:
        nonlocal count
        count += 1
        return step(replace(inbox, num_drafts=(3, 1, 2, 3, 0)[count % 5]))

    monkeypatch.setattr(FixedExtend, "fill", filled)
    engine.step = stepped  # type: ignore[method-assign]
    recorder = Recorder(llm, plain, acceptance=0.7)
    for mine, theirs in zip(llm.generate(prompts(), greedy(), use_tqdm=False), plain, strict=True):
        assert mine.outputs[0].token_ids == theirs.outputs[0].token_ids
    assert check_guesses(recorder, folder, draft, (1, 2, 4), plain) > 50
    assert {(4, 2, 2, 2), (4, 3, 3, 3), (4, 1, 4, 4)} <= set(shared)
    assert speculation._guesses[False].replays > 20


@pytest.mark.parametrize("relay", [False, True])
def test_preempted_and_evicted(folder: Path, plain: list[RequestOutput], tmp_path: Path, relay: bool) -> None:
    """Memory for two requests at best: the draft's entries are computed again with the target's."""
    draft = make_tiny_draft(tmp_path / "draft", target_of(folder), aux_layers=[1, 2, 4])
    options = {"max_total_tokens": 2 * LONGEST - 20, "context_length": LONGEST, "max_running_requests": 4}
    llm = open_llm(folder, draft, relay=relay, **options)
    recorder, evicted = Recorder(llm, plain, acceptance=0.6), evict_every(llm._built.engine, 9)
    for mine, theirs in zip(llm.generate(prompts(), greedy(), use_tqdm=False), plain, strict=True):
        assert mine.outputs[0].token_ids == theirs.outputs[0].token_ids
    assert check_guesses(recorder, folder, draft, (1, 2, 4), plain) > 30
    assert len(evicted) > 5


def test_overlapped_while_nothing_is_guessed(folder: Path, plain: list[RequestOutput], tmp_path: Path) -> None:
    """Guesses are wanted for five steps, then not for four: those are queued ahead of the tokens before them, and the draft still reads them all.
    Requests end and are evicted while their last batch is in flight."""
    draft = make_tiny_draft(tmp_path / "draft", target_of(folder), aux_layers=[1, 2, 4])
    llm = open_llm(
        folder, draft, relay=True, max_total_tokens=2 * LONGEST + 20, context_length=LONGEST, max_running_requests=3
    )
    engine = llm._built.engine
    recorder, ahead, step, count = Recorder(llm, plain, acceptance=0.6), 0, engine.step, 0

    def stepped(inbox: Inbox = EMPTY) -> StepOutput:
        nonlocal ahead, count
        count += 1
        ahead += engine._in_flight is not None and count % 9 > 4
        return step(replace(inbox, num_drafts=0 if count % 9 > 4 else STEPS))

    speculation: Any = engine.speculation
    observe = speculation.observe

    def observed(batch: ScheduledBatch, *given: Any) -> None:
        """Only of sequences that still have their rows: what lies in the others' pages may be anyone's."""
        assert all(engine.scheduler.holds(seq) for seq in batch.sequences)
        observe(batch, *given)

    engine.step, speculation.observe = stepped, observed  # type: ignore[method-assign]
    evicted = evict_every(engine, 13)
    ends = [output.outputs[0].token_ids[(14 + 3 * n) % TOKENS] for n, output in enumerate(plain)]
    params = [
        SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True, stop_token_ids=(ends[n],) if n % 2 else ())
        for n in range(COUNT)
    ]
    for mine, theirs in zip(llm.generate(prompts(), params, use_tqdm=False), plain, strict=True):
        given = mine.outputs[0].token_ids
        assert given == theirs.outputs[0].token_ids[: len(given)]
    assert check_guesses(recorder, folder, draft, (1, 2, 4), plain) > 50
    assert ahead > 30
    assert len(evicted) > 3
    assert recorder.num_late > 30


def test_no_guesses_beyond_a_length(folder: Path, plain: list[RequestOutput], tmp_path: Path, caplog: Any) -> None:
    draft = make_tiny_draft(tmp_path / "draft", target_of(folder), aux_layers=[1, 2, 4])
    llm = open_llm(folder, draft, speculative_option=("longest_context=60",))
    recorder = Recorder(llm, plain, acceptance=0.5)
    with caplog.at_level("INFO", logger="l4core"):
        for mine, theirs in zip(llm.generate(prompts(), greedy(), use_tqdm=False), plain, strict=True):
            assert mine.outputs[0].token_ids == theirs.outputs[0].token_ids
    lengths = {len(known) for known, _ in recorder.guesses}
    assert max(lengths) <= 60 < max(len(prompt) for prompt in prompts()) + TOKENS
    assert len(lengths) > 20
    assert sum("of more than 60 tokens go on without guesses" in r.message for r in caplog.records) == 1
    with pytest.raises(CheckpointError, match="longest_context"):
        open_llm(folder, draft, speculative_option=("longest_context=far",))


@pytest.mark.parametrize(("temperature", "penalty"), [(0.7, 0.4), (1.3, 0.0)])
def test_sampled_tokens_are_those_without_a_draft(
    folder: Path, tmp_path: Path, temperature: float, penalty: float
) -> None:
    """In the relay; where a penalty looks back the host waits for the guesses."""
    draft = make_tiny_draft(tmp_path / "draft", target_of(folder), aux_layers=[1, 2, 4], draft_vocab=200)
    params = [
        SamplingParams(
            max_tokens=TOKENS, temperature=temperature, top_p=0.9, presence_penalty=penalty, seed=n, logprobs=1
        )
        for n in range(COUNT)
    ]
    wanted = open_llm(folder).generate(prompts(), params, use_tqdm=False)
    llm = open_llm(folder, draft, relay=True)
    for mine, theirs in zip(llm.generate(prompts(), params, use_tqdm=False), wanted, strict=True):
        assert mine.outputs[0].token_ids == theirs.outputs[0].token_ids
        assert mine.outputs[0].finish_reason == theirs.outputs[0].finish_reason


@pytest.mark.parametrize(("steps", "topk", "tokens"), [(3, 2, 8), (4, 3, 13), (2, 4, 21)])
def test_trees(folder: Path, plain: list[RequestOutput], tmp_path: Path, steps: int, topk: int, tokens: int) -> None:
    """On the one CPU backend with a tree mask; greedy and, with a penalty, sampled."""
    draft = make_tiny_draft(tmp_path / "draft", target_of(folder), aux_layers=[1, 2, 4], draft_vocab=200)
    options = {
        "speculative_num_steps": steps,
        "speculative_eagle_topk": topk,
        "speculative_num_draft_tokens": tokens,
        "attention_backend": "reference",
        "max_running_requests": 3,
    }
    llm = open_llm(folder, draft, relay=topk == 2, **options)
    count = 4
    for mine, theirs in zip(llm.generate(prompts()[:count], greedy(), use_tqdm=False), plain[:count], strict=True):
        assert mine.outputs[0].token_ids == theirs.outputs[0].token_ids
    params = SamplingParams(max_tokens=TOKENS, temperature=0.9, top_p=0.9, frequency_penalty=0.3, seed=4)
    wanted = open_llm(folder).generate(prompts()[:2], params, use_tqdm=False)
    for mine, theirs in zip(llm.generate(prompts()[:2], params, use_tqdm=False), wanted, strict=True):
        assert mine.outputs[0].token_ids == theirs.outputs[0].token_ids


def test_a_tree_begins_with_the_chain(folder: Path, plain: list[RequestOutput], tmp_path: Path) -> None:
    """Its likeliest path of first choices is what a greedy chain guesses, at every step of a run whose guesses are partly accepted."""
    draft = make_tiny_draft(tmp_path / "draft", target_of(folder), aux_layers=[1, 2, 4])
    options = {"attention_backend": "reference", "max_running_requests": 2, "speculative_num_steps": 3}
    llm = open_llm(folder, draft, speculative_eagle_topk=3, speculative_num_draft_tokens=22, **options)
    speculation: Any = llm._built.engine.speculation
    recorder = TreeRecorder(speculation, plain)
    for mine, theirs in zip(llm.generate(prompts()[:3], greedy(), use_tqdm=False), plain[:3], strict=True):
        assert mine.outputs[0].token_ids == theirs.outputs[0].token_ids
    assert check_guesses(recorder, folder, draft, (1, 2, 4), plain) > 20


class TreeRecorder:
    """Notes the path of first choices of each tree; sends trees in which the true continuation often stands instead of them."""

    def __init__(self, speculation: Any, plain: Sequence[RequestOutput]) -> None:
        self.guesses: list[tuple[tuple[int, ...], list[int]]] = []
        self._answers = {tuple(o.prompt_token_ids): o.outputs[0].token_ids for o in plain}
        self._propose = speculation.propose
        speculation.propose = self.propose

    def propose(self, requests: Sequence[DraftRequest], *, late: bool = False) -> dict[str, Draft]:
        mixed = {}
        drafts = self._propose(requests)
        for wanted in requests:
            draft = drafts.get(wanted.request.request_id)
            if draft is None or not draft.parents:
                continue
            known = (*wanted.request.prompt_token_ids, *wanted.output_token_ids)
            path = first_choices(draft)
            self.guesses.append((known, [draft.token_ids[node] for node in path]))
            true = self._answers[tuple(wanted.request.prompt_token_ids)][len(wanted.output_token_ids) :]
            tokens = list(draft.token_ids)
            for node, token in zip(path[: len(known) % 4], true, strict=False):
                tokens[node] = token
            mixed[wanted.request.request_id] = Draft(token_ids=tokens, parents=draft.parents)
        return mixed


def first_choices(draft: Draft) -> list[int]:
    """Children of a node come likeliest first."""
    path, node = list[int](), -1
    while node in draft.parents:
        node = list(draft.parents).index(node)
        path.append(node)
    return path


# ---------------------------------------------------------------- what is refused


def test_flags_that_contradict_each_other_are_refused(folder: Path, tmp_path: Path) -> None:
    draft = make_tiny_draft(tmp_path / "draft", target_of(folder), aux_layers=[1, 2, 4])
    for error, options, words in (
        (ConfigError, {"speculative_num_steps": 3, "speculative_num_draft_tokens": 5}, "verifies steps \\+ 1"),
        (ConfigError, {"speculative_num_steps": 40}, "attention chunk of 32"),
        (ConfigError, {"speculative_eagle_topk": 4, "speculative_num_draft_tokens": 60}, "sees 36 guesses"),
        (ConfigError, {"speculative_eagle_topk": 9, "speculative_num_draft_tokens": 40}, "fix: .*num-draft-tokens 32"),
        (BackendUnavailable, {"speculative_eagle_topk": 4, "attention_backend": "sdpa"}, "a tree mask is asked for"),
        (ConfigError, {"speculative_option": ("layers=1",)}, "unknown to EAGLE3; its options: aux_layers"),
        (CheckpointError, {"speculative_option": ("aux_layers=1,2,6",)}, "the target has layers 0 to 5"),
        (CheckpointError, {"speculative_option": ("aux_layers=1,2",)}, "fc.weight is"),
        (CheckpointError, {"speculative_draft_model_path": "/nowhere"}, "^--speculative-draft-model-path '/nowhere'"),
        (ConfigError, {"speculative_eagle_topk": 16}, "63 guesses a step do not fit"),  # not 96: a tree has at most 63
    ):
        with pytest.raises(error, match=words):
            open_llm(folder, draft, **options)
    for options, words in (
        ({"speculative_algorithm": "EAGLE3"}, "needs a draft"),
        ({"speculative_num_steps": 3}, "without --speculative-algorithm"),
        ({"speculative_algorithm": "NGRAM", "speculative_draft_model_path": draft.as_posix()}, "is for EAGLE3"),
        ({"speculative_algorithm": "MEDUSA"}, "there are EAGLE3, NGRAM"),
        (
            {"speculative_algorithm": "eagle3", "speculative_draft_model_path": draft.as_posix()},
            "fix: --speculative-algorithm EAGLE3",
        ),
        ({"speculative_algorithm": "EAGLE"}, "fix: leave it out, or: .*EAGLE3, NGRAM"),
    ):
        with pytest.raises(ConfigError, match=words):
            LLM(folder.as_posix(), **OPTIONS, **options)  # type: ignore[arg-type]


def test_topk_one_means_steps_plus_one(folder: Path, tmp_path: Path) -> None:
    draft = make_tiny_draft(tmp_path / "draft", target_of(folder), aux_layers=[1, 2, 4])
    for options in (
        {},
        {"speculative_num_steps": 3},
        {"speculative_num_draft_tokens": 4},
        {"speculative_num_steps": 3, "speculative_eagle_topk": 1, "speculative_num_draft_tokens": 4},
    ):
        llm = open_llm(folder, draft, **options)
        assert llm._built.engine.speculation is not None
        assert llm._built.engine.speculation.num_drafts == 3
        (line,) = [line for line in llm.report if line.startswith("speculation")]
        assert "3 guesses a step" in line
        assert "reads outputs of layers 1, 2, 4" in line
