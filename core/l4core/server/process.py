"""The processes of one engine on this machine, seen from the server as if they were one: start, write, read, end. Knows nothing of requests.

One rank is one process. Several are forked by a nursery (engine/nursery.py), which ends all when one ends; the first of them is spoken with, the
others are heard only when they log, or fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence

import msgspec

from l4core.config import EngineConfig
from l4core.engine.messages import (
    LOST_STATUS,
    TRACE_SIGNAL,
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
from l4core.errors import EngineDeadError, RankLostError
from l4core.parallel.place import Place
from l4core.parallel.wire import HEADER

API_KEY_VARIABLE = "L4_API_KEY"
LAST_BYTES_SECONDS = 0.2
LAST_WORDS_SECONDS = 1.0
"""For the other ranks, once the first has ended."""
TRACE_SECONDS = 0.5
STOP_SECONDS = 6.0
ALONE = (Place(),)


class EngineProcess:
    """A running `python -m l4core.engine.worker` and our ends of its sockets, one a rank."""

    def __init__(
        self, process: asyncio.subprocess.Process, places: Sequence[Place], lines: Sequence[_Line], report: _Line | None
    ) -> None:
        """lines: by place.  report: tells of the end of each of several ranks."""
        self._process, self._places = process, places
        self._lines, self._report = lines, report
        self._failed: list[Failed] = []
        self._ends: list[Ended] = []
        self._said: set[str] = set()
        self._exit = asyncio.create_task(self._watch(), name="engine-exit")
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
                *_command(fds[: len(places)], fds[-1] if many else None, factory),
                stdin=subprocess.DEVNULL,
                pass_fds=[*fds, *listeners],
                env=_without_key(os.environ),
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
        while (message := await self._lines[0].receive()) is not None:
            if self._report is None or not isinstance(message, Failed):
                return message
            self._note(self._places[0], message)
        if self._listening:
            await asyncio.wait([self._exit, *self._listening], timeout=LAST_WORDS_SECONDS)
        return self._first_cause()

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
        await asyncio.gather(*self._listening)
        return self._ending()

    async def _watch(self) -> None:
        """A child of the engine process may hold its end of the socket open after its death: the exit is watched too."""
        await self._process.wait()
        await asyncio.sleep(LAST_BYTES_SECONDS)  # its last words may still lie in the socket
        if len(self._ends) < len(self._places):
            self._signal(signal.SIGKILL)  # of the group: the nursery was killed, its ranks were not
        self._close()

    async def _listen(self, place: Place, line: _Line) -> None:
        with contextlib.suppress(EngineDeadError):  # broken off in the middle of a message
            while (message := await line.receive()) is not None:
                if isinstance(message, Ended):
                    self._ends.append(message)
                elif isinstance(message, Failed):
                    self._note(place, message)
                elif isinstance(message, Log) and message.level >= logging.WARNING and message.text not in self._said:
                    self._said.add(message.text)  # eight ranks say the same
                    logging.getLogger(message.name).log(message.level, "%s: %s", place, message.text)

    def _note(self, place: Place, words: Failed) -> None:
        is_named = words.heard or place.rank == 0
        self._failed.append(words if is_named else msgspec.structs.replace(words, message=f"{place}: {words.message}"))

    def _first_cause(self) -> Failed | None:
        """What the ranks say why they end, once. What one says itself is better than what another has heard of it; and that another one ended is
        worth saying only where that is not one of these, whose end is known."""
        failed, self._failed = self._failed, []
        causes = [words for words in failed if words.kind != RankLostError.__name__]
        own = [words for words in causes if not words.heard]
        known = any(end.is_cause for end in self._ends)
        return next(iter([*own, *causes] if known else [*own, *causes, *failed]), None)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self._report is None:
                self._process.send_signal(number)
            else:
                os.killpg(self._process.pid, number)

    def _close(self) -> None:
        for line in [*self._lines, *([] if self._report is None else [self._report])]:
            line.close()

    def _ending(self) -> str:
        if not self._ends:
            return _describe(self._process.returncode)
        first = next((end for end in self._ends if end.is_cause), self._ends[0])
        return f"of {self._places[first.index]} {_describe(first.status)}"


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


def _command(fds: Sequence[int], report: int | None, factory: str | None) -> list[str]:
    command = [sys.executable, "-P", "-m", "l4core.engine.worker"]
    for fd in fds:
        command += ["--fd", str(fd)]
    if report is not None:
        command += ["--report", str(report)]
    return command if factory is None else [*command, "--factory", factory]


def _without_key(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name != API_KEY_VARIABLE}


def _describe(status: int | None) -> str:
    if status == LOST_STATUS:
        return "ended"
    if status is None or status >= 0:
        return f"ended with exit status {status}"
    return f"was ended by signal {signal.Signals(-status).name}"
