"""An event stream's end: whoever owns its source is told, in whatever moment the client goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from l4core.server.sse import EventStream


async def two(started: list[str]) -> AsyncGenerator[bytes, None]:
    started.append("started")
    yield b"data: 1"
    yield b"data: 2"


def run(*, full_buffer: bool, stays: bool) -> tuple[list[str], list[bytes]]:
    """full_buffer: the status line cannot be written.  stays: the client does. → (what happened, pieces written)."""
    happened: list[str] = []
    written: list[bytes] = []

    async def send(message: Any) -> None:
        if full_buffer:
            await asyncio.Event().wait()
        written.append(message.get("body", b""))

    async def receive() -> dict[str, str]:
        if stays:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    stream = EventStream(two(happened), lambda: happened.append("closed"))
    asyncio.run(asyncio.wait_for(stream({"type": "http"}, receive, send), 5))
    return happened, written


def test_all_pieces_are_written_then_it_is_closed() -> None:
    assert run(full_buffer=False, stays=True) == (["started", "closed"], [b"", b"data: 1", b"data: 2", b""])


@pytest.mark.parametrize("full_buffer", [True, False])
def test_a_client_that_goes_closes_it_even_before_it_began(full_buffer: bool) -> None:
    happened, _ = run(full_buffer=full_buffer, stays=False)
    assert happened[-1] == "closed"
    assert full_buffer == ("started" not in happened)
