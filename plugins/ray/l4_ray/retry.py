"""An HTTP exchange that may be tried again on another replica, as long as the client has seen nothing of the answer. Knows no ray.

A whole answer is held back until it is complete; a stream begins with its first piece (`l4 serve` sends no status line before the first token). What
is lost after that ends the stream with an error event, as `l4 serve` does when its engine dies.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

PATIENCE_SECONDS = 120.0
MOST_LOSSES = 4
"""Replicas that may die with a request in hand before it is suspected of having killed them."""
NOT_TAKEN = (b'"engine_not_ready"', b'"draining"')
"""Codes of a 503 by which a server says that it never began."""
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0
STREAM = "text/event-stream"
HOP_BY_HOP = frozenset(
    (
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "content-length",
        "host",
    )
)
"""Headers of one connection, not of the exchange (RFC 9110, 7.6.1), and two that the next hop writes itself."""


class ReplicaLostError(Exception):
    """The replica is gone, or its engine."""


Header = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request. path: without a route prefix.  query: as it was written, without the question mark."""

    method: str
    path: str
    query: str = ""
    headers: tuple[Header, ...] = ()
    body: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Status line and headers."""

    status: int
    headers: tuple[Header, ...] = ()

    @property
    def streams(self) -> bool:
        return any(name.lower() == "content-type" and value.startswith(STREAM) for name, value in self.headers)


Part = Head | bytes
Attempt = Callable[[Ask], AsyncGenerator[Part, None]]
"""One try on one replica: a Head, then pieces of the body. Raises ReplicaLostError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """head and what the client gets. tries: replicas that were asked.  close: always, when the client is done or gone."""

    head: Head
    body: AsyncGenerator[bytes, None]
    tries: int


def end_to_end(headers: tuple[Header, ...]) -> tuple[Header, ...]:
    """Without those of one connection."""
    return tuple((name, value) for name, value in headers if name.lower() not in HOP_BY_HOP)


async def ask_until_answered(ask: Ask, attempt: Attempt, *, patience: float = PATIENCE_SECONDS) -> Answer:
    """The first answer that begins. A 503 is no answer while there is patience, in seconds: another replica may have an engine."""
    deadline, pause, tries, losses = time.monotonic() + patience, FIRST_PAUSE, 0, 0
    while True:
        tries += 1
        found = await _try(ask, attempt)
        if isinstance(found, _Begun):
            return Answer(head=found.head, body=_stream(found.first, found.rest), tries=tries)
        if isinstance(found, _Whole) and found.head.status != 503:
            return Answer(head=found.head, body=_once(found.body), tries=tries)
        losses += not isinstance(found, _Whole) or not any(code in found.body for code in NOT_TAKEN)
        if losses >= MOST_LOSSES or time.monotonic() + pause > deadline:
            if isinstance(found, _Whole):
                return Answer(head=found.head, body=_once(found.body), tries=tries)
            return _unavailable(str(found), tries)
        await asyncio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


@dataclass(frozen=True, slots=True)
class _Whole:
    head: Head
    body: bytes


@dataclass(frozen=True, slots=True)
class _Begun:
    head: Head
    first: bytes
    rest: AsyncGenerator[Part, None]


async def _try(ask: Ask, attempt: Attempt) -> _Whole | _Begun | ReplicaLostError:
    """As much of an answer as must be there before the client may be told anything."""
    parts = attempt(ask)
    try:
        head = await anext(parts, None)
        if not isinstance(head, Head):
            await parts.aclose()
            return ReplicaLostError("the replica said nothing")
        if head.streams:
            return _Begun(head, _piece(await anext(parts, b"")), parts)
        return _Whole(head, b"".join([_piece(part) async for part in parts]))
    except ReplicaLostError as error:
        return error


def _piece(part: Part) -> bytes:
    assert isinstance(part, bytes), "a head comes once"
    return part


async def _once(body: bytes) -> AsyncGenerator[bytes, None]:
    yield body


async def _stream(first: bytes, parts: AsyncGenerator[Part, None]) -> AsyncGenerator[bytes, None]:
    try:
        yield first
        async for part in parts:
            yield _piece(part)
    except ReplicaLostError as error:
        yield b"data: " + _error(f"the replica was lost in the middle of this answer: {error}", "replica_lost")
        yield b"\n\ndata: [DONE]\n\n"
    finally:
        await parts.aclose()


def _unavailable(reason: str, tries: int) -> Answer:
    body = _error(f"no replica could answer; the last of {tries} tries: {reason}", "no_replica")
    head = Head(status=503, headers=(("content-type", "application/json"), ("retry-after", "5")))
    return Answer(head=head, body=_once(body), tries=tries)


def _error(message: str, code: str) -> bytes:
    detail = {"message": message, "type": "server_error", "param": None, "code": code}
    return json.dumps({"error": detail}).encode()
