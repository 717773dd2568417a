"""The official client against the real server and engine: what it parses is typed, and what it gets is what LLM gives in process."""

from __future__ import annotations

from pathlib import Path

import httpx
import openai
import pytest
from openai import OpenAI

from l4core import LLM, SamplingParams

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def offline(tiny: Path) -> LLM:
    return LLM(tiny.as_posix(), dtype="float32", device="cpu", progress=False)


def test_chat_gives_what_the_offline_api_gives(client: OpenAI, offline: LLM) -> None:
    answer = client.chat.completions.create(model="tiny", messages=QUESTION, temperature=0, max_tokens=20)  # type: ignore[arg-type]
    expected = offline.chat(QUESTION, SamplingParams(temperature=0.0, max_tokens=20))[0]
    assert answer.choices[0].message.content == expected.outputs[0].text
    assert answer.choices[0].finish_reason == expected.outputs[0].finish_reason
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert answer.usage.completion_tokens == len(expected.outputs[0].token_ids)


def test_a_stream_carries_the_same_text_and_usage(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=QUESTION, temperature=0.8, seed=3, max_tokens=30)  # type: ignore[arg-type]
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=QUESTION,
            temperature=0.8,
            seed=3,
            max_tokens=30,
            stream=True,
            stream_options={"include_usage": True},  # type: ignore[arg-type]
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason


def test_completions_take_strings_lists_and_token_ids(client: OpenAI, offline: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=8)
    for prompt in ("Once upon a time", ["Once", "upon"], [5, 6, 7, 8], [[5, 6, 7], [8, 9]]):
        answer = client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=8)
        expected = offline.generate(prompt, params)  # type: ignore[arg-type]
        assert [c.text for c in answer.choices] == [e.outputs[0].text for e in expected]


def test_n_answers_have_their_own_seeds_and_indices(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=QUESTION, n=3, seed=1, temperature=1.0, max_tokens=12
    )  # type: ignore[arg-type]
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert len({c.message.content for c in answer.choices}) == 3


def test_logprobs_in_both_shapes(client: OpenAI) -> None:
    chat = client.chat.completions.create(
        model="tiny", messages=QUESTION, temperature=0, max_tokens=5, logprobs=True, top_logprobs=4
    )  # type: ignore[arg-type]
    content = chat.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content is not None
    assert all(len(entry.top_logprobs) == 4 and entry.logprob == entry.top_logprobs[0].logprob for entry in content)
    text = client.completions.create(model="tiny", prompt="Hello", temperature=0, max_tokens=5, logprobs=2)
    assert text.choices[0].logprobs is not None
    assert len(text.choices[0].logprobs.token_logprobs) == len(text.choices[0].logprobs.tokens)  # type: ignore[arg-type]


def test_models(client: OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_stop_strings_and_seed_are_honoured(client: OpenAI) -> None:
    free = client.completions.create(model="tiny", prompt="Hello", temperature=0, max_tokens=40).choices[0].text
    stop = free[10:13]
    cut = client.completions.create(model="tiny", prompt="Hello", temperature=0, max_tokens=40, stop=[stop]).choices[0]
    assert cut.text == free[: free.index(stop)]
    assert cut.finish_reason == "stop"


BAD_CHAT = {
    "too long": ({"messages": [{"role": "user", "content": "x " * 20000}]}, 400),
    "no messages": ({"messages": []}, 400),
    "max_tokens 0": ({"messages": QUESTION, "max_tokens": 0}, 400),
    "unknown model": ({"messages": QUESTION, "model": "gpt-9"}, 404),
    "unknown role": ({"messages": [{"role": "king", "content": "x"}]}, 400),
    "unknown sampler": ({"messages": QUESTION, "sampler": "nope"}, 400),
    "temperature as text": ({"messages": QUESTION, "temperature": "hot"}, 400),
}


@pytest.mark.parametrize("case", BAD_CHAT)
def test_bad_requests_are_named_and_the_next_good_one_is_served(server: str, client: OpenAI, case: str) -> None:
    body, status = BAD_CHAT[case]
    reply = httpx.post(f"{server}/v1/chat/completions", json={"model": "tiny", **body}, timeout=300)
    assert reply.status_code == status, reply.text
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert client.completions.create(model="tiny", prompt="ok", max_tokens=2).choices[0].text is not None


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"model": "tiny", "prompt": ', 400),
        (b'{"model": "tiny", "prompt": "x", "temperature": NaN}', 400),
        (b'{"model": "tiny", "prompt": ""}', 400),
        (b'{"model": "tiny", "prompt": []}', 400),
        (b'{"model": "tiny", "prompt": "' + b"x" * 10_000_000 + b'"}', 413),
        (b"[" * 100_000, 400),
    ],
    ids=["malformed", "nan", "empty", "empty list", "10 MB", "deep"],
)
def test_bad_bodies_are_refused_and_the_next_good_one_is_served(
    server: str, client: OpenAI, body: bytes, status: int
) -> None:
    reply = httpx.post(
        f"{server}/v1/completions", content=body, headers={"content-type": "application/json"}, timeout=300
    )
    assert reply.status_code == status, reply.text[:500]
    assert reply.json()["error"]["message"]
    assert client.completions.create(model="tiny", prompt="ok", max_tokens=2).choices[0].text is not None


def test_an_unknown_model_is_a_typed_error(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        client.completions.create(model="gpt-9", prompt="x")


def test_metrics_health_and_version_answer(server: str) -> None:
    assert httpx.get(f"{server}/health").status_code == 200
    assert httpx.get(f"{server}/ready").status_code == 200
    assert "l4_" in httpx.get(f"{server}/metrics").text
    assert httpx.get(f"{server}/version").json()
