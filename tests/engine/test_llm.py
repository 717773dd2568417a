"""The offline API at its edges: what it refuses, and in which words. (What it generates: test_parity.py.)"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from l4core import LLM, SamplingParams
from l4core.errors import ConfigError, RequestError


@pytest.fixture(scope="module")
def llm(tiny: Path) -> Iterator[LLM]:
    with LLM(tiny.as_posix(), dtype="float32", device="cpu", max_model_len=300, progress=False) as made:
        yield made


SHORT = SamplingParams(max_tokens=2, temperature=0.0)


@pytest.mark.parametrize(
    "prompts",
    [
        None,
        5,
        [None],
        [5.0],
        b"abc",
        [b"abc"],
        {"a": 1},
        [{"prompt_token_ids": [1]}],
        np.array([1]),
        torch.tensor([[1]]),
    ],
    ids=lambda prompts: type(prompts).__name__,
)
def test_what_is_no_prompt_is_named(llm: LLM, prompts: Any) -> None:
    with pytest.raises(RequestError, match=r"^prompts.* is a \w+; wanted a string, a list of strings") as caught:
        llm.generate(prompts, SHORT)
    assert caught.value.param == "prompt"


def test_all_shapes_of_prompts(llm: LLM) -> None:
    ids = llm.generate("hi", SHORT)[0].prompt_token_ids
    answers = [
        llm.generate(prompts, SHORT)[0].outputs[0].token_ids  # type: ignore[arg-type]
        for prompts in ("hi", ["hi"], ("hi",), ids, [ids], [tuple(ids)])
    ]
    assert answers == [answers[0]] * 6
    assert llm.generate([], SHORT) == []


@pytest.mark.parametrize("params", [{"temperature": 0.0}, 5, [{"temperature": 0.0}], "greedy"])
def test_what_is_no_sampling_params_is_named(llm: LLM, params: Any) -> None:
    with pytest.raises(ConfigError, match=r"^sampling_params is "):
        llm.generate(["hi"], params)


def test_an_unreachable_itl_target_slows_prompts_down_and_changes_no_token(tiny: Path, llm: LLM) -> None:
    prompts = [[1, 2, 3], [*range(5, 105)]]
    params = [SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True), SHORT]
    with LLM(
        tiny.as_posix(), dtype="float32", device="cpu", max_model_len=300, progress=False, itl_target_ms=0.1
    ) as paced:
        engine = paced._built.engine
        seen = [out.outputs[0].token_ids for out in paced.generate(prompts, params)]
        assert engine.scheduler.costs is not None
        assert engine.scheduler.costs.target_ms <= 0.1
    assert seen == [out.outputs[0].token_ids for out in llm.generate(prompts, params)]


def test_a_closed_one_says_so(tiny: Path) -> None:
    closed = LLM(tiny.as_posix(), dtype="float32", device="cpu", progress=False)
    closed.close()
    closed.close()
    with pytest.raises(ConfigError, match="closed"):
        closed.generate("hi", SHORT)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"device": "nonsense"}, "--device is 'nonsense'"),
        ({"attention_option": [1]}, "attention_option is \\[1\\]; wanted a list of strings"),
        ({"attention_option": "a=1"}, "wanted a list"),
        ({"max_modl_len": 5}, "unknown option 'max_modl_len'"),
    ],
)
def test_a_wrong_option_is_a_sentence(tiny: Path, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        LLM(tiny.as_posix(), progress=False, **options)
