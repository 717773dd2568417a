"""`l4 chat`: the conversation, and the client of a running server against a real HTTP server that answers in OpenAI's form."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from typing import Any

import pytest

from helpers.commands import RunL4
from l4core.cli.chat import Message, converse
from l4core.cli.chat_remote import RemoteChat, read_stream
from l4core.errors import ConfigError, L4Error, RequestError


class Handler(BaseHTTPRequestHandler):
    """Lists one model; answers a chat with its last message in pieces; wants the key "secret" when the server has one."""

    server: FakeServer

    def do_GET(self) -> None:
        self._answer(200, self.server.models)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        text = body["messages"][-1]["content"]
        if text == "too long":
            self._answer(400, json.dumps({"error": {"message": "context is 8 tokens"}}).encode())
            return
        events = [{"choices": [{"delta": {"role": "assistant"}}]}]
        events += [{"choices": [{"delta": {"content": word}}]} for word in text.split()]
        lines = [f"data: {json.dumps(e)}\n\n" for e in events] + ["data: [DONE]\n\n"]
        self._answer(200, "".join(lines).encode())

    def _answer(self, status: int, body: bytes) -> None:
        key = self.server.key
        if key and self.headers.get("Authorization") != f"Bearer {key}":
            status, body = 401, b'{"error": {"message": "no key"}}'
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class FakeServer(ThreadingHTTPServer):
    key: str | None = None
    models: bytes = b'{"data": [{"id": "m"}]}'

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def say(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_pieces_come_one_by_one(server: FakeServer, suffix: str) -> None:
    chat = RemoteChat(server.url + suffix, None, {"max_tokens": 5})
    assert list(chat.answer(say("a b c"))) == ["a", "b", "c"]
    assert server.bodies == [{"model": "m", "messages": say("a b c"), "stream": True, "max_tokens": 5}]


def test_the_key_is_sent(server: FakeServer) -> None:
    server.key = "secret"
    assert list(RemoteChat(server.url, "secret", {}).answer(say("a"))) == ["a"]
    with pytest.raises(L4Error, match="wants an API key: no key") as caught:
        RemoteChat(server.url, None, {})
    assert "L4_API_KEY" in caught.value.fix


@pytest.mark.parametrize(
    "models", [b"<html>", b"[]", b'{"data": 5}', b'{"data": [{}]}', b"\xff", b""], ids=lambda models: repr(models)
)
def test_a_server_that_is_no_openai_endpoint(server: FakeServer, models: bytes) -> None:
    server.models = models
    with pytest.raises(L4Error, match="is no OpenAI endpoint"):
        RemoteChat(server.url, None, {})


@pytest.mark.parametrize("data", ["<html>", "5", "[]", '{"choices": [5]}', '{"error": "x"}'])
def test_a_stream_that_is_no_chat_completion(server: FakeServer, monkeypatch: pytest.MonkeyPatch, data: str) -> None:
    chat = RemoteChat(server.url, None, {})
    monkeypatch.setattr(Handler, "do_POST", lambda self: self._answer(200, f"data: {data}\n\n".encode()))
    with pytest.raises(L4Error, match="sent what is no chat completion"):
        list(chat.answer(say("a")))


@pytest.mark.parametrize(
    "url",
    ["nonsense", "ftp://x", "http://", "http://x:99999", "http://x:abc", "http://[::1", "http://a b/", "http://x:0"],
)
def test_what_is_no_address_is_a_sentence(url: str) -> None:
    with pytest.raises(ConfigError, match="wanted something like http://127"):
        RemoteChat(url, None, {})


def test_a_refused_request(server: FakeServer) -> None:
    with pytest.raises(RequestError, match="answered 400: context is 8 tokens"):
        list(RemoteChat(server.url, None, {}).answer(say("too long")))


def test_nobody_there(server: FakeServer) -> None:
    url = server.url
    server.server_close()
    with pytest.raises(L4Error, match="no answer from") as caught:
        RemoteChat(url, None, {})
    assert caught.value.fix == "start a server: l4 serve MODEL"


@pytest.mark.parametrize("url", ["localhost:30000", "ftp://x", "http://"])
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(ConfigError, match="wanted something like http"):
        RemoteChat(url, None, {})


def test_an_error_inside_the_stream() -> None:
    lines = [
        b'data: {"choices": [{"delta": {"content": "a"}}]}\n',
        b"\n",
        b'data: {"error": {"message": "engine died"}}\n',
    ]
    pieces = read_stream(iter(lines))
    assert next(pieces) == "a"
    with pytest.raises(L4Error, match="engine died"):
        next(pieces)


class Echo:
    """Answers with the number of messages it was given."""

    def __init__(self) -> None:
        self.seen: list[list[Message]] = []

    def __call__(self, messages: Sequence[Message]) -> Iterator[str]:
        self.seen.append([dict(m) for m in messages])
        if messages[-1]["content"] == "refuse":
            raise RequestError("too long")
        yield str(len(messages))
        if messages[-1]["content"] == "interrupt":
            raise KeyboardInterrupt
        yield "!"


def talk(monkeypatch: pytest.MonkeyPatch, *lines: str, system: bool = False) -> Echo:
    monkeypatch.setattr(sys, "stdin", StringIO("\n".join(lines)))
    echo = Echo()
    converse(echo, [{"role": "system", "content": "s"}] if system else [], interactive=False)
    return echo


def test_answers_stay_in_the_conversation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    echo = talk(monkeypatch, "one", "", "two")
    assert capsys.readouterr().out == "1!\n3!\n"
    assert [m["content"] for m in echo.seen[1]] == ["one", "1!", "two"]


def test_clear_keeps_the_system_message(monkeypatch: pytest.MonkeyPatch) -> None:
    echo = talk(monkeypatch, "one", "/clear", "two", "/exit", "three", system=True)
    assert [m["content"] for m in echo.seen[1]] == ["s", "two"]
    assert len(echo.seen) == 2


def test_an_interrupted_answer_stays_as_far_as_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    echo = talk(monkeypatch, "interrupt", "next")
    assert [m["content"] for m in echo.seen[1]] == ["interrupt", "1", "next"]


def test_a_refused_turn_is_dropped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    echo = talk(monkeypatch, "refuse", "next")
    assert [m["content"] for m in echo.seen[1]] == ["next"]
    assert "error: too long" in capsys.readouterr().err


def test_the_command(server: FakeServer, run_l4: RunL4, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", StringIO("hello there\n"))
    ended = run_l4("chat", "--url", server.url, "--system", "be kind", "--temperature", "0")
    assert (ended.code, ended.out) == (0, "hellothere\n")
    assert server.bodies[0]["messages"][0] == {"role": "system", "content": "be kind"}
    assert server.bodies[0]["temperature"] == 0


def test_an_engine_option_beside_a_url(server: FakeServer, run_l4: RunL4) -> None:
    ended = run_l4("chat", "--url", server.url, "--dtype", "float32")
    assert ended.code == 2
    assert "'dtype' has no effect" in ended.err
