"""A server process from its first line to its exit status."""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from helpers.processes import lives
from l4core.errors import ConfigError
from l4core.server.listen import address, is_loopback, listen

Until = Callable[[Callable[[], bool]], None]
Start = Callable[..., tuple[subprocess.Popen[str], str]]
CHAT = "/v1/chat/completions"


def ask(url: str, text: str, **extra: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": text}], **extra}
    return httpx.post(url + CHAT, json=body, timeout=60, verify=False)


@pytest.fixture
def start(checkpoint: Path) -> Iterator[Start]:
    """start(drain_seconds) → (process, url), ready; start(drain_seconds, "slow") → (process, url), listening."""
    started: list[subprocess.Popen[str]] = []

    def launch(drain_seconds: float, *mode: str) -> tuple[subprocess.Popen[str], str]:
        script = str(Path(__file__).with_name("serve_fake.py"))
        process = subprocess.Popen(
            [sys.executable, script, str(checkpoint), str(drain_seconds), *mode], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        if mode:
            return process, f"http://127.0.0.1:{listening_port(process.pid)}"
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"http://\S+", line):
                return process, found.group()
        raise AssertionError("the server ended before it was ready")

    yield launch
    for process in started:
        process.kill()
        process.communicate()


def listening_port(pid: int) -> int:
    """Polls; the engine process has been started too."""
    process = psutil.Process(pid)
    while True:
        ports = [c.laddr.port for c in process.net_connections() if c.status == psutil.CONN_LISTEN]
        if ports and process.children():
            return int(ports[0])
        time.sleep(0.01)


def num_active(url: str) -> float:
    text = httpx.get(f"{url}/metrics", verify=False).text
    return sum(float(v) for v in re.findall(r"^l4_requests_running\S* (\S+)", text, re.MULTILINE))


def refuses(url: str) -> bool:
    """No new connection is taken."""
    where = urlsplit(url)
    try:
        socket.create_connection((where.hostname, where.port)).close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_the_exit_status_is_0(
    start: Start, until: Until, tmp_path: Path, sig: signal.Signals
) -> None:
    process, url = start(60.0)
    (worker,) = psutil.Process(process.pid).children()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        hold = f"HOLD {tmp_path / 'go'} please"
        whole = pool.submit(ask, url, hold, max_tokens=10)
        stream = pool.submit(ask, url, hold, max_tokens=10, stream=True)
        until(lambda: num_active(url) == 2)
        os.kill(worker.pid, sig)  # a service manager signals the whole group; the engine goes on
        process.send_signal(sig)
        until(lambda: refuses(url))
        (tmp_path / "go").touch()
        assert whole.result().json()["usage"]["completion_tokens"] == 10
        assert stream.result().text.count('"finish_reason":"length"') == 1
    assert process.wait() == 0
    until(lambda: not lives(worker))


def test_after_the_drain_deadline_requests_are_ended_with_an_error(start: Start, until: Until) -> None:
    process, url = start(0.0)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        whole = pool.submit(ask, url, "STALL")
        stream = pool.submit(ask, url, "SLOW", max_tokens=400, stream=True)
        until(lambda: num_active(url) == 2)
        process.send_signal(signal.SIGTERM)
        assert whole.result().status_code == 503
        assert whole.result().json()["error"]["code"] == "draining"
        assert json.loads(stream.result().text.split("\n\n")[-3].removeprefix("data: "))["error"]["code"] == "draining"
    assert process.wait() == 0


def test_a_second_signal_ends_the_drain(start: Start, until: Until) -> None:
    process, url = start(3600.0)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        whole = pool.submit(ask, url, "STALL")
        until(lambda: num_active(url) == 1)
        process.send_signal(signal.SIGTERM)
        until(lambda: refuses(url))
        process.send_signal(signal.SIGTERM)
        assert whole.result().status_code == 503
    assert process.wait() == 0


def test_while_the_model_loads_the_server_says_so_and_can_be_ended(start: Start, until: Until) -> None:
    process, url = start(60.0, "slow")
    (worker,) = psutil.Process(process.pid).children()
    for path in ("/health", "/ready"):
        reply = httpx.get(url + path, verify=False)
        assert (reply.status_code, reply.json()) == (503, {"status": "starting"})
    for reply in (ask(url, "hello"), httpx.get(f"{url}/v1/models", verify=False)):
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_not_ready")
        assert reply.headers["retry-after"]
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0
    assert not lives(worker)


def test_a_killed_server_takes_its_engine_along(start: Start, until: Until) -> None:
    process, _ = start(1.0)
    (worker,) = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    until(lambda: not lives(worker))


def test_the_block_on_stdout_has_the_engines_report_and_the_address(
    start_server: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    server = start_server()
    assert server.stop() is None
    lines = capfd.readouterr().out.splitlines()
    assert lines == ["model           fake", "attention       none", f"address         {server.url}"]


def test_serving_to_others_without_a_key_is_said(start_server: Any, capfd: pytest.CaptureFixture[str]) -> None:
    assert start_server(server={"host": "0.0.0.0"}).stop() is None
    assert "none: whoever reaches this address" in capfd.readouterr().out
    assert start_server(server={"host": "0.0.0.0", "api_key": "k"}).stop() is None
    assert "whoever" not in capfd.readouterr().out


def test_a_taken_port_is_told_before_the_model_loads(start_server: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = start_server(server={"port": taken.getsockname()[1]}, factory="no_such_module:build")
        server.stop()
    assert isinstance(server.failure, ConfigError)
    assert "in use" in server.failure.message
    assert "--port 0" in server.failure.fix


def test_a_host_that_is_not_ours_is_a_config_error() -> None:
    for host in ("no.such.host.invalid", "203.0.113.7"):
        with pytest.raises(ConfigError):
            listen(host, 0, backlog=1)


def test_localhost_is_one_port_on_all_its_addresses() -> None:
    sockets = listen("localhost", 0, backlog=1)
    try:
        assert len({sock.getsockname()[1] for sock in sockets}) == 1
        assert address("localhost", sockets[0]) == f"http://localhost:{sockets[0].getsockname()[1]}"
        assert address("::1", sockets[0]).startswith("http://[::1]:")
    finally:
        for sock in sockets:
            sock.close()
    assert [is_loopback(h) for h in ("localhost", "127.0.0.1", "::1", "0.0.0.0", "example.org")] == [True] * 3 + [
        False
    ] * 2


def test_the_server_process_loads_no_torch(checkpoint: Path) -> None:
    """The engine has torch; the server's share of the memory stays small."""
    code = (
        "import sys; from pathlib import Path; import l4core.server.app; from l4core.config import EngineConfig;"
        "from l4core.engine.process.messages import Ready; from l4core.server.service import load_frontend;"
        f"load_frontend(EngineConfig(model='x'), Ready(report=[], folder={str(checkpoint)!r}, context_length=9));"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
