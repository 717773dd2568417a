"""Several ranks of one engine behind the server: processes, gloo and the control plane are real, the model is fake_engine.py."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest

from helpers.processes import lives
from l4core.errors import CheckpointError, EngineDeadError
from l4core.parallel.place import local_layout
from l4core.server.bridge import RestartPolicy

TIMEOUT = 3.0


def ask(server: Any, text: str, **extra: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": text}], **extra}
    reply: httpx.Response = server.post("/v1/chat/completions", body)
    return reply


def start_ranks(start_server: Any, tp: int = 2, **engine: Any) -> Any:
    return start_server(
        engine={"tp": tp, "dist_timeout": TIMEOUT, "device": "cpu", **engine},
        policy=RestartPolicy(max_restarts=100, pause_seconds=0.0),
        layouts=(local_layout(tp, TIMEOUT),),
    )


@pytest.fixture(scope="module")
def server(start_server: Any) -> Iterator[Any]:
    """Two ranks; a test may kill them: they come back."""
    running = start_ranks(start_server)
    assert running.failure is None, running.failure
    yield running
    assert running.stop() is None


def ranks_of(server: Any) -> list[psutil.Process]:
    found = psutil.Process(server.pid).children()
    return sorted(found, key=lambda process: process.pid)


@contextlib.contextmanager
def ask_later(server: Any, text: str) -> Iterator[Future[httpx.Response]]:
    """The reply to come; the request has been taken in."""
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(ask, server, text)
        while server.serving.bridge.num_active == 0:
            time.sleep(0.01)
        yield reply


def answers(server: Any) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return ask(server, "hello", seed=7).status_code == 200
    return False


def test_two_ranks_answer(server: Any) -> None:
    reply = ask(server, "hello", seed=7)
    assert reply.json()["choices"][0]["message"]["content"] == "Seed 7: the capital of France is Paris. é🙂"
    assert len(ranks_of(server)) == 2


def test_they_listen_on_the_loopback_alone(server: Any) -> None:
    """Where they meet, torch's store and gloo's own sockets."""
    sockets = [
        c for rank in ranks_of(server) for c in rank.net_connections(kind="inet") if c.status == psutil.CONN_LISTEN
    ]
    assert {sock.laddr.ip for sock in sockets} == {"127.0.0.1"}


def test_a_killed_rank_ends_all_and_they_come_back(server: Any, until: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Requests hear which rank it was; nothing of the old processes is left."""
    old, nursery = ranks_of(server), psutil.Process(server.pid)
    with ask_later(server, "STALL") as waiting:
        os.kill(old[1].pid, signal.SIGKILL)
        failed = waiting.result()
    assert failed.status_code == 503
    assert "of rank 1 was ended by signal SIGKILL" in failed.json()["error"]["message"]
    until(lambda: answers(server))
    assert not any(map(lives, [*old, nursery]))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_missed_by_the_other(
    server: Any, until: Any, rank: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Idle, too: it is signs of life that are missed, not a step."""
    old = ranks_of(server)
    os.kill(old[rank].pid, signal.SIGSTOP)
    until(lambda: server.get("/health").status_code == 503)
    until(lambda: answers(server))
    assert f"rank {rank} was not heard of for {TIMEOUT:g} s" in caplog.text
    assert not any(map(lives, old))


def test_an_error_on_one_rank_is_told_with_its_trace(server: Any, until: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert ask(server, "RAISE 1").status_code == 503
    assert "rank 1: RuntimeError: a kernel went wrong" in caplog.text
    until(lambda: answers(server))


def test_ranks_that_draw_different_tokens_end(server: Any, until: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert ask(server, "DRIFT 1").status_code == 503
    assert "was not the same on rank 1 and rank 0: they scheduled or drew different tokens" in caplog.text
    until(lambda: answers(server))


def test_without_their_nursery_ranks_do_not_live_on(server: Any, until: Any) -> None:
    old = ranks_of(server)
    os.kill(server.pid, signal.SIGKILL)
    until(lambda: server.get("/health").status_code == 503)
    until(lambda: answers(server))
    assert not any(map(lives, old))


@pytest.mark.parametrize(
    ("mode", "kind", "text"),
    [
        ("refused@1", CheckpointError, "rank 1: the shard model-1.safetensors is truncated"),
        ("killed@1", EngineDeadError, "of rank 1 was ended by signal SIGKILL while it was starting"),
        ("broken@1", EngineDeadError, "rank 1: ZeroDivisionError: a bug"),
    ],
)
def test_a_rank_that_cannot_start_is_named(start_server: Any, mode: str, kind: type[Exception], text: str) -> None:
    failure = start_ranks(start_server, download_dir=mode).failure
    assert type(failure) is kind
    assert text in str(failure)
