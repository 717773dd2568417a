"""`--dp 2`: two engines behind one server. The model is fake_engine.py."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from l4core import LLM
from l4core.config import EngineConfig, ServerConfig
from l4core.errors import CheckpointError, ConfigError
from l4core.parallel.place import layouts
from l4core.server.bridge import RestartPolicy


def ask(server: Any, text: str, **extra: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": text}], **extra}
    reply: httpx.Response = server.post("/v1/chat/completions", body)
    return reply


def start_two(start_server: Any, **engine: Any) -> Any:
    return start_server(
        engine={"device": "cpu", **engine},
        server={"max_queued_requests": 8},
        policy=RestartPolicy(max_restarts=1, pause_seconds=0.0),
        layouts=layouts(EngineConfig(**engine), ServerConfig(dp=2), {}),
    )


@pytest.fixture(scope="module")
def two(start_server: Any) -> Iterator[Any]:
    running = start_two(start_server)
    assert running.failure is None, running.failure
    yield running
    assert running.stop() is None


def loads(server: Any) -> list[int]:
    return [bridge.num_active for bridge in server.serving.bridge.bridges]


def test_the_least_loaded_gets_the_next_and_all_share_one_queue(two: Any, until: Any, tmp_path: Path) -> None:
    hold = f"HOLD {tmp_path / 'go'} please"
    with ThreadPoolExecutor(8) as pool:
        asked = []
        for count in range(1, 9):
            asked.append(pool.submit(ask, two, hold, max_tokens=2))
            until(lambda count=count: sum(loads(two)) == count)
        assert loads(two) == [4, 4]
        until(lambda: two.metric("l4_requests_running") == 8)
        assert ask(two, "hello").status_code == 429
        (tmp_path / "go").touch()
        assert [reply.result().status_code for reply in asked] == [200] * 8
    assert two.post("/flush_cache", {}).status_code == 200


def test_an_engine_that_is_killed_comes_back_alone(two: Any, until: Any, tmp_path: Path) -> None:
    """What had begun there is lost; what had not is answered by the other, and nobody sees a server without an engine."""
    first, second = two.serving.bridge.bridges
    hold = f"HOLD {tmp_path / 'go'} please"
    with ThreadPoolExecutor(4) as pool:
        begun = pool.submit(ask, two, "SLOW", max_tokens=400, stream=True)
        until(lambda: loads(two) == [1, 0])
        until(lambda: two.metric("l4_generation_tokens_total") >= 17)
        elsewhere = pool.submit(ask, two, hold, max_tokens=2)
        until(lambda: loads(two) == [1, 1])
        waiting = pool.submit(ask, two, hold, max_tokens=2, seed=5)
        until(lambda: loads(two) == [2, 1])
        killed, kept = first.pid, second.pid
        os.kill(killed, signal.SIGKILL)
        until(lambda: loads(two) == [0, 2])
        assert two.get("/health").status_code == 200
        assert '"code":"engine_dead"' in begun.result().text
        (tmp_path / "go").touch()
        assert elsewhere.result().status_code == 200
        assert waiting.result().status_code == 200
    until(lambda: two.metric("l4_engine_up") == 2)
    assert first.pid != killed
    assert second.pid == kept
    assert two.metric("l4_engine_restarts_total") == 1


def test_an_engine_that_dies_too_often_is_given_up_and_the_other_goes_on(two: Any, until: Any) -> None:
    first, _ = two.serving.bridge.bridges
    with ThreadPoolExecutor(1) as pool:
        begun = pool.submit(ask, two, "SLOW", max_tokens=400, stream=True)
        until(lambda: two.metric("l4_requests_running") == 1)
        os.kill(first.pid, signal.SIGKILL)  # it was started again once, and may be no more
        assert '"code":"engine_dead"' in begun.result().text
    until(lambda: first.state.value == "stopped")
    assert (two.metric("l4_engine_up"), two.metric("l4_requests_running")) == (1, 0)
    assert two.get("/health").status_code == 200
    assert ask(two, "hello").status_code == 200


def test_a_start_that_fails_ends_all(start_server: Any) -> None:
    assert type(start_two(start_server, download_dir="refused").failure) is CheckpointError


def test_each_engine_has_devices_of_its_own() -> None:
    first, second = layouts(EngineConfig(tp=2), ServerConfig(dp=2), {})
    assert [place.device for place in first.places] == [0, 1]
    assert [place.device for place in second.places] == [2, 3]


def test_one_device_is_not_enough() -> None:
    with pytest.raises(ConfigError, match="--device cuda:1 is one device, and --tp 1 --dp 2 take 2"):
        layouts(EngineConfig(device="cuda:1"), ServerConfig(dp=2), {})
    with pytest.raises(ConfigError, match="--device cuda:1 is one device, and --tp 2 take 2"):
        LLM("nowhere", tp=2, device="cuda:1")
