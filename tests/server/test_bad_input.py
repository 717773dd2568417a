"""What is wrong is told in OpenAI's shape, names the field, and the next good request is served."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth - 1):
        value = {"a": value}
    return value


def good(http: httpx.Client) -> None:
    assert http.post(CHAT, json={"messages": HELLO, "max_tokens": 1}).status_code == 200


def error_of(reply: httpx.Response) -> dict[str, Any]:
    assert reply.headers["content-type"] == "application/json"
    assert list(reply.json()) == ["error"]
    error: dict[str, Any] = reply.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert error["message"]
    return error


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {}, None),
        (CHAT, {"messages": "hello"}, "messages"),
        (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0]"),
        (CHAT, {"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0]"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "poem"}]}]}, "messages[0].content[0].type"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": {}, "text": ""}]}]}, "messages[0].content[0].type"),
        (CHAT, {"messages": HELLO, "nonsense": None}, "nonsense"),
        (CHAT, {"messages": HELLO, "max_tokens": 0}, "max_tokens"),
        (CHAT, {"messages": HELLO, "max_tokens": -1}, "max_tokens"),
        (CHAT, {"messages": HELLO, "max_tokens": 1.5}, "max_tokens"),
        (CHAT, {"messages": HELLO, "max_tokens": 4, "max_completion_tokens": 5}, "max_completion_tokens"),
        (CHAT, {"messages": HELLO, "max_tokens": 100_000}, "max_tokens"),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 600}]}, "prompt"),
        (CHAT, {"messages": HELLO, "temperature": -1}, "temperature"),
        (CHAT, {"messages": HELLO, "temperature": "hot"}, "temperature"),
        (CHAT, {"messages": HELLO, "top_p": 0}, "top_p"),
        (CHAT, {"messages": HELLO, "n": 0}, "n"),
        (CHAT, {"messages": HELLO, "n": 10**9}, "n"),
        (CHAT, {"messages": HELLO, "seed": 2**70}, "seed"),
        (CHAT, {"messages": HELLO, "stop": [1]}, "stop[0]"),
        (CHAT, {"messages": HELLO, "stop": ["x"] * 17}, "stop"),
        (CHAT, {"messages": HELLO, "logit_bias": {"a": 1}}, "logit_bias"),
        (CHAT, {"messages": HELLO, "logit_bias": {"999999": 1}}, "logit_bias"),
        (CHAT, {"messages": HELLO, "logit_bias": {"5": 500}}, "logit_bias"),
        (CHAT, {"messages": HELLO, "top_logprobs": 3}, "top_logprobs"),
        (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 99}, "top_logprobs"),
        (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        (CHAT, {"messages": HELLO, "priority": 2**40}, "priority"),
        (CHAT, {"messages": HELLO, "stop_token_ids": [999_999]}, "stop_token_ids"),
        (CHAT, {"messages": HELLO, "stop_token_ids": [5] * 1025}, "stop_token_ids"),
        (CHAT, {"messages": HELLO, "repetition_penalty": 1e-40}, "repetition_penalty"),
        (CHAT, {"messages": HELLO, "sampler": "nobody"}, "sampler"),
        (CHAT, {"messages": HELLO, "sampler": "x" * 101}, "sampler"),
        (CHAT, {"messages": HELLO, "sampler_args": {"a": "x" * 20_000}}, "sampler_args"),
        (CHAT, {"messages": HELLO * 10_001}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 10_001}]}, "messages"),
        (CHAT, {"messages": HELLO, "sampler_args": {"x": 2**70}}, None),
        (CHAT, {"messages": HELLO, "sampler_args": nested(17)}, "sampler_args"),
        (CHAT, {"messages": HELLO, "sampler_args": nested(800)}, "sampler_args"),
        (CHAT, {"messages": HELLO, "stream_options": {"include_usages": True}}, "stream_options"),
        (TEXT, {"prompt": ""}, "prompt"),
        (TEXT, {"prompt": []}, "prompt"),
        (TEXT, {"prompt": [[]]}, "prompt"),
        (TEXT, {"prompt": ["a", ""]}, "prompt"),
        (TEXT, {"prompt": ["a", 1]}, "prompt"),
        (TEXT, {"prompt": [True]}, "prompt"),
        (TEXT, {"prompt": {"a": 1}}, "prompt"),
        (TEXT, {"prompt": [-1]}, "prompt"),
        (TEXT, {"prompt": [320]}, "prompt"),
        (TEXT, {"prompt": "a", "max_tokens": 0}, "max_tokens"),
        (TEXT, {"prompt": "a", "logprobs": True}, "logprobs"),
        (TEXT, {"prompt": ["a"] * 2000}, None),
        (TEXT, {"prompt": ["a"] * 20, "n": 100}, None),
    ],
)
def test_a_bad_value_is_400_and_names_its_field(
    http: httpx.Client, path: str, body: dict[str, Any], param: str | None, stream: bool
) -> None:
    reply = http.post(path, json={**body, "stream": stream})
    assert reply.status_code == 400, reply.text
    error = error_of(reply)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param, error
    good(http)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": Infinity}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"sampler_args": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}",
        b'{"seed": ' + b"9" * 10_000 + b"}",
        b"\x00\x01\x02",
    ],
    ids=lambda body: repr(body[-40:]),
)
def test_what_is_not_json_is_400(http: httpx.Client, body: bytes) -> None:
    reply = http.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert error_of(reply)["code"] in {"invalid_json", "invalid_type"}
    good(http)


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a", "model": "x" * (1 << 20)},
        {"prompt": "a", "x" * (1 << 20): 1},
        {"prompt": "a", "stop": ["x" * 1000] * 1000},
        {"prompt": "a", "sampler": "x" * (1 << 20)},
        {"prompt": "a", "logit_bias": {str(i): 1.0 for i in range(100_000)}},
    ],
    ids=lambda body: list(body)[-1][:20],
)
def test_an_error_repeats_only_the_beginning_of_what_is_long(http: httpx.Client, body: dict[str, Any]) -> None:
    reply = http.post(TEXT, json=body)
    assert reply.status_code in {400, 404}
    assert len(reply.content) < 4096
    assert error_of(reply)["param"]


def test_a_too_long_prompt_says_what_fits(http: httpx.Client) -> None:
    error = error_of(http.post(TEXT, json={"prompt": "x" * 600, "stream": True}))
    assert error["code"] == "context_length_exceeded"
    assert "601 tokens" in error["message"]
    assert "512" in error["message"]


def test_an_unknown_model_is_404(http: httpx.Client) -> None:
    for path, extra in ((CHAT, {"messages": HELLO}), (TEXT, {"prompt": "a"}), ("/tokenize", {"prompt": "a"})):
        reply = http.post(path, json={"model": "gpt-9", **extra})
        assert reply.status_code == 404
        assert error_of(reply)["code"] == "model_not_found"
        assert error_of(reply)["param"] == "model"
    assert http.get("/v1/models/gpt-9").status_code == 404
    good(http)


def test_unknown_paths_and_wrong_methods(http: httpx.Client) -> None:
    for method, path, status in (
        ("GET", "/nowhere", 404),
        ("GET", "/v1/models/", 404),
        ("POST", "/v1/completions/", 404),
        ("GET", CHAT, 405),
        ("DELETE", "/health", 405),
    ):
        reply = http.request(method, path)
        assert reply.status_code == status, path
        assert error_of(reply)["type"] == "invalid_request_error"
    assert http.get(CHAT).headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "auto"),
        ("response_format", {"type": "json_object"}),
        ("modalities", ["text", "audio"]),
        ("guided_json", {"type": "object"}),
        ("best_of", 4),
        ("continue_final_message", True),
        ("continue_final_message", 0),
        ("reasoning_effort", "high"),
    ],
)
def test_what_is_not_built_yet_is_said_not_ignored(http: httpx.Client, field: str, value: Any) -> None:
    reply = http.post(CHAT, json={"messages": HELLO, field: value})
    error = error_of(reply)
    assert (reply.status_code, error["code"], error["param"]) == (400, "not_built", field)
    assert "not built yet" in error["message"]


def test_images_and_tool_calls_in_messages_are_not_built_yet(http: httpx.Client) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for message, param in (
        ({"role": "user", "content": [{"type": "text", "text": "a"}, image]}, "messages[0].content[1].type"),
        ({"role": "assistant", "content": None, "tool_calls": [call]}, "messages[0].tool_calls"),
    ):
        error = error_of(http.post(CHAT, json={"messages": [message]}))
        assert (error["code"], error["param"]) == ("not_built", param)


@pytest.mark.parametrize(
    ("field", "hint"), [("max_token", "'max_tokens'"), ("temprature", "'temperature'"), ("zzz", None)]
)
def test_an_unknown_field_gets_the_nearest_name(http: httpx.Client, field: str, hint: str | None) -> None:
    reply = http.post(CHAT, json={"messages": HELLO, field: 1})
    error = error_of(reply)
    assert (reply.status_code, error["code"], error["param"]) == (400, "unknown_field", field)
    assert ("did you mean" in error["message"]) is (hint is not None)
    assert hint is None or hint in error["message"]
    inside = http.post(CHAT, json={"messages": [{"role": "user", "content": "x", "colour": 1}]})
    assert error_of(inside)["param"] == "messages[0].colour"


def test_tokenize_wants_one_of_two_and_detokenize_known_ids(http: httpx.Client) -> None:
    for body in ({}, {"prompt": "a", "messages": HELLO}):
        assert http.post("/tokenize", json=body).status_code == 400
    assert error_of(http.post("/detokenize", json={"tokens": [1, 320]}))["param"] == "tokens"
    assert http.post("/detokenize", json={"tokens": [-1]}).status_code == 400
