"""POST /v1/completions: prompts of every kind, scoring as lm_eval does it, streams."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion

from l4core.server import streaming

ANSWER = "Seed 3: the capital of France is Paris. é🙂"
BOS = "<|begin_of_text|>"


@pytest.fixture
def client(server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(http: httpx.Client, **body: Any) -> dict[str, Any]:
    reply = http.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def ids_of(http: httpx.Client, text: str, *, bos: bool = False) -> list[int]:
    found: list[int] = http.post("/tokenize", json={"prompt": text, "add_special_tokens": bos}).json()["tokens"]
    return found


def test_the_official_client_gets_a_typed_completion(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="smol", prompt="hello", seed=3, max_tokens=100)
    Completion.model_validate(reply.model_dump(), strict=True)
    assert reply.choices[0].text == ANSWER
    assert reply.choices[0].finish_reason == "stop"


def test_sixteen_tokens_are_the_default(http: httpx.Client) -> None:
    assert complete(http, prompt="hello")["usage"]["completion_tokens"] == 16


def test_all_four_kinds_of_prompt(http: httpx.Client) -> None:
    a, b = ids_of(http, "abc"), ids_of(http, "defgh")
    for prompt, num_prompt in (("abc", 4), (["abc", "defgh"], 4 + 6), (a, 3), ([a, b], 3 + 5)):
        reply = complete(http, prompt=prompt, seed=3, max_tokens=4, n=2)
        many = 2 if prompt in (["abc", "defgh"], [a, b]) else 1
        assert [c["index"] for c in reply["choices"]] == list(range(2 * many))
        assert [c["text"] for c in reply["choices"]] == ["Seed", "Seed"] * many
        assert reply["usage"]["prompt_tokens"] == num_prompt
        assert reply["usage"]["completion_tokens"] == 4 * 2 * many


def test_bos_is_added_to_text_unless_told_otherwise_and_never_to_ids(http: httpx.Client) -> None:
    for extra, bos in (({}, True), ({"add_special_tokens": True}, True), ({"add_special_tokens": False}, False)):
        reply = complete(http, prompt="ab", max_tokens=1, echo=True, logprobs=0, **extra)
        assert (reply["choices"][0]["logprobs"]["tokens"][0] == BOS) is bos


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_scoring_as_lm_eval_does_it(http: httpx.Client, max_tokens: int) -> None:
    context, continuation = ids_of(http, "The capital"), ids_of(http, " of France")
    reply = complete(
        http,
        model="smol",
        prompt=[context + continuation],
        temperature=0,
        max_tokens=max_tokens,
        logprobs=1,
        seed=1234,
        echo=True,
    )
    choice = reply["choices"][0]
    logprobs = choice["logprobs"]
    total = len(context) + len(continuation) + max_tokens
    assert {key: len(value) for key, value in logprobs.items()} == dict.fromkeys(
        ("tokens", "token_logprobs", "top_logprobs", "text_offset"), total
    )
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    scored = slice(len(context), total - max_tokens)
    values, tops = logprobs["token_logprobs"][scored], logprobs["top_logprobs"][scored]
    expected = [-0.25 - (at % 2) / 8 for at in range(len(context), len(context) + len(continuation))]
    assert values == expected
    greedy = [value == max(top.values()) for value, top in zip(values, tops, strict=True)]
    assert greedy == [at % 2 == 0 for at in range(len(context), len(context) + len(continuation))]
    assert reply["usage"]["completion_tokens"] == max_tokens
    assert choice["text"] == "The capital of France" + "S" * max_tokens
    assert choice["finish_reason"] == "length"


def test_text_offsets_cut_the_text_at_its_tokens(http: httpx.Client) -> None:
    reply = complete(http, prompt="héllo", seed=3, max_tokens=60, echo=True, logprobs=0)
    choice = reply["choices"][0]
    assert choice["text"] == "héllo" + ANSWER
    offsets, tokens = choice["logprobs"]["text_offset"], choice["logprobs"]["tokens"]
    assert offsets[:2] == [0, 0]  # BOS is a token and not in the text
    cut = [choice["text"][begin:end] for begin, end in zip(offsets, [*offsets[1:], len(choice["text"])], strict=True)]
    for token, piece in zip(tokens, cut, strict=True):
        assert piece == token or "\ufffd" in token or token.startswith("<|")


def test_echo_without_logprobs_gives_the_prompt_back(http: httpx.Client) -> None:
    ids = ids_of(http, "abc")
    assert complete(http, prompt="abc", echo=True, max_tokens=4)["choices"][0]["text"] == "abcSeed"
    assert complete(http, prompt=ids, echo=True, max_tokens=4)["choices"][0]["text"] == "abcSeed"
    nothing = complete(http, prompt="abc", echo=True, max_tokens=0)
    assert nothing["choices"][0]["text"] == "abc"
    assert nothing["choices"][0]["logprobs"] is None


def test_logprobs_without_echo_are_of_the_answer(http: httpx.Client) -> None:
    logprobs = complete(http, prompt="a", seed=3, max_tokens=3, logprobs=2)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["S", "e", "e"]
    assert logprobs["text_offset"] == [0, 1, 2]
    assert [len(top) for top in logprobs["top_logprobs"]] == [2, 2, 2]
    assert [logprobs["tokens"][i] in logprobs["top_logprobs"][i] for i in range(3)] == [True] * 3


def test_a_streams_pieces_are_the_whole(http: httpx.Client) -> None:
    body: dict[str, Any] = {"prompt": ["ab", "cdé"], "seed": 3, "max_tokens": 60, "echo": True, "logprobs": 1}
    whole = complete(http, **body)
    text = http.post("/v1/completions", json={**body, "stream": True, "stream_options": {"include_usage": True}}).text
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    *chunks, last = [json.loads(line) for line in lines[:-1]]
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    for choice in whole["choices"]:
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(c["text"] for c in own) == choice["text"]
        for key, value in choice["logprobs"].items():
            assert [x for c in own for x in c["logprobs"][key]] == value, key
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == [choice["finish_reason"]]


def test_prompt_logprobs_stand_beside_each_choice(http: httpx.Client) -> None:
    reply = complete(http, prompt="abc", max_tokens=1, prompt_logprobs=2)
    found = reply["choices"][0]["prompt_logprobs"]
    assert [entry and sorted(c["rank"] for c in entry.values()) for entry in found] == [None, [1, 2], [1, 2], [1, 2]]
    assert {c["decoded_token"] for c in found[1].values()} >= {"a"}


def test_a_long_prompt_goes_through_the_thread(start_server: Any) -> None:
    running = start_server(engine={"context_length": 60_000})
    try:
        with httpx.Client(base_url=running.url, timeout=60, verify=False) as http:
            reply = complete(http, prompt="word " * 10_000, max_tokens=1)
            assert reply["usage"]["prompt_tokens"] == 50_001
    finally:
        assert running.stop() is None


def test_tokenize_and_detokenize_are_each_others_inverse(http: httpx.Client) -> None:
    ids = ids_of(http, "héllo <|eot|>", bos=True)
    assert ids[0] >= 256
    reply = http.post("/detokenize", json={"tokens": ids}).json()
    assert reply == {"prompt": f"{BOS}héllo <|eot|>"}
    hidden = http.post("/detokenize", json={"tokens": ids, "skip_special_tokens": True}).json()
    assert hidden == {"prompt": "héllo "}
    found = http.post("/tokenize", json={"prompt": "hé", "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"]) == 4
    assert found["max_model_len"] == 512


def test_a_reply_that_spells_many_tokens_is_made_off_the_loop(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scored prompt of 100,000 tokens takes seconds to spell: the other streams must go on."""
    weights: list[int] = []

    async def noted(weight: int, work: Callable[[], Any]) -> Any:
        weights.append(weight)
        return work()

    monkeypatch.setattr(streaming, "off_loop_if_long", noted)
    body = {"prompt": ["x" * 300, "x" * 100], "echo": True, "logprobs": 20, "max_tokens": 1, "n": 2}
    reply = http.post("/v1/completions", json=body)
    assert reply.status_code == 200
    num_tokens = sum(len(choice["logprobs"]["tokens"]) for choice in reply.json()["choices"])
    assert weights == [21 * num_tokens]
