"""The demo's draft in the engine accepts exactly what an independent computation says: hidden states by transformers, the draft by its definition."""

from __future__ import annotations

import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.eagle3_definition import Definition
from helpers.profile import FULL
from l4core import LLM, SamplingParams
from l4core.demo.build import build_draft, find_delta
from l4core.demo.run import ready_checkpoint
from l4core.request import RequestOutput

QUESTIONS = (
    "What is the capital of France?",
    "Explain photosynthesis in one sentence.",
    "Tell me a short story about a dog.",
    "What is the opposite of hot?",
    "List the three primary colors.",
    "Give me three tips for sleeping better.",
    "Write a Python function that adds two numbers.",
    "Who wrote Romeo and Juliet?",
)[: None if FULL else 4]
STEPS, TOKENS = 3, 100 if FULL else 60
LAYERS = (1, 14, 26)
pytestmark = pytest.mark.timeout(3600)


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drafts") / "smol-l4-eagle3"
    build_draft(folder, find_delta(), say=lambda line: None)
    return folder


def open_llm(draft: Path, **options: Any) -> LLM:
    return LLM(
        ready_checkpoint().as_posix(),
        dtype="float32",
        device="cpu",
        context_length=1024,
        max_running_requests=4,
        progress=False,
        speculative_algorithm="EAGLE3",
        speculative_draft_model_path=draft.as_posix(),
        **{"speculative_adaptive": "off", **options},
    )


def answers(llm: LLM) -> tuple[list[RequestOutput], list[list[int]]]:
    """Greedy answers, and of each how many tokens every step brought."""
    engine, spans = llm._built.engine, defaultdict[str, list[int]](list)
    step = engine.step

    def counted(*args: Any) -> Any:
        output = step(*args)
        for update in output.updates:
            spans[update.request_id].append(len(update.new_token_ids))
        return output

    engine.step = counted  # type: ignore[method-assign]
    messages: Any = [[{"role": "user", "content": question}] for question in QUESTIONS]
    outputs = llm.chat(messages, SamplingParams(temperature=0.0, max_tokens=TOKENS), use_tqdm=False)
    engine.step = step  # type: ignore[method-assign]
    return outputs, [spans[name] for name in sorted(spans, key=lambda name: int(name.split(":")[0]))]


def test_accepted_lengths_are_those_of_an_independent_computation(draft: Path) -> None:
    """Step by step, not on average only."""
    from transformers import AutoModelForCausalLM

    outputs, spans = answers(open_llm(draft))
    model = AutoModelForCausalLM.from_pretrained(ready_checkpoint(), dtype=torch.float32).eval()
    definition = Definition(draft, model.get_input_embeddings().weight.detach())
    expected = [spans_of(output, model, definition) for output in outputs]
    assert spans == expected
    steps = [span for own in spans for span in own[1:]]
    assert 2.0 < sum(steps) / len(steps) < 3.5, "the card says 2.9 over 266 dialogs"


def spans_of(output: RequestOutput, model: Any, definition: Definition) -> list[int]:
    prompt, answer = output.prompt_token_ids, output.outputs[0].token_ids
    ids = [*prompt, *answer]
    with torch.no_grad():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    aux = torch.cat([states[layer + 1][0] for layer in LAYERS], -1)
    spans, at = [1], len(prompt) + 1
    while at < len(ids):
        guesses = definition.chain(ids[:at], aux, STEPS)
        right = 0
        while right < STEPS and at + right < len(ids) and guesses[right] == ids[at + right]:
            right += 1
        spans.append(min(right + 1, len(ids) - at))
        at += right + 1
    return spans


def test_wrong_layers_are_noticed(draft: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The commonest mistake: a draft that reads other layers than it was trained on. Answers stay the same. (That guessing then pauses depends on
    measured times: tests/engine/test_draft_pace.py has it with a clock of its own.)"""
    llm = open_llm(draft, speculative_adaptive="on", speculative_option=("aux_layers=2,5,8",))
    with caplog.at_level(logging.INFO, logger="l4core"):
        outputs, _ = answers(llm)
    (warning,) = [r for r in caplog.records if r.levelno == logging.WARNING and "speculation" in r.message]
    assert "of first guesses are right" in warning.message
    right, _ = answers(open_llm(draft))
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in right]
