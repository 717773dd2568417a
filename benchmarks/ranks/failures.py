"""How soon an engine of several ranks notices that one is gone, and how soon it answers again.

    python benchmarks/ranks/failures.py [--tp 2] [--device cuda] [--dist-timeout 5] [--ways kill,stop] [--skip-single] [--json OUT] [-- SERVE OPTIONS]

A small random model behind `l4 serve --tp N`, with requests under way. Each way is done to the last rank, then to rank 0:
kill   SIGKILL: the connection closes
stop   SIGSTOP: no sign of life, and on GPUs a collective that never ends; --dist-timeout bounds it
Told are the seconds from the signal to /health 503 and to the first answer after it, whether that is what it was before, and what is left of the
old processes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from l4core.testing.models.checkpoints import make_tiny_checkpoint
from l4core.testing.models.tokenizers import make_byte_tokenizer

sys.path.append(Path(__file__).resolve().parents[1].as_posix())
from where import where

SHAPE: dict[str, Any] = {
    "layers": 4,
    "hidden": 256,
    "heads": 8,
    "kv_heads": 8,
    "head_dim": 32,
    "inter": 512,
    "experts": 4,
}
READY_SECONDS = 200.0
WAYS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


class Server:
    """`l4 serve` in a process of its own."""

    def __init__(self, arguments: list[str]) -> None:
        command = [
            sys.executable,
            "-m",
            "l4core.launch_server",
            *arguments,
            "--port",
            "0",
            "--served-model-name",
            "tiny",
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        self.url = self._wait()
        self.client = httpx.Client(base_url=self.url, timeout=READY_SECONDS)

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(self.process.stdout)

    def _wait(self) -> str:
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            if found := re.search(r"http://127\.0\.0\.1:\d+", "".join(self.lines)):
                return found.group(0)
            time.sleep(0.02)
        raise SystemExit("the server did not come up:\n" + "".join(self.lines))

    def ranks(self) -> list[psutil.Process]:
        """In rank order: forked one after the other."""
        (nursery,) = psutil.Process(self.process.pid).children()
        return sorted(nursery.children(), key=lambda process: process.pid)

    def answer(self) -> str:
        body = {"model": "tiny", "prompt": list(range(1, 150)), "max_tokens": 16, "temperature": 0, "ignore_eos": True}
        reply = self.client.post("/v1/completions", json=body)
        return str(reply.json()["choices"][0]["text"]) if reply.status_code == 200 else ""

    def is_healthy(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return self.client.get("/health").status_code == 200
        return False


@contextlib.contextmanager
def busy(server: Server) -> Iterator[None]:
    """A few long answers under way; how they end is of no interest."""

    def ask() -> None:
        body = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 3500, "ignore_eos": True}
        with contextlib.suppress(httpx.HTTPError):
            httpx.post(f"{server.url}/v1/completions", json=body, timeout=READY_SECONDS)

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    yield
    for thread in threads:
        thread.join()


def seconds_until(condition: Any, since: float) -> float:
    while not condition():
        if time.monotonic() > since + READY_SECONDS:
            raise SystemExit("it does not come back")
        time.sleep(0.005)
    return time.monotonic() - since


def hurt(server: Server, way: str, rank: int) -> dict[str, Any]:
    before, old = server.answer(), server.ranks()
    with busy(server):
        began = time.monotonic()
        old[rank].send_signal(WAYS[way])
        gone = seconds_until(lambda: not server.is_healthy(), began)
        back = seconds_until(lambda: server.is_healthy() and server.answer(), began)
    return {
        "way": way,
        "rank": rank,
        "unhealthy_s": round(gone, 3),
        "answers_s": round(back, 2),
        "same_answer": server.answer() == before,
        "left_over": sum(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in old),
    }


def one_rank(model: list[str]) -> str:
    """What it answers."""
    server = Server(["--model-path", *model])
    said = server.answer()
    server.process.send_signal(signal.SIGTERM)
    server.process.wait()
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dist-timeout", type=float, default=5.0)
    parser.add_argument("--ways", default="kill,stop")
    parser.add_argument("--skip-single", action="store_true", help="no comparison with one rank's answer")
    parser.add_argument("--json", type=Path)
    parser.add_argument("options", nargs="*", help="of l4 serve")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_byte_tokenizer(folder / "tokenizer")
        make_tiny_checkpoint(folder / "model", tokenizer=folder / "tokenizer", **SHAPE)
        model = [str(folder / "model"), "--device", args.device, "--dtype", "float32", *args.options]
        expected = None if args.skip_single else one_rank(model)
        found: dict[str, Any] = {
            **where(args.device),
            "tp": args.tp,
            "device": args.device,
            "dist_timeout_s": args.dist_timeout,
            "failures": [],
        }
        for way in args.ways.split(","):  # a server each: one whose engine dies four times in ten minutes gives up
            began = time.monotonic()
            server = Server(["--model-path", *model, "--tp", str(args.tp), "--dist-timeout", str(args.dist_timeout)])
            found["ready_s"] = round(time.monotonic() - began, 2)
            if expected is not None:
                found["same_answer_as_one_rank"] = server.answer() == expected
            print(found, flush=True)
            for rank in (args.tp - 1, 0):
                found["failures"].append(hurt(server, way, rank))
                print(found["failures"][-1], flush=True)
                if args.json:
                    args.json.write_text(json.dumps(found, indent=1))
            server.process.send_signal(signal.SIGTERM)
            found["exit_status"] = server.process.wait()
            print("".join(line for line in server.lines if "ERROR" in line or line.startswith("rank")), flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
