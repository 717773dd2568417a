"""Two replicas behind Ray Serve on a local cluster, tiny checkpoint on a CPU, one killed under load. Prints a JSON object of what was seen.

python plugins/ray/tests/serve_script.py CHECKPOINT
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import ray
from ray import serve
from ray.cluster_utils import Cluster

import l4_ray

PORT = int(os.environ.get("L4_RAY_TEST_PORT", "8123"))
URL = f"http://127.0.0.1:{PORT}"
NUM_REQUESTS, AT_ONCE = 48, 12
TOKENS = 24
HANG_UP_SECONDS = 8
"""Far more than 200 tokens take."""


OPTIONS = {
    "device": "cpu",
    "dtype": "float32",
    "context_length": 256,
    "max_running_requests": 8,
    "served_model_name": "tiny",
}


def main() -> None:
    over_nodes = sys.argv[2:] == ["nodes"]
    found: dict[str, Any] = {}
    with cluster(num_nodes=2 if over_nodes else 1):
        serve.start(http_options={"host": "127.0.0.1", "port": PORT}, proxy_location="HeadOnly")
        began = time.monotonic()
        count = {"tp": 2, "nnodes": 2, "dist_timeout": 5} if over_nodes else {"replicas": 2}
        serve.run(l4_ray.app({"model": sys.argv[1], **count, **OPTIONS}), name="l4")
        found["ready_s"] = time.monotonic() - began
        found["replicas"] = len(replicas())
        found["answers"] = asyncio.run(answers())
        if over_nodes:
            found["texts"] = asyncio.run(texts())
            found["back_s"] = asyncio.run(death_of_a_rank())
            found["texts_after"] = asyncio.run(texts())
        else:
            found["load"] = asyncio.run(load_with_deaths())
            found["hung_up"] = asyncio.run(hang_up())
    found["left"] = len(replicas())
    print("RESULT " + json.dumps(found), flush=True)


@contextlib.contextmanager
def cluster(num_nodes: int) -> Iterator[None]:
    """Ray on this machine, as if it were several where num_nodes says so."""
    each = {"num_cpus": 6 // num_nodes, "object_store_memory": 100 << 20}
    made = Cluster(initialize_head=True, head_node_args={**each, "include_dashboard": False})
    for _ in range(num_nodes - 1):
        made.add_node(**each)
    ray.init(address=made.address)
    try:
        yield
    finally:
        serve.shutdown()
        ray.shutdown()
        made.shutdown()


def replicas() -> list[tuple[psutil.Process, psutil.Process]]:
    """(server, engine) of each that has one: a process on a leash that serves our checkpoint has the engine as its child, and the replica as its
    parent."""
    found = []
    for server in psutil.process_iter(["cmdline"]):
        command = server.info["cmdline"] or []
        if "l4_ray.leash" in command and sys.argv[1] in command:
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [(server, child) for child in server.children()]
    return found


def body(number: int, *, stream: bool) -> dict[str, Any]:
    prompt = [(number * 31 + i * 7) % 200 + 10 for i in range(20)]
    return {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": TOKENS,
        "temperature": 0,
        "seed": number,
        "ignore_eos": True,
        "stream": stream,
    }


async def ask(client: httpx.AsyncClient, number: int, *, stream: bool) -> dict[str, Any]:
    """→ text, status, whether it began, and how it ended: "" = well."""
    got: dict[str, Any] = {"number": number, "stream": stream, "text": "", "begun": False, "error": ""}
    try:
        async with client.stream("POST", f"{URL}/v1/completions", json=body(number, stream=stream)) as reply:
            got["status"] = reply.status_code
            if not stream or reply.status_code != 200:
                whole = json.loads(await reply.aread())
                got["begun"] = reply.status_code == 200
                got["text"] = whole["choices"][0]["text"] if got["begun"] else ""
                got["error"] = "" if got["begun"] else str(whole)
                return got
            async for line in reply.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                got["begun"] = True
                if "error" in event:
                    got["error"] = event["error"]["code"]
                else:
                    got["text"] += event["choices"][0]["text"]
    except httpx.HTTPError as error:
        got["error"] = got["error"] or type(error).__name__
    return got


def client() -> httpx.AsyncClient:
    return httpx.AsyncClient(timeout=180, trust_env=False)


async def answers() -> dict[str, Any]:
    """The routes pass: models, a stream in several events, a refusal with its status, the same text whole and streamed."""
    async with client() as http:
        models = (await http.get(f"{URL}/v1/models")).json()
        refused = await http.post(f"{URL}/v1/completions", json={"model": "tiny", "prompt": "x", "temperature": -1})
        whole, streamed = await ask(http, 1, stream=False), await ask(http, 1, stream=True)
        pieces = []
        async with http.stream("POST", f"{URL}/v1/completions", json=body(2, stream=True)) as reply:
            async for piece in reply.aiter_raw():
                pieces.append(len(piece))
    return {
        "model": models["data"][0]["id"],
        "refused": refused.status_code,
        "same": whole["text"] == streamed["text"] and bool(whole["text"]),
        "pieces": len(pieces),
    }


async def load_with_deaths() -> dict[str, Any]:
    """Requests, half of them streams. Once a quarter has ended, a replica is killed with all it has in hand; once half have, the engine of one."""
    gate, done = asyncio.Semaphore(AT_ONCE), 0
    results: list[dict[str, Any]] = []
    killed: dict[str, float] = {}

    async with client() as http:

        async def one(number: int) -> None:
            nonlocal done
            async with gate:
                results.append(await ask(http, number, stream=number % 2 == 0))
            done += 1
            if done == NUM_REQUESTS // 4:
                killed["at"] = time.monotonic()
                replicas()[0][0].parent().kill()
            if done == NUM_REQUESTS // 2:
                replicas()[0][1].kill()

        await asyncio.gather(*(one(number) for number in range(NUM_REQUESTS)))
        again = time.monotonic()
        while len(replicas()) < 2 and time.monotonic() - again < 120:
            await asyncio.sleep(0.2)
        back = time.monotonic() - killed["at"]
        expected = {r["number"]: (await ask(http, r["number"], stream=False))["text"] for r in results}
    lost = [r for r in results if r["error"]]
    return {
        "requests": len(results),
        "lost_before_begun": [r for r in lost if not r["begun"]],
        "lost_within": sum(1 for r in lost if r["begun"]),
        "lost_codes": sorted({r["error"] for r in lost}),
        "wrong": [r["number"] for r in results if not r["error"] and r["text"] != expected[r["number"]]],
        "both_back_s": back,
    }


async def texts() -> list[str]:
    """Answers without anybody's death."""
    async with client() as http:
        asked = [ask(http, number, stream=number % 2 == 0) for number in range(8)]
        return [got["text"] for got in await asyncio.gather(*asked)]


async def death_of_a_rank() -> float:
    """One rank's process is killed: the replica ends, and Serve starts another → seconds until that one answers."""
    began = time.monotonic()
    replicas()[-1][1].kill()
    async with client() as http:
        await asyncio.sleep(1)
        while (await ask(http, 0, stream=False))["error"]:
            await asyncio.sleep(0.2)
    return time.monotonic() - began


async def hang_up() -> dict[str, float]:
    """A client that goes after the first of 200 tokens: how many all engines generate because of it."""
    async with client() as http:
        before = await generated(http)
        asking = {**body(3, stream=True), "max_tokens": 200}
        async with http.stream("POST", f"{URL}/v1/completions", json=asking) as reply:
            await anext(reply.aiter_raw())
        await asyncio.sleep(HANG_UP_SECONDS)
        return {"tokens": await generated(http) - before}


async def generated(http: httpx.AsyncClient) -> float:
    """Tokens of all engines so far, as their own servers count them."""
    total = 0.0
    for server, _ in replicas():
        port = server.cmdline()[server.cmdline().index("--port") + 1]
        text = (await http.get(f"http://127.0.0.1:{port}/metrics")).text
        total += sum(float(n) for n in re.findall(r"^l4_generation_tokens_total(?:{.*})? (.*)$", text, flags=re.M))
    return total


if __name__ == "__main__":
    main()
