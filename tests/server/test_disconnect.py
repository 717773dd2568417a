"""The client goes: its sequences are aborted and their pages are free, as the engine itself tells."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest

CHAT = "/v1/chat/completions"
Until = Callable[[Callable[[], bool]], None]


def idle(server: Any) -> bool:
    return bool(
        server.serving.bridge.num_active == 0
        and server.metric("l4_requests_running") == 0
        and server.metric("l4_kv_usage_ratio") == 0
    )


@pytest.mark.parametrize("word", ["SLOW", "STALL"])
@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_that_is_left_is_aborted(server: Any, until: Until, left: Any, word: str, n: int) -> None:
    body = {"messages": [{"role": "user", "content": word}], "stream": True, "n": n}
    before = server.metric("l4_requests_dropped_total")
    if word == "STALL":  # not a single byte comes, not even the status line
        left(server, CHAT, body, n)
    else:
        with (
            httpx.Client(base_url=server.url, verify=False, timeout=60) as client,
            client.stream("POST", CHAT, json=body) as reply,
        ):
            pieces = reply.iter_raw()
            assert next(pieces)
            assert server.serving.bridge.num_active == n
    until(lambda: idle(server))
    assert server.metric("l4_requests_dropped_total") == before + n


def test_a_whole_answer_nobody_waits_for_is_aborted(server: Any, until: Until, left: Any) -> None:
    body = {"prompt": ["STALL", "STALL too"], "max_tokens": 400}
    before = server.metric("l4_requests_dropped_total")
    left(server, "/v1/completions", body, 2)
    until(lambda: idle(server))
    assert server.metric("l4_requests_dropped_total") == before + 2


def test_a_client_that_goes_in_the_middle_of_its_body_harms_nobody(server: Any) -> None:
    async def half() -> None:
        host, port = server.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        head = f"POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n"
        writer.write(head.encode() + b'{"messages"')
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    asyncio.run(half())
    assert server.get("/health").status_code == 200


def test_a_stop_string_frees_the_sequence_at_once(server: Any, until: Until) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], "stop": "capital", "ignore_eos": True, "stream": True}
    reply = server.post(CHAT, body)
    assert '"finish_reason":"stop"' in reply.text
    until(lambda: idle(server))
