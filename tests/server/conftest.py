"""A real server on a loopback port, with a real engine process that runs fake_engine.py, and a real tokenizer and template."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from l4core.chat.byte_tokenizer import build_byte_tokenizer
from l4core.config import EngineConfig, ServerConfig
from l4core.parallel.place import Layout
from l4core.server.app import build_app
from l4core.server.bridge import RestartPolicy
from l4core.server.lifecycle import Serving

HERE = Path(__file__).parent
VOCABULARY = 320


@dataclass
class Running:
    """A server in a thread of this process. stop() ends it and gives back what `run` raised, if anything."""

    url: str = ""
    serving: Serving | None = None
    loop: asyncio.AbstractEventLoop | None = None
    failure: BaseException | None = None
    thread: threading.Thread | None = None
    ready: threading.Event = field(default_factory=threading.Event)
    client: httpx.Client = field(
        default_factory=lambda: httpx.Client(verify=False, timeout=60)
    )  # no certificates to load

    @property
    def pid(self) -> int | None:
        assert self.serving is not None
        return self.serving.bridge.pid

    def stop(self) -> BaseException | None:
        assert self.thread is not None
        if self.loop is not None and self.serving is not None and self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.serving.stop)
        self.thread.join()
        self.client.close()
        return self.failure

    def get(self, path: str) -> httpx.Response:
        return self.client.get(self.url + path)

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return self.client.post(self.url + path, json=body)

    def metric(self, name: str) -> float:
        """Sum of a metric's series without extra labels."""
        text = self.get("/metrics").text
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name + "{"))


def wait_until(condition: Callable[[], bool]) -> None:
    """Poll; the test's own time-out ends what never comes."""
    while not condition():
        time.sleep(0.01)


def leave(server: Running, path: str, body: dict[str, Any], num_sequences: int) -> None:
    """Ask, and go once the server has taken it in, without a byte of the answer. Nothing is asked of an engine that is being started again."""
    content, pid = json.dumps(body).encode(), server.pid
    where = urlsplit(server.url)
    head = (
        f"POST {path} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    assert server.serving is not None
    bridge = server.serving.bridge
    with socket.create_connection((where.hostname or "", where.port or 0)) as sock:
        sock.sendall(head.encode() + content)
        wait_until(lambda: bridge.num_active == num_sequences or bridge.pid != pid)


@pytest.fixture(scope="session")
def left() -> Callable[[Running, str, dict[str, Any], int], None]:
    return leave


@pytest.fixture(scope="session")
def until() -> Callable[[Callable[[], bool]], None]:
    return wait_until


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.json and a byte tokenizer; no weights."""
    folder = tmp_path_factory.mktemp("server") / "smol"
    folder.mkdir()
    build_byte_tokenizer(VOCABULARY).save(str(folder / "tokenizer.json"))
    eos = VOCABULARY - 10  # <|eot|>
    config = {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 64,
        "intermediate_size_mlp": 64,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "bos_token_id": VOCABULARY - 15,
        "eos_token_id": eos,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session", autouse=True)
def _worker_finds_the_fake_engine() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]))
        patch.delenv("L4_API_KEY", raising=False)
        yield


@pytest.fixture(scope="session")
def start_server(checkpoint: Path) -> Callable[..., Running]:
    """start(engine={...}, server={...}, policy=...) → a Running that is ready or whose thread has ended."""

    def start(
        *,
        engine: dict[str, Any] | None = None,
        server: dict[str, Any] | None = None,
        policy: RestartPolicy | None = None,
        factory: str = "fake_engine:build",
        layouts: Sequence[Layout] = (Layout(),),
    ) -> Running:
        running = Running()

        def on_ready(url: str) -> None:
            running.url = url
            running.ready.set()

        async def live() -> None:
            serving = Serving(
                EngineConfig(**{"model": str(checkpoint), "served_model_name": "smol", **(engine or {})}),
                ServerConfig(**{"port": 0, "drain_seconds": 5.0, **(server or {})}),
                build_app=build_app,
                on_ready=on_ready,
                factory=factory,
                policy=policy or RestartPolicy(pause_seconds=0.0),
                layouts=layouts,
            )
            running.serving, running.loop = serving, asyncio.get_running_loop()
            await serving.run()

        def run() -> None:
            try:
                asyncio.run(live())
            except BaseException as error:  # noqa: BLE001  (handed to the test)
                running.failure = error
            running.ready.set()

        running.thread = threading.Thread(target=run)
        running.thread.start()
        running.ready.wait()
        return running

    return start


@pytest.fixture(scope="session")
def server(start_server: Callable[..., Running]) -> Iterator[Running]:
    """One server for all tests that leave it as it was. No key."""
    running = start_server()
    assert running.failure is None, running.failure
    yield running
    assert running.stop() is None


@pytest.fixture(scope="session")
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30, verify=False) as client:
        yield client
