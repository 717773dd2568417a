"""Ranks on several machines (here: processes without a common parent), and under torchrun. The model is fake_engine.py."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from helpers.ports import free_port
from helpers.processes import lives
from helpers.profile import FULL
from helpers.serving import Served

HERE = Path(__file__).parent
SCRIPT = HERE / "serve_options.py"
Launch = Callable[..., Served]


def ask(url: str, text: str) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": text}], "seed": 7}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60, verify=False)


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return ask(url, "hello").status_code == 200
    return False


def engines(served: Served) -> list[psutil.Process]:
    """The processes of the ranks that it started itself."""
    found = psutil.Process(served.process.pid).children(recursive=True)
    return [process for process in found if "l4core.engine.process.worker" in process.cmdline()]


@pytest.fixture
def launch(checkpoint: Path) -> Iterator[Launch]:
    """launch(command=…, **options) → the process, started."""
    started: list[Served] = []

    def start(command: tuple[str, ...] = (sys.executable,), **options: Any) -> Served:
        given = {
            "model": str(checkpoint),
            "served_model_name": "smol",
            "port": 0,
            "tp": 2,
            "dist_timeout": 3.0,
            "device": "cpu",
            **options,
        }
        process = subprocess.Popen(
            [*command, str(SCRIPT), json.dumps(given)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        started.append(Served(process))
        return started[-1]

    yield start
    for served in started:
        if served.process.poll() is None:
            served.process.kill()
        served.process.wait()
        served.join()


def machines(launch: Launch, **differing: Any) -> tuple[Served, Served]:
    """differing: options of the second alone."""
    same = {"nnodes": 2, "dist_init_addr": f"127.0.0.1:{free_port()}"}
    second = launch(node_rank=1, **same, **differing)  # it waits for the first
    return launch(node_rank=0, **same), second


def test_a_machine_that_lost_its_rank_comes_back_and_ends_with_the_first(
    launch: Launch, until: Any, tmp_path: Path
) -> None:
    """Told to end at once, as by torchrun or Kubernetes, they finish what runs."""
    first, second = machines(launch)
    url = first.wait()
    assert ask(url, "hello").json()["choices"][0]["message"]["content"].startswith("Seed 7:")
    (rank,) = engines(second)
    rank.send_signal(signal.SIGKILL)
    until(lambda: httpx.get(f"{url}/health", verify=False).status_code == 503)
    until(lambda: answers(url))
    assert "rank 1 (machine 1" in first.output
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, url, f"HOLD {tmp_path / 'go'} please")
        until(lambda: 'l4_requests_running{model_name="smol"} 1' in httpx.get(f"{url}/metrics", verify=False).text)
        for served in (second, first):
            served.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        (tmp_path / "go").touch()
        assert asked.result().status_code == 200, f"{asked.result().text}\n{first.output}\n{second.output}"
    assert first.process.wait(60) == 0, first.output
    assert second.process.wait(60) == 0, second.output


def test_a_stopped_rank_that_is_alone_on_its_machine_is_ended_there(launch: Launch, until: Any) -> None:
    """No rank beside it notices: the process that started it does. A rank that computes along, and (`make test-all`) rank 0."""
    both = machines(launch)
    url = both[0].wait()
    for number in (1, 0) if FULL else (1,):
        (rank,) = engines(both[number])
        rank.send_signal(signal.SIGSTOP)
        until(lambda rank=rank: not lives(rank))
        until(lambda: answers(url))
        assert f"rank {number} gave no sign of life for 6 s: it is ended" in both[number].output


def test_machines_that_differ_are_refused_by_name(launch: Launch) -> None:
    first, second = machines(launch, kv_cache_dtype="float16")
    for served in (first, second):
        assert served.process.wait(60) == 1
        served.join()
        assert "--kv-cache-dtype is float16 there, and auto here" in served.output
        assert "rank 1 (machine 1" in served.output


def test_another_checkpoint_is_refused_by_name(launch: Launch, checkpoint: Path, tmp_path: Path) -> None:
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-6}))
    first, second = machines(launch, model=str(tmp_path))
    for served in (first, second):
        assert served.process.wait(60) == 1
        served.join()
        assert "differ: checkpoint config.json is" in served.output


def test_torchrun_places_ranks(launch: Launch, until: Any) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    run = launch(torchrun)
    assert ask(run.wait(), "hello").status_code == 200
    workers = engines(run)
    assert len(workers) == 2
    run.process.send_signal(signal.SIGTERM)
    run.process.wait(60)
    until(lambda: not any(map(lives, workers)))
