"""The processes of one engine on this machine, seen from the server as if they were one: start, write, read, end. Knows nothing of requests.

One rank is one process. Several are forked by a nursery (engine/process/nursery.py), which ends all when one ends; the first of them is spoken
with, the others are heard only when they log, or fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
from collections.abc import Sequence

import msgspec

from l4core.config import EngineConfig
from l4core.engine.process.last_words import LastWords
from l4core.engine.process.messages import (
    TRACE_SIGNAL,
    Alive,
    Ended,
    Failed,
    Log,
    Start,
    Stop,
    ToEngine,
    ToServer,
    decode_for_server,
    frame,
)
from l4core.engine.process.spawn import worker_command, worker_environment
from l4core.errors import EngineDeadError
from l4core.parallel.place import Place
from l4core.parallel.wire import HEADER
from l4core.server.pulse import Pulse

logger = logging.getLogger(__name__)

LAST_BYTES_SECONDS = 0.2
LAST_WORDS_SECONDS = 1.0
"""For the other ranks, once the first has ended."""
TRACE_SECONDS = 0.5
STOP_SECONDS = 6.0
ALONE = (Place(),)


class EngineProcess:
    """A running `python -m l4core.engine.process.worker` and our ends of its sockets, one a rank."""

    def __init__(
        self, process: asyncio.subprocess.Process, places: Sequence[Place], lines: Sequence[_Line], report: _Line | None
    ) -> None:
        """lines: by place.  report: tells of the end of each of several ranks."""
        self._process, self._places = process, places
        self._lines, self._report = lines, report
        self._words = LastWords(places)
        self._said: set[str] = set()
        self._exit = asyncio.create_task(self._watch(), name="engine-exit")
        self._pulse, self._receives = Pulse(places), False
        self._looks = asyncio.create_task(self._look_after(), name="engine-pulse")
        self._listening = [
            asyncio.create_task(self._listen(place, line), name=f"rank-{place.rank}")
            for place, line in zip(places[1:], lines[1:], strict=True)
        ]
        if report is not None:
            self._listening.append(asyncio.create_task(self._listen(places[0], report), name="nursery"))

    @classmethod
    async def spawn(
        cls, config: EngineConfig, *, log_level: int, factory: str | None = None, places: Sequence[Place] = ALONE
    ) -> EngineProcess:
        """Start a process for each place and send it its config. factory: "module:function" that builds another engine (tests)."""
        many = len(places) > 1
        with contextlib.ExitStack() as theirs:
            pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(len(places) + many)]
            fds = [theirs.enter_context(there).fileno() for _, there in pairs]
            listeners = [place.listen_fd for place in places if place.listen_fd is not None]
            process = await asyncio.create_subprocess_exec(
                *worker_command(fds[: len(places)], fds[-1] if many else None, factory),
                stdin=subprocess.DEVNULL,
                pass_fds=[*fds, *listeners],
                env=worker_environment(),
                process_group=0 if many else None,
            )
        lines = [await _Line.open(ours) for ours, _ in pairs]
        self = cls(process, places, lines[: len(places)], lines[-1] if many else None)
        for place, line in zip(places, lines, strict=False):
            line.send(Start(config=config, log_level=log_level, place=place))
        return self

    @property
    def pid(self) -> int:
        """Of the engine, or of the nursery of its ranks."""
        return self._process.pid

    def send(self, message: ToEngine) -> None:
        """Queue a message. Raises OverflowError for an integer beyond 64 bits; what a dying process no longer reads is dropped."""
        self._lines[0].send(message)

    async def receive(self) -> ToServer | None:
        """The next message; None once the process is gone. Raises EngineDeadError for bytes that are no message."""
        while (message := await self._receive_first()) is not None:
            if isinstance(message, Alive):
                self._pulse.beat(self._places[0].rank)
            elif self._report is None or not isinstance(message, Failed):
                return message
            else:
                self._words.failed(self._places[0], message)
        if self._listening:
            await asyncio.wait([self._exit, *self._listening], timeout=LAST_WORDS_SECONDS)
        return self._words.cause()

    async def _receive_first(self) -> ToServer | None:
        self._receives = True
        try:
            return await self._lines[0].receive()
        finally:
            self._receives = False

    async def abandon(self) -> None:
        """It hangs: have it write where (to stderr), then read and write no more. `stop` ends it."""
        self._signal(TRACE_SIGNAL)
        await asyncio.sleep(TRACE_SECONDS)
        self._lines[0].close()

    async def stop(self, patience: float = STOP_SECONDS) -> str:
        """Ask it to end by closing the socket, kill it if it does not within `patience` seconds; → how it ended, as words."""
        if self._places[0].rank == 0:
            self.send(Stop())  # the other ranks end with it, on other machines too
            self._lines[0].close()
        else:
            self._close()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._exit), patience)
        if not self._exit.done():
            self._signal(signal.SIGKILL)
            await self._exit
        self._looks.cancel()
        await asyncio.gather(*self._listening)
        return self._words.ending(self._process.returncode)

    async def _watch(self) -> None:
        """A child of the engine process may hold its end of the socket open after its death: the exit is watched too."""
        await self._process.wait()
        await asyncio.sleep(LAST_BYTES_SECONDS)  # its last words may still lie in the socket
        if self._report is not None and not self._words.all_ended:
            self._signal(signal.SIGKILL)  # of the group: the nursery was killed, its ranks were not
        self._close()

    async def _look_after(self) -> None:
        """End them all when one gives no sign of life for longer than the others would let it. Nobody listens to the first while the server loads
        its own part."""
        while self._places[0].size > 1 and not self._exit.done():
            await asyncio.sleep(self._pulse.look_seconds)
            silent = self._pulse.look() if self._receives else None
            if silent is not None:
                logger.error("rank %d gave no sign of life for %g s: it is ended", silent, self._pulse.seconds)
                self._signal(TRACE_SIGNAL)
                await asyncio.sleep(TRACE_SECONDS)
                self._signal(signal.SIGKILL)
                return

    async def _listen(self, place: Place, line: _Line) -> None:
        with contextlib.suppress(EngineDeadError):  # broken off in the middle of a message
            while (message := await line.receive()) is not None:
                if isinstance(message, Alive):
                    self._pulse.beat(place.rank)
                elif isinstance(message, Ended):
                    self._words.ended(message)
                elif isinstance(message, Failed):
                    self._words.failed(place, message)
                elif isinstance(message, Log) and message.level >= logging.WARNING and message.text not in self._said:
                    self._said.add(message.text)  # eight ranks say the same
                    logging.getLogger(message.name).log(message.level, "%s: %s", place, message.text)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self._report is None:
                self._process.send_signal(number)
            else:
                os.killpg(self._process.pid, number)

    def _close(self) -> None:
        for line in [*self._lines, *([] if self._report is None else [self._report])]:
            line.close()


class _Line:
    """One socket to one process."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, ours: socket.socket) -> _Line:
        return cls(*await asyncio.open_unix_connection(sock=ours, limit=1 << 20))

    def send(self, message: ToEngine) -> None:
        data = frame(message)
        if not self._writer.is_closing():
            self._writer.write(data)

    async def receive(self) -> ToServer | None:
        try:
            size = HEADER.unpack(await self._reader.readexactly(HEADER.size))[0]
            return decode_for_server(await self._reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        except msgspec.DecodeError as error:
            raise EngineDeadError(f"the engine process sent something unreadable: {error}") from error

    def close(self) -> None:
        self._writer.close()
