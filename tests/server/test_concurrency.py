"""128 sockets at once, as lm_eval opens them: every request is answered, and each with its own answer."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx


def test_128_requests_at_once(server: Any) -> None:
    async def one(client: httpx.AsyncClient, seed: int) -> str:
        body = {
            "messages": [{"role": "user", "content": "hello"}],
            "seed": seed,
            "max_tokens": 12,
            "stream": seed % 2 == 0,
        }
        reply = await client.post("/v1/chat/completions", json=body)
        assert reply.status_code == 200
        return reply.text

    async def all_at_once() -> list[str]:
        limits = httpx.Limits(max_connections=128)
        async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=120, verify=False) as client:
            return list(await asyncio.gather(*(one(client, seed) for seed in range(128))))

    for seed, text in enumerate(asyncio.run(all_at_once())):
        if seed % 2:
            assert f'"content":"{f"Seed {seed}: the capital"[:12]}"' in text
        else:
            digits = [f'"content":"{d}"' for d in str(seed)]
            assert all(digit in text for digit in digits)
            assert text.endswith("data: [DONE]\n\n")
    assert server.serving.bridge.num_active == 0
