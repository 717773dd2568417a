"""One `l4 serve` on this node and the way to it: what a Serve replica is made of. Knows no ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from enum import StrEnum
from typing import Any

import aiohttp
from yarl import URL

from l4_ray.process import LeashedProcess, free_port
from l4_ray.retry import Ask, Head, Part, ReplicaLostError, end_to_end

LOOK_SECONDS = 0.25
HEALTH_SECONDS = 5.0


class Health(StrEnum):
    """READY: the model is loaded and the engine runs.  SILENT: no word in time, which a busy machine explains too.  DEAD: anything else."""

    READY = "ready"
    SILENT = "silent"
    DEAD = "dead"


class LocalServer:
    """`l4 serve` with the options given, on a port of the loopback. All ranks are on this node, or elsewhere: see ranks.py."""

    def __init__(self, url: str, process: LeashedProcess | None = None) -> None:
        """url: http://HOST:PORT.  process: None where someone else looks after it."""
        self.url = url
        self._process = process
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
            connector=aiohttp.TCPConnector(limit=0),
            auto_decompress=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        )

    @classmethod
    def start(cls, options: Mapping[str, Any]) -> LocalServer:
        """options: of `l4 serve`, by name. Inside a running event loop."""
        port = free_port()
        arguments = serve_arguments({**options, "host": "127.0.0.1", "port": port})
        return cls(f"http://127.0.0.1:{port}", LeashedProcess(arguments, key_environment(options)))

    async def wait_until_ready(self, check: Callable[[], None] = lambda: None) -> None:
        """Raises ReplicaLostError with the last lines that it printed when it ends instead. check: called meanwhile, raises where waiting is
        of no use."""
        while await self.look() is not Health.READY:
            self._raise_if_ended()
            await asyncio.to_thread(check)
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self) -> Health:
        """How its engine is."""
        if self._process is not None and self._process.code is not None:
            return Health.DEAD
        try:
            async with asyncio.timeout(HEALTH_SECONDS), self._session.get(f"{self.url}/health") as reply:
                return Health.READY if reply.status == 200 else Health.DEAD
        except TimeoutError:
            return Health.SILENT
        except aiohttp.ClientError:
            return Health.DEAD

    async def forward(self, ask: Ask) -> AsyncGenerator[Part, None]:
        """The exchange with it: a Head, then pieces of the body as they come. Raises ReplicaLostError. Closed early, it hangs up, and the engine
        stops."""
        target = URL(f"{self.url}{ask.path}{'?' if ask.query else ''}{ask.query}", encoded=True)
        try:
            async with self._session.request(
                ask.method, target, headers=end_to_end(ask.headers), data=ask.body or None
            ) as reply:
                yield Head(status=reply.status, headers=end_to_end(tuple(reply.headers.items())))
                async for piece in reply.content.iter_any():
                    yield piece
        except (aiohttp.ClientError, OSError) as error:
            raise ReplicaLostError(f"{type(error).__name__}: {error}") from error

    async def close(self) -> None:
        """End it."""
        await self._session.close()
        if self._process is not None:
            await asyncio.to_thread(self._process.stop)

    def _raise_if_ended(self) -> None:
        if self._process is not None and self._process.code is not None:
            raise ReplicaLostError(f"l4 serve ended with exit status {self._process.code}:\n{self._process.last_lines}")


def serve_arguments(options: Mapping[str, Any]) -> list[str]:
    """The command line that says the same; the key is not on it, where all can read it (key_environment)."""
    arguments = ["serve"]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is None or name.replace("-", "_") == "api_key":
            continue
        if isinstance(value, bool):
            arguments.append(flag if value else f"--no-{flag[2:]}")
        else:
            for each in value if isinstance(value, (list, tuple)) else [value]:
                arguments += [flag, str(each)]
    return arguments


def key_environment(options: Mapping[str, Any]) -> dict[str, str]:
    """The key's place in the environment, if there is one."""
    key = options.get("api_key")
    return {} if key is None else {"L4_API_KEY": str(key)}
