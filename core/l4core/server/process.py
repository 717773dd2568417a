"""One engine process, seen from the server: start it, write to it, read from it, end it. Knows nothing of requests."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping

import msgspec

from l4core.config import EngineConfig
from l4core.engine.messages import HEADER, TRACE_SIGNAL, Start, ToEngine, ToServer, decode_for_server, frame
from l4core.errors import EngineDeadError

API_KEY_VARIABLE = "L4_API_KEY"
LAST_BYTES_SECONDS = 0.2
TRACE_SECONDS = 0.5
STOP_SECONDS = 6.0


class EngineProcess:
    """A running `python -m l4core.engine.worker` and our end of its socket pair."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._exit = asyncio.create_task(self._watch(), name="engine-exit")

    @classmethod
    async def spawn(cls, config: EngineConfig, *, log_level: int, factory: str | None = None) -> EngineProcess:
        """Start the process and send it its config. factory: "module:function" that builds another engine (tests)."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *_command(theirs.fileno(), factory),
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=_without_key(os.environ),
            )
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=1 << 20)
        self = cls(process, reader, writer)
        self.send(Start(config=config, log_level=log_level))
        return self

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: ToEngine) -> None:
        """Queue a message. Raises OverflowError for an integer beyond 64 bits; what a dying process no longer reads is dropped."""
        data = frame(message)
        if not self._writer.is_closing():
            self._writer.write(data)

    async def receive(self) -> ToServer | None:
        """The next message; None once the process is gone. Raises EngineDeadError for bytes that are no message."""
        try:
            size = HEADER.unpack(await self._reader.readexactly(HEADER.size))[0]
            return decode_for_server(await self._reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        except msgspec.DecodeError as error:
            raise EngineDeadError(f"the engine process sent something unreadable: {error}") from error

    async def abandon(self) -> None:
        """It hangs: have it write where (to stderr), then read and write no more. `stop` ends it."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(TRACE_SIGNAL)
        await asyncio.sleep(TRACE_SECONDS)
        self._writer.close()

    async def stop(self, patience: float = STOP_SECONDS) -> str:
        """Ask it to end by closing the socket, kill it if it does not within `patience` seconds; → how it ended, as words."""
        self._writer.close()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._exit), patience)
        if not self._exit.done():
            self._process.kill()
            await self._exit
        return _describe(self._process.returncode)

    async def _watch(self) -> None:
        """A child of the engine process may hold its end of the socket open after its death: the exit is watched too."""
        await self._process.wait()
        await asyncio.sleep(LAST_BYTES_SECONDS)  # its last words may still lie in the socket
        self._writer.close()


def _command(fd: int, factory: str | None) -> list[str]:
    command = [sys.executable, "-P", "-m", "l4core.engine.worker", "--fd", str(fd)]
    return command if factory is None else [*command, "--factory", factory]


def _without_key(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name != API_KEY_VARIABLE}


def _describe(status: int | None) -> str:
    if status is None or status >= 0:
        return f"ended with exit status {status}"
    return f"was ended by signal {signal.Signals(-status).name}"
