"""The engine process dies, refuses, or is full: what clients and /health see, and how it comes back."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from l4core.errors import CheckpointError, EngineDeadError
from l4core.server.bridge import RestartPolicy

Until = Callable[[Callable[[], bool]], None]


def ask(server: Any, text: str, **extra: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 1, **extra}
    reply: httpx.Response = server.post("/v1/chat/completions", body)
    return reply


@contextlib.contextmanager
def running(start_server: Any, **options: Any) -> Iterator[Any]:
    server = start_server(**options)
    assert server.failure is None, server.failure
    try:
        yield server
    finally:
        assert server.stop() is None


def test_a_killed_engine_fails_its_requests_and_comes_back(start_server: Any, until: Until) -> None:
    with running(start_server) as server, concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = server.pid
        waiting = pool.submit(ask, server, "STALL")
        streaming = pool.submit(ask, server, "SLOW", stream=True, max_tokens=400)
        until(lambda: server.serving.bridge.num_active == 2)
        until(lambda: server.metric("l4_generation_tokens_total") >= 1)
        os.kill(first, signal.SIGKILL)
        failed = waiting.result()
        assert failed.status_code == 503
        assert failed.json()["error"]["code"] == "engine_dead"
        assert "SIGKILL" in failed.json()["error"]["message"]
        assert failed.headers["retry-after"]
        lines = [line for line in streaming.result().text.split("\n\n") if line]
        assert lines[-1] == "data: [DONE]"
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "engine_dead"
        until(lambda: server.get("/ready").status_code == 200)
        assert server.pid != first
        assert ask(server, "hello").status_code == 200
        assert server.metric("l4_engine_restarts_total") == 1


def test_health_is_503_from_the_death_until_the_engine_is_back(start_server: Any, until: Until) -> None:
    with running(start_server, policy=RestartPolicy(pause_seconds=0.0)) as server:
        assert server.get("/health").json() == {"status": "ready"}
        seen: list[int] = []
        os.kill(server.pid, signal.SIGKILL)

        def back() -> bool:
            seen.append(server.get("/health").status_code)
            return seen[-1] == 200 and 503 in seen

        until(back)


def test_an_exception_in_a_step_is_logged_and_the_engine_restarted(
    start_server: Any, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    with running(start_server) as server:
        reply = ask(server, "RAISE")
        assert reply.status_code == 503
        assert "kernel" not in reply.text  # the traceback is for the log
        until(lambda: server.get("/ready").status_code == 200)
        assert "RuntimeError: a kernel went wrong" in caplog.text
        assert "fake_engine.py" in caplog.text
        assert ask(server, "hello").status_code == 200


def test_an_engine_that_hangs_is_started_again_and_tells_where(
    start_server: Any, until: Until, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Only while a step is due: an idle engine, and one that steps without progress, are left alone."""
    with (
        running(start_server, server={"watchdog_timeout": 2.0}) as server,
        concurrent.futures.ThreadPoolExecutor(2) as pool,
    ):
        assert ask(server, "hello").status_code == 200
        first = server.pid
        stalled = pool.submit(ask, server, "STALL")
        time.sleep(3.0)
        assert server.pid == first
        hanging = pool.submit(ask, server, "HANG")
        assert [hanging.result().status_code, stalled.result().status_code] == [503, 503]
        until(lambda: server.get("/ready").status_code == 200)
        assert server.pid != first
        assert ask(server, "hello").status_code == 200
        time.sleep(3.0)  # idle
        assert server.metric("l4_engine_restarts_total") == 1
    assert "made no step" in caplog.text
    assert "fake_engine.py" in capfd.readouterr().err


def test_a_client_that_gives_up_does_not_hide_a_hung_engine(start_server: Any, until: Until, left: Any) -> None:
    with running(start_server, server={"watchdog_timeout": 2.0}) as server:
        first = server.pid
        while server.pid == first:  # each request is aborted long before the time-out
            left(server, "/v1/completions", {"prompt": "HANG", "max_tokens": 1}, 1)
            until(lambda: server.serving.bridge.num_active == 0)
            time.sleep(0.3)
        until(lambda: server.pid not in {first, None})
        until(lambda: server.get("/ready").status_code == 200)
        assert ask(server, "hello").status_code == 200


def test_pages_of_a_dead_engine_are_not_shown_as_used(start_server: Any, until: Until) -> None:
    with running(start_server) as server, concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, server, "STALL")
        until(lambda: 'state="used"} 2.0' in server.get("/metrics").text)
        os.kill(server.pid, signal.SIGKILL)
        assert waiting.result().status_code == 503
        until(lambda: server.metric("l4_engine_restarts_total") == 1)
        text = server.get("/metrics").text
        assert 'l4_kv_pages{group="global",model_name="smol",state="used"} 0.0' in text
        assert 'l4_kv_pages{group="global",model_name="smol",state="total"} 1000.0' in text


def test_an_engine_that_keeps_dying_is_given_up(start_server: Any, tmp_path: Path) -> None:
    server = start_server(
        engine={"download_dir": f"once:{tmp_path / 'started'}"}, policy=RestartPolicy(max_restarts=2, pause_seconds=0.0)
    )
    assert server.failure is None
    ask_failed = ask(server, "DIE")
    assert ask_failed.status_code == 503
    server.thread.join()
    server.stop()
    assert isinstance(server.failure, EngineDeadError)
    assert "3 times" in str(server.failure)


def test_a_start_that_is_refused_raises_the_engines_own_error(start_server: Any) -> None:
    server = start_server(engine={"download_dir": "refused"})
    server.stop()
    assert isinstance(server.failure, CheckpointError)
    assert server.failure.fix == "download it again"
    assert "truncated" in server.failure.message


def test_a_start_that_is_killed_says_by_what(start_server: Any) -> None:
    server = start_server(engine={"download_dir": "killed"})
    server.stop()
    assert isinstance(server.failure, EngineDeadError)
    assert "SIGKILL" in server.failure.message
    assert server.failure.fix


def test_a_bug_in_the_start_brings_its_traceback(start_server: Any) -> None:
    server = start_server(engine={"download_dir": "broken"})
    server.stop()
    assert isinstance(server.failure, EngineDeadError)
    assert "ZeroDivisionError: a bug" in server.failure.message
    assert "fake_engine.py" in server.failure.message


def test_a_full_queue_is_429_with_retry_after(start_server: Any, until: Until) -> None:
    options = {"server": {"max_queued_requests": 3, "drain_seconds": 0.0}}
    with running(start_server, **options) as server, concurrent.futures.ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(ask, server, "STALL", n=n) for n in (1, 2)]
        until(lambda: server.serving.bridge.num_active == 3)
        for stream in (False, True):
            full = ask(server, "hello", stream=stream)
            assert full.status_code == 429
            assert full.headers["retry-after"].isdecimal()
            assert full.json()["error"]["type"] == "rate_limit_error"
            assert full.json()["error"]["code"] == "queue_full"
        assert ask(server, "hello", n=4).status_code == 400  # would never fit
        server.stop()
        assert [w.result().status_code for w in waiting] == [503, 503]


def test_a_sampler_the_engine_does_not_know_is_the_requests_fault(server: Any) -> None:
    reply = ask(server, "hello", sampler="nobody", n=2)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "sampler")
    assert server.serving.bridge.num_active == 0
