"""The drive of `make demo`: measuring a stream, the port, a server that does not come up."""

from __future__ import annotations

import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from helpers import ports
from l4core.demo.ask import Piece, Reply, connect, long_text, show_stream
from l4core.demo.run import chunk_tokens, measured
from l4core.demo.server_process import ServerProcess, _answers, free_port
from l4core.errors import L4Error


def test_a_stream_is_printed_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    pieces = [Piece(), Piece(text="Par"), Piece(text="is."), Piece(prompt_tokens=20, completion_tokens=3)]
    reply = show_stream(pieces)
    assert capsys.readouterr().out == "Paris.\n"
    assert (reply.text, reply.prompt_tokens, reply.completion_tokens) == ("Paris.", 20, 3)
    assert reply.first_seconds >= 0
    assert reply.token_seconds >= 0


def test_an_empty_stream() -> None:
    reply = show_stream([])
    assert (reply.text, reply.tokens_per_second) == ("", 0.0)


def test_figures() -> None:
    reply = Reply(text="", prompt_tokens=1280, completion_tokens=11, first_seconds=0.5, token_seconds=2.0)
    assert measured(reply, 512) == (
        "prompt 1,280 tokens = 2.50 chunks of 512 · first token after 0.50 s · 11 tokens at 5.0 tok/s"
    )


def test_the_long_text_is_longer_than_two_chunks() -> None:
    assert len(long_text()) > 4 * 1024  # English takes more than a quarter of a token a letter


def test_chunk_tokens(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"attention_chunk_size": 64}', encoding="utf-8")
    assert chunk_tokens(tmp_path) == 64


def test_a_busy_port_is_passed_over() -> None:
    port = ports.free_port()
    with socket.create_server(("127.0.0.1", port)):
        assert free_port(port) not in {0, port}
    assert free_port(port) == port


def test_a_server_that_cannot_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (
        ServerProcess(tmp_path / "nothing", name="x", port=free_port(0)) as server,
        pytest.raises(L4Error, match="ended with exit code") as caught,
    ):
        server.wait_ready()
    assert "before it was ready" in caught.value.message
    assert any(line.startswith("error:") for line in server.lines)
    assert "  | error:" in capsys.readouterr().out


def test_neither_a_proxy_nor_a_key_of_the_environment_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A loopback server that answers only what comes without a proxy; the server's own process is not given the key."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("L4_API_KEY", "")  # an empty key is an error of its own: it would be told first

    class Models(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b'{"object": "list", "data": []}'
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Models)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    assert _answers(url)
    assert connect(url).models.list().data == []
    server.shutdown()
    server.server_close()
    with ServerProcess(tmp_path / "nothing", name="x", port=free_port(0)) as started:
        with pytest.raises(L4Error):
            started.wait_ready()
        assert not any("API key" in line for line in started.lines)


def test_report_lines(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "nothing", name="x", port=free_port(0)) as server:
        server.lines[:] = ["17:00:00 INFO  attention       sdpa (l4core 0.1.0) · portable"]
        assert server.report_line("attention") == "sdpa (l4core 0.1.0) · portable"
        assert server.report_line("page size") == "unknown"
