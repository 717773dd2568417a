"""`l4 serve --tp 2` is `l4 serve`: the same texts, refusals and aborts, on a real model."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from helpers.serving import Served, serve

PROMPTS = [list(range(1, length)) for length in (2, 40, 64, 65, 66, 130, 200)]
"""Around borders of the chunk of 64."""
WAYS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.8, "seed": 5},
    {"temperature": 1.0, "top_p": 0.7, "seed": 6, "logprobs": 2},
    {"temperature": 1.0, "seed": 7, "frequency_penalty": 0.5, "n": 2},
]


@pytest.fixture(scope="module")
def two(tiny: Path) -> Iterator[tuple[str, Served]]:
    arguments = [
        tiny.as_posix(),
        "--served-model-name",
        "tiny",
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--port",
        "0",
        "--tp",
        "2",
    ]
    with serve([*arguments, "--dist-timeout", "10"]) as (url, served):
        yield url, served


def complete(url: str, prompt: list[int], **ways: Any) -> list[dict[str, Any]]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 24, "ignore_eos": True, **ways}
    reply = httpx.post(f"{url}/v1/completions", json=body, timeout=300)
    assert reply.status_code == 200, reply.text
    choices: list[dict[str, Any]] = reply.json()["choices"]
    return choices


def all_of(url: str) -> list[list[dict[str, Any]]]:
    """At once, so that they share batches."""
    asked = [(prompt, WAYS[index % len(WAYS)]) for index, prompt in enumerate(PROMPTS)]
    with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(lambda one: complete(url, one[0], **one[1]), asked))


def texts(answers: list[list[dict[str, Any]]]) -> list[list[str]]:
    return [[choice["text"] for choice in choices] for choices in answers]


def test_two_ranks_write_what_one_writes(server: str, two: tuple[str, Served]) -> None:
    one, many = all_of(server), all_of(two[0])
    assert texts(many) == texts(one)
    scores = [
        [choices[0]["logprobs"]["token_logprobs"] for choices in a if choices[0]["logprobs"]] for a in (one, many)
    ]
    assert scores[1][0] == pytest.approx(scores[0][0], abs=1e-4)


def test_refused_and_aborted_requests_are_so_on_all_ranks(server: str, two: tuple[str, Served]) -> None:
    """Otherwise the next step would not be the same, and end the engine."""
    url, served = two
    ranks = psutil.Process(served.process.pid).children(recursive=True)
    refused = httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": [1], "sampler": "none"}, timeout=60)
    assert refused.status_code == 400
    body = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 3000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as stream:
        next(stream.iter_lines())
    assert httpx.post(f"{url}/flush_cache", timeout=60).status_code == 200
    assert complete(url, PROMPTS[5], temperature=0)[0]["text"] == complete(server, PROMPTS[5], temperature=0)[0]["text"]
    assert psutil.Process(served.process.pid).children(recursive=True) == ranks
