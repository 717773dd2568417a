"""lm_eval 0.4.13, as people run it: chat at 128 concurrent, and log-likelihoods through /v1/completions equal to transformers'."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

NUM_QUESTIONS = 20
WORDS = ("river", "bridge", "winter", "answer", "server", "token", "page", "request", "engine", "number")
COMMON = """\
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
metadata:
  version: 1
"""
GENERATE = """\
task: l4_generate
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 8
  temperature: 0
metric_list:
  - metric: exact_match
"""
CHOOSE = """\
task: l4_choose
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local yaml + jsonl task: nothing is downloaded."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "question": f"Question {i}: which word follows {WORDS[i % 10]}?",
            "choices": [f" {WORDS[(i + k) % 10]}" for k in range(1, 4)],
            "answer": 0,
        }
        for i in range(NUM_QUESTIONS)
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("generate", GENERATE), ("choose", CHOOSE)):
        (folder / f"{name}.yaml").write_text(text + COMMON.format(data=data))
    return folder


def run_lm_eval(arguments: list[str], out: Path, home: Path) -> list[dict[str, Any]]:
    """→ the logged samples."""
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": home.as_posix(),
        "OPENAI_API_KEY": "none",
    }
    command = [sys.executable, "-m", "lm_eval", "run", *arguments, "--output_path", out.as_posix(), "--log_samples"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (samples,) = out.rglob("samples_*.jsonl")
    return [json.loads(line) for line in samples.read_text().splitlines()]


def test_chat_completions_at_128_concurrent_answers_all(server: str, tasks: Path, tmp_path: Path) -> None:
    model = (
        f"model=tiny,base_url={server}/v1/chat/completions,num_concurrent=128,max_retries=1,tokenized_requests=False"
    )
    samples = run_lm_eval(
        [
            "--model",
            "local-chat-completions",
            "--model_args",
            model,
            "--tasks",
            "l4_generate",
            "--include_path",
            tasks.as_posix(),
            "--apply_chat_template",
        ],
        tmp_path / "out",
        tmp_path / "home",
    )
    assert len(samples) == NUM_QUESTIONS
    assert all(isinstance(s["resps"][0][0], str) for s in samples)


@torch.inference_mode()
def oracle_loglikelihood(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    """Sum of transformers' log-probabilities of the continuation, tokenised as lm_eval does (whole minus context)."""
    whole = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
    start = len(tokenizer(context, add_special_tokens=False)["input_ids"])
    logprobs = model(torch.tensor([whole]), use_cache=False).logits[0].log_softmax(-1)
    return float(sum(logprobs[i - 1, whole[i]] for i in range(start, len(whole))))


def test_completions_loglikelihoods_equal_transformers(server: str, tiny: Path, tasks: Path, tmp_path: Path) -> None:
    """Every (question, choice) pair within 1e-3 of transformers in float32."""
    from transformers import AutoTokenizer, Llama4ForCausalLM

    model = f"model=tiny,base_url={server}/v1/completions,num_concurrent=128,tokenizer={tiny},tokenizer_backend=huggingface,max_retries=1"
    samples = run_lm_eval(
        [
            "--model",
            "local-completions",
            "--model_args",
            model,
            "--tasks",
            "l4_choose",
            "--include_path",
            tasks.as_posix(),
        ],
        tmp_path / "out",
        tmp_path / "home",
    )
    assert len(samples) == NUM_QUESTIONS
    oracle = Llama4ForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    for sample in samples:
        for arguments, response in zip(sample["arguments"].values(), sample["resps"], strict=True):
            expected = oracle_loglikelihood(oracle, tokenizer, arguments["arg_0"], arguments["arg_1"])
            assert float(response[0][0]) == pytest.approx(expected, abs=1e-3)
