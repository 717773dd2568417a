"""One engine over several machines, as a client sees it: its answers beside those of one rank on one machine, and how it takes trouble."""

from __future__ import annotations

import concurrent.futures
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import psutil

NUM_PROMPTS, NUM_TOKENS = 12, 16
PATIENCE = 180
OPTIONS = {"device": "cpu", "dtype": "float32", "context_length": 512, "max_running_requests": 8}


def prompt(number: int) -> list[int]:
    """Of a length that crosses a chunk's border (64) or not."""
    return [(number * 37 + i * 11) % 200 + 10 for i in range(8 + 13 * number)]


def alone(checkpoint: str) -> list[str]:
    """Texts of one rank on one machine."""
    from l4core import LLM, SamplingParams

    llm = LLM(model=checkpoint, **OPTIONS)
    params = [
        SamplingParams(temperature=0.8 * (n % 2), seed=n, max_tokens=NUM_TOKENS, ignore_eos=True)
        for n in range(NUM_PROMPTS)
    ]
    outputs = llm.generate([prompt(n) for n in range(NUM_PROMPTS)], params)
    return [output.outputs[0].text for output in outputs]


def answers(url: str) -> list[str]:
    """The same, all at once over HTTP."""

    def ask(number: int) -> str:
        body = {
            "model": "tiny",
            "prompt": prompt(number),
            "temperature": 0.8 * (number % 2),
            "seed": number,
            "max_tokens": NUM_TOKENS,
            "ignore_eos": True,
        }
        reply = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE, trust_env=False)
        reply.raise_for_status()
        text: str = reply.json()["choices"][0]["text"]
        return text

    with concurrent.futures.ThreadPoolExecutor(NUM_PROMPTS) as pool:
        return list(pool.map(ask, range(NUM_PROMPTS)))


def family(launcher: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """A launcher and all that came of it."""
    try:
        root = psutil.Process(launcher.pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def trouble(
    url: str,
    expected: list[str],
    begin: Callable[[], None],
    end: Callable[[], None],
    launchers: Sequence[subprocess.Popen[bytes]],
    after: float = 0.0,
    gone: bool = False,
) -> dict[str, Any]:
    """What a client sees: seconds until health is 503, and from the end of the trouble until it is 200; whether the answers are right then.
    after: seconds that it lasts at least.  gone: the server itself goes, too, and nobody answers."""
    began = time.monotonic()
    begin()
    until(lambda: health(url) == (0 if gone else 503), "503", launchers)
    seen = time.monotonic() - began
    time.sleep(max(0.0, after - seen))
    ended = time.monotonic()
    end()
    until(lambda: health(url) == 200, "recovery", launchers)
    return {"unhealthy_after_s": seen, "back_after_s": time.monotonic() - ended, "same": answers(url) == expected}


def health(url: str) -> int:
    """Status; 0 where nobody answers."""
    try:
        return httpx.get(f"{url}/health", timeout=10, trust_env=False).status_code
    except httpx.HTTPError:
        return 0


def until(condition: Callable[[], bool], what: str, launchers: Sequence[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"no {what} within {PATIENCE} s")
        if any(launcher.poll() is not None for launcher in launchers):
            raise SystemExit(f"waiting for {what}: a launcher ended")
        time.sleep(0.05)
