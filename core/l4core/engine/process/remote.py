"""The engine of `LLM(tp=N)`: its ranks are processes of their own, and are stepped from here as if the engine were in this one.

A rank that dies or hangs ends the others, never this process: the next call raises EngineDeadError. Started like a server's (server/process.py), and
spoken with in the same frames, but by threads: Ctrl-C in the middle of a call loses no part of a frame.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import socket
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from l4core.config import EngineConfig
from l4core.engine.inbox import Inbox
from l4core.engine.process.last_words import LastWords
from l4core.engine.process.messages import (
    Alive,
    Ended,
    Failed,
    Log,
    Ready,
    Refused,
    Start,
    Stepped,
    Stop,
    Submit,
    ToServer,
    decode_for_server,
    frame,
)
from l4core.engine.process.spawn import worker_command, worker_environment
from l4core.engine.start.samplers import sampling_pipeline
from l4core.errors import EngineDeadError, RequestError
from l4core.model.config import ModelConfig
from l4core.parallel.place import Place, check_device, local_layout, refuse_torchrun
from l4core.parallel.wire import read_frame
from l4core.plugin_manager import Plugins, load_plugins
from l4core.request import Request, StepOutput

STOP_SECONDS = 6.0
LAST_WORDS_SECONDS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteBuilt:
    """As `build.BuiltEngine`. drafts: None, the ranks pace themselves."""

    engine: RemoteEngine
    report: Sequence[str]
    model_config: ModelConfig
    folder: Path
    plugins: Plugins
    context_length: int
    drafts: None = None


def build_remotely(config: EngineConfig) -> RemoteBuilt:
    """Starts the ranks on this machine and waits until they have loaded. Raises the L4Error that one of them ended with."""
    ranks = _Processes(config)
    try:
        ready = ranks.receive()
        if not isinstance(ready, Ready):
            raise EngineDeadError(f"the engine's first message is {type(ready).__name__}; wanted Ready")
        folder, plugins = Path(ready.folder), load_plugins()
        model = ModelConfig.from_folder(folder)
        engine = RemoteEngine(ranks, config, plugins, model)
    except BaseException:
        ranks.close()
        raise
    return RemoteBuilt(
        engine=engine,
        report=ready.report,
        model_config=model,
        folder=folder,
        plugins=plugins,
        context_length=ready.context_length,
    )


class RemoteEngine:
    """What `LLM` asks of an engine."""

    def __init__(self, ranks: _Processes, config: EngineConfig, plugins: Plugins, model: ModelConfig) -> None:
        self._ranks = ranks
        self._sampling = sampling_pipeline(config, plugins, model.vocab_size)
        self._unfinished: set[str] = set()

    @property
    def has_work(self) -> bool:
        return bool(self._unfinished)

    def check(self, request: Request) -> object:
        """Raises RequestError for what the sampler cannot take."""
        return self._sampling.check(request.params)

    def step(self, inbox: Inbox) -> StepOutput:
        """Hands over what is in the inbox, and waits for the next step that the ranks made. Raises EngineDeadError when they are gone."""
        if inbox.requests or inbox.aborts:
            self._ranks.send(inbox)
            self._unfinished.update(request.request_id for request in inbox.requests)
        elif not self._unfinished:
            return StepOutput()
        message = self._ranks.receive()
        if isinstance(message, Refused):
            self._unfinished.discard(message.request_id)
            raise RequestError(message.message, status=message.status, param=message.param, code=message.code)
        if not isinstance(message, Stepped):
            raise EngineDeadError(f"the engine sent {type(message).__name__}; wanted Stepped")
        self._unfinished.difference_update(u.request_id for u in message.output.updates if u.finish_reason is not None)
        return message.output

    def abort(self, request_ids: Sequence[str]) -> None:
        with contextlib.suppress(EngineDeadError):  # told by the next step
            self._ranks.send(Inbox(aborts=list(request_ids)))

    def close(self) -> None:
        """End the processes."""
        self._ranks.close()


class _Processes:
    """The nursery, our ends of the ranks' sockets, and a thread that listens to each."""

    def __init__(self, config: EngineConfig) -> None:
        check_device(config)
        refuse_torchrun(config, os.environ)
        layout = local_layout(config.tp, config.dist_timeout)
        with contextlib.ExitStack() as theirs:
            listener = layout.open()
            if listener is not None:
                theirs.enter_context(listener)
            places = layout.with_listener(listener)
            pairs = [socket.socketpair() for _ in range(len(places) + 1)]
            fds = [theirs.enter_context(there).fileno() for _, there in pairs]
            self._process = subprocess.Popen(
                worker_command(fds[:-1], fds[-1]),
                stdin=subprocess.DEVNULL,
                pass_fds=[*fds, *(place.listen_fd for place in places if place.listen_fd is not None)],
                env=worker_environment(),
                process_group=0,
            )
        self._socks = [ours for ours, _ in pairs]
        self._words = LastWords(places)
        self._inbound: queue.SimpleQueue[ToServer | None] = queue.SimpleQueue()
        self._said: set[str] = set()
        level = logging.getLogger("l4core").getEffectiveLevel()
        for place, sock in zip(places, self._socks, strict=False):
            sock.sendall(frame(Start(config=config, log_level=level, place=place)))
        self._threads = [
            threading.Thread(target=self._listen, args=(place, sock), daemon=True)
            for place, sock in zip([*places, places[0]], self._socks, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def send(self, inbox: Inbox) -> None:
        """Raises EngineDeadError when they are gone."""
        try:
            self._socks[0].sendall(frame(Submit.of(inbox)))
        except OSError:
            raise self._dead() from None

    def receive(self) -> ToServer:
        """Raises EngineDeadError, or the L4Error that a rank ended with, when they are gone."""
        message = self._inbound.get()
        if message is None:
            raise self._dead()
        return message

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socks[0].sendall(frame(Stop()))
            self._socks[0].shutdown(socket.SHUT_WR)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._kill()
            self._process.wait()
        for thread in self._threads:
            thread.join()
        for sock in self._socks:
            sock.close()

    def _listen(self, place: Place, sock: socket.socket) -> None:
        is_first = sock is self._socks[0]
        try:
            self._take(place, sock, is_first=is_first)
        finally:
            if is_first:
                self._inbound.put(None)  # whatever ended it, nobody waits for ever

    def _take(self, place: Place, sock: socket.socket, *, is_first: bool) -> None:
        with contextlib.suppress(OSError):
            while (payload := read_frame(sock)) is not None:
                message = decode_for_server(payload)
                if isinstance(message, Alive):
                    continue
                if isinstance(message, Failed):
                    self._words.failed(place, message)
                elif isinstance(message, Ended):
                    self._words.ended(message)
                elif isinstance(message, Log):
                    self._log(message, place, is_first=is_first)
                elif is_first:
                    self._inbound.put(message)

    def _log(self, log: Log, place: Place, *, is_first: bool) -> None:
        """The first rank speaks for all; of the others, warnings that it did not give."""
        if is_first or (log.level >= logging.WARNING and log.text not in self._said):
            self._said.add(log.text)
            logging.getLogger(log.name).log(log.level, "%s", log.text if is_first else f"{place}: {log.text}")

    def _dead(self) -> Exception:
        """Why, once all have ended; the same again when it is asked again."""
        self._inbound.put(None)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(LAST_WORDS_SECONDS)
        for thread in self._threads[1:]:
            thread.join(LAST_WORDS_SECONDS)
        words = self._words.cause()
        if words is not None:
            return words.error()
        return EngineDeadError(f"the engine process {self._words.ending(self._process.poll())}", fix="make another LLM")

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
