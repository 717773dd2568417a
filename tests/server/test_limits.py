"""How bodies are read: size, declared type, encoding."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}


def pieces(total: int) -> Iterator[bytes]:
    yield b'{"messages": [{"role": "user", "content": "'
    for _ in range(total // 65_536):
        yield b"x" * 65_536
    yield b'"}]}'


def test_ten_megabytes_are_413_with_and_without_a_length(http: httpx.Client) -> None:
    headers = {"content-type": "application/json"}
    whole = b"".join(pieces(10 << 20))
    for content in (whole, pieces(10 << 20)):
        reply = http.post(CHAT, content=content, headers=headers)
        assert reply.status_code == 413
        assert reply.json()["error"]["code"] == "body_too_large"
        assert http.post(CHAT, json=BODY).status_code == 200


def test_a_body_just_inside_the_limit_is_read(http: httpx.Client) -> None:
    content = b'{"prompt": [' + b",".join([b"1"] * (3 << 20)) + b"]}"
    reply = http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("text", ["ab " * 2_600_000, "a" * 7_800_000, "<|eot|>" * 1_100_000], ids=lambda text: text[:7])
def test_text_that_cannot_fit_is_refused_at_once(http: httpx.Client, text: str) -> None:
    """Tokenising it would take ten seconds and more."""
    for path, body, param in (
        ("/v1/completions", {"prompt": text}, "prompt"),
        ("/v1/completions", {"prompt": ["hello", text]}, "prompt"),
        (CHAT, {"messages": [{"role": "user", "content": text}]}, "messages"),
        ("/tokenize", {"prompt": text}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": text}]}, "messages"),
    ):
        reply = http.post(path, json=body, timeout=8.0)
        assert reply.status_code == 400
        error = reply.json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", param)
        assert str(len(text))[:2] in error["message"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
def test_json_must_be_declared(http: httpx.Client, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    reply = http.post(CHAT, content=json.dumps(BODY).encode(), headers=headers)
    assert reply.status_code == 415
    assert "application/json" in reply.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON", "application/vnd.x+json"])
def test_kinds_of_json_are_taken(http: httpx.Client, kind: str) -> None:
    reply = http.post(CHAT, content=json.dumps(BODY).encode(), headers={"content-type": kind})
    assert reply.status_code == 200


def test_a_compressed_body_is_415(http: httpx.Client) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    assert http.post(CHAT, content=b"\x1f\x8b", headers=headers).status_code == 415


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /health HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 200_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"x-many: 1\r\n" * 20_000 + b"\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
    ids=["huge header", "many headers", "two lengths", "tls"],
)
def test_malformed_http_is_refused_and_the_server_lives(server: Any, http: httpx.Client, request_bytes: bytes) -> None:
    where = urlsplit(server.url)
    with socket.create_connection((where.hostname, where.port)) as sock:
        reply = b""
        with contextlib.suppress(OSError):  # the server may close before it has read all
            sock.sendall(request_bytes)
            sock.shutdown(socket.SHUT_WR)
            while piece := sock.recv(65_536):
                reply += piece
    assert b" 200 " not in reply
    assert http.post(CHAT, json=BODY).status_code == 200


def test_a_prompt_of_the_whole_context_is_read(start_server: Callable[..., Any]) -> None:
    """1.2 million token ids are 10 MB of JSON; the limit follows the context, up to Scout's whole window."""
    running = start_server(engine={"context_length": 10_485_760})
    try:
        text = json.dumps({"prompt": [100] * 1_200_000, "max_tokens": 1}).encode()
        padded = text + b" " * (10_000_000 - len(text))  # as long as ids of six digits make it
        reply = running.client.post(
            f"{running.url}/v1/completions", content=padded, headers={"content-type": "application/json"}
        )
        assert reply.status_code == 200, reply.text
        assert reply.json()["usage"]["prompt_tokens"] == 1_200_000
    finally:
        running.stop()
