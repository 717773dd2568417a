"""A request goes to another replica as long as its client has seen nothing, and never afterwards."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence

import pytest

from l4_ray.retry import MOST_LOSSES, Ask, Head, Part, ReplicaLostError, ask_until_answered, end_to_end

JSON = Head(status=200, headers=(("Content-Type", "application/json"),))
SSE = Head(status=200, headers=(("content-type", "text/event-stream; charset=utf-8"),))
ASK = Ask(method="POST", path="/v1/completions")
LOST = ReplicaLostError("killed")
Step = Part | ReplicaLostError


def unavailable(code: str) -> list[Step]:
    return [Head(status=503), json.dumps({"error": {"code": code}}).encode().replace(b'": "', b'":"')]


class Replicas:
    """Each try meets the next script; the last one serves all that follow. closed: tries that were closed."""

    def __init__(self, *scripts: Sequence[Step]) -> None:
        self._scripts = list(scripts)
        self.tries = 0
        self.closed = 0

    async def attempt(self, ask: Ask) -> AsyncGenerator[Part, None]:
        script = self._scripts[min(self.tries, len(self._scripts) - 1)]
        self.tries += 1
        try:
            for step in script:
                if isinstance(step, ReplicaLostError):
                    raise step
                yield step
        finally:
            self.closed += 1


def answer(replicas: Replicas, *, patience: float = 5.0) -> tuple[int, bytes]:
    """(status, body) as a client gets them."""

    async def ask() -> tuple[int, bytes]:
        found = await ask_until_answered(ASK, replicas.attempt, patience=patience)
        answer = found.head.status, b"".join([piece async for piece in found.body])
        assert replicas.closed == replicas.tries, "before the event loop's end would do it"
        return answer

    return asyncio.run(ask())


@pytest.mark.parametrize("lost", [[LOST], [JSON, LOST], [JSON, b'{"half', LOST], [SSE, LOST], []])
def test_what_the_client_has_not_seen_is_asked_again(lost: list[Step]) -> None:
    replicas = Replicas(lost, lost, [JSON, b'{"a', b'":1}'])
    assert answer(replicas) == (200, b'{"a":1}')
    assert replicas.tries == 3


def test_a_stream_passes_and_what_is_lost_within_it_is_told() -> None:
    assert answer(Replicas([SSE, b"data: 1\n\n", b"data: 2\n\n"])) == (200, b"data: 1\n\ndata: 2\n\n")
    replicas = Replicas([SSE, b"data: 1\n\n", LOST], [SSE, b"data: never\n\n"])
    status, body = answer(replicas)
    assert status == 200
    first, error, done = body.decode().strip().split("\n\n")
    assert (first, done) == ("data: 1", "data: [DONE]")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "replica_lost"
    assert replicas.tries == 1


def test_pieces_of_a_stream_do_not_wait_for_one_another() -> None:
    """The second piece is not there before the first was taken."""

    async def ask() -> None:
        taken = asyncio.Event()

        async def attempt(_: Ask) -> AsyncGenerator[Part, None]:
            yield SSE
            yield b"1"
            await taken.wait()
            yield b"2"

        found = await ask_until_answered(ASK, attempt)
        assert await anext(found.body) == b"1"
        taken.set()
        assert await anext(found.body) == b"2"

    asyncio.run(asyncio.wait_for(ask(), 5))


def test_a_client_that_goes_closes_the_exchange() -> None:
    replicas = Replicas([SSE, b"1", b"2"])

    async def ask() -> None:
        found = await ask_until_answered(ASK, replicas.attempt)
        await anext(found.body)
        await found.body.aclose()
        assert replicas.closed == 1

    asyncio.run(ask())


def test_a_replica_without_an_engine_is_no_answer_and_everything_else_is() -> None:
    starting = unavailable("engine_not_ready")
    replicas = Replicas(*[starting] * (MOST_LOSSES + 1), [JSON, b"{}"])
    assert answer(replicas, patience=30) == (200, b"{}")
    for status in (400, 401, 404, 413, 429, 500):
        replicas = Replicas([Head(status=status), b"no"])
        assert answer(replicas) == (status, b"no")
        assert replicas.tries == 1


def test_patience_ends() -> None:
    status, body = answer(Replicas(unavailable("draining")), patience=0.2)
    assert (status, json.loads(body)["error"]["code"]) == (503, "draining")
    assert answer(Replicas([LOST]), patience=0.0)[0] == 503


@pytest.mark.parametrize("death", [[LOST], unavailable("engine_dead")])
def test_a_request_that_kills_replicas_is_given_up(death: list[Step]) -> None:
    replicas = Replicas(death)
    status, _ = answer(replicas, patience=600)
    assert status == 503
    assert replicas.tries == MOST_LOSSES


def test_headers_of_one_connection_stay_there() -> None:
    given = (("Host", "a"), ("Authorization", "Bearer k"), ("Connection", "close"), ("Transfer-Encoding", "chunked"))
    assert end_to_end(given) == (("Authorization", "Bearer k"),)
