"""The engine process: builds an engine, then steps it for as long as the server is there. Started by server/process.py; knows no HTTP, no text.

`python -m l4core.engine.process.worker --fd N`: N is one end of a socket pair (no name in the file system, nobody else can connect).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import faulthandler
import gc
import importlib
import logging
import os
import queue
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from l4core.config import EngineConfig
from l4core.engine.inbox import Inbox
from l4core.engine.pace import paced
from l4core.engine.process.identity import checkpoint_identity, choices, device_identity, program_identity
from l4core.engine.process.messages import (
    LOST_STATUS,
    TRACE_SIGNAL,
    Alive,
    Failed,
    Log,
    Ready,
    Refused,
    Start,
    Stepped,
    Stop,
    Submit,
    ToServer,
    decode_for_engine,
    frame,
)
from l4core.engine.process.nursery import raise_ranks
from l4core.engine.process.turns import LeadEngine, RankedEngine, follow
from l4core.engine.speculation.draft_pace import DraftPace
from l4core.errors import L4Error, RequestError
from l4core.parallel.connect import Crew, take_device
from l4core.parallel.messages import Words
from l4core.parallel.watchdog import LOST
from l4core.parallel.wire import read_frame
from l4core.platform import detect
from l4core.request import Request, StepOutput

if TYPE_CHECKING:
    from l4core.parallel.ranks import Ranks

ORPHAN_GRACE_SECONDS = 5.0
LAST_SEND_SECONDS = 1.0
BUILD_ENGINE = "l4core.engine.start.build:build_engine"


class SteppedEngine(Protocol):
    """What the loop asks of an engine; `engine.engine.Engine` is one."""

    @property
    def has_work(self) -> bool: ...
    def check(self, request: Request) -> object: ...
    def step(self, inbox: Inbox) -> StepOutput: ...


class Built(Protocol):
    """What the loop asks of `build_engine`'s result."""

    @property
    def engine(self) -> RankedEngine: ...
    @property
    def report(self) -> Sequence[str]: ...
    @property
    def folder(self) -> Path: ...
    @property
    def context_length(self) -> int: ...
    @property
    def drafts(self) -> DraftPace | None: ...


class Factory(Protocol):
    """Builds an engine; is given ranks where it is one of several."""

    def __call__(self, config: EngineConfig, *, ranks: Ranks = ...) -> Built: ...


class Mailbox:
    """Frames from the server, read by a thread so that long prompts are parsed while a step runs. orphaned: called when the server is gone.
    is_end_meant: the server said that it ends."""

    def __init__(self, sock: socket.socket, orphaned: Callable[[], None]) -> None:
        self._sock = sock
        self._orphaned = orphaned
        self.is_end_meant = False
        self._frames: queue.SimpleQueue[Inbox | Exception | None] = queue.SimpleQueue()

    def start(self) -> None:
        threading.Thread(target=self._read, name="mailbox", daemon=True).start()

    def _read(self) -> None:
        try:
            while (payload := read_frame(self._sock)) is not None:
                message = decode_for_engine(payload)
                if isinstance(message, Submit):
                    self._frames.put(message.inbox())
                elif isinstance(message, Stop):
                    self.is_end_meant = True
        except Exception as error:  # noqa: BLE001  (handed to the loop, which ends the process with it)
            self._frames.put(error)
            return
        self._frames.put(None)
        self._orphaned()

    def collect(self, *, wait: bool) -> Inbox | None:
        """All that came since the last call, in order; None when the server is gone. wait: sleep until something comes."""
        requests: list[Request] = []
        aborts: list[str] = []
        flush_cache = False
        block = wait
        while True:
            try:
                message = self._frames.get(block=block)
            except queue.Empty:
                return Inbox(requests=requests, aborts=aborts, flush_cache=flush_cache)
            if message is None:
                return None
            if isinstance(message, Exception):
                raise message
            requests += message.requests
            aborts += message.aborts
            flush_cache = flush_cache or message.flush_cache
            block = False


class ForwardLogs(logging.Handler):
    """Sends log records to the server, so that there is one log, in one format."""

    def __init__(self, send: Callable[[ToServer], None]) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # the server is gone; the mailbox ends the process
            self._send(Log(level=record.levelno, name=record.name, text=self.format(record)))


def run(
    engine: SteppedEngine,
    mailbox: Mailbox,
    send: Callable[[ToServer], None],
    itl_target_ms: float | None = None,
    drafts: DraftPace | None = None,
) -> None:
    """Step until the server is gone. Sleeps while there is nothing to do."""
    step = paced(engine, itl_target_ms, drafts)
    while (inbox := mailbox.collect(wait=not engine.has_work)) is not None:
        output = step(_without_refused(engine, inbox, send))
        send(Stepped(output=output))


def _without_refused(engine: SteppedEngine, inbox: Inbox, send: Callable[[ToServer], None]) -> Inbox:
    """Requests whose parameters the engine cannot take (a sampler's own arguments, say) go back with a status; the others go on."""
    accepted = []
    for request in inbox.requests:
        try:
            engine.check(request)
        except RequestError as e:
            send(Refused(request_id=request.request_id, message=str(e), status=e.status, param=e.param, code=e.code))
        else:
            accepted.append(request)
    return dataclasses.replace(inbox, requests=accepted)


def serve(
    sock: socket.socket,
    factory: Factory,
    *,
    orphaned: Callable[[], None],
    forward_logs: Callable[[Callable[[ToServer], None], int], None],
) -> int:
    """The life of the process → its exit status. factory: builds the engine.  forward_logs: is given how to send, and the log level."""
    link = Link(sock)
    ready = False
    crew: Crew | None = None

    def left_alone() -> None:
        if crew is not None and crew.place.rank:
            crew.watchdog.tell(Words(LOST, f"{crew.place} was stopped with the process that had started it"))
            os._exit(0)
        orphaned()

    try:
        start = _first(read_frame(sock))
        if start is None:
            return 0
        forward_logs(link.send, start.log_level)
        mailbox = Mailbox(sock, left_alone)
        mailbox.start()
        if start.place.size == 1:
            if start.place.num_local > 1:
                take_device(detect(start.config.device).device_type, start.place)
            built = factory(start.config)
        else:
            crew = Crew(start.place, program_identity(start.config), partial(end_with_others, link), link.beat)
            built = _built_together(factory, start.config, crew)
        ready = True
        link.send(Ready(report=list(built.report), folder=str(built.folder), context_length=built.context_length))
        _work(built, crew, mailbox, link.send, start.config.itl_target_ms)
    except (BrokenPipeError, ConnectionResetError):
        return 0  # the server is gone
    except Exception as error:  # noqa: BLE001  (the last words of the process, told to the server)
        words = _last_words(error, explained=isinstance(error, L4Error) and not ready)
        if crew is not None:
            crew.part(words.kind, words.message, words.fix, words.trace)
        with contextlib.suppress(OSError):
            link.send(words)
        return 1
    return 0


def _built_together(factory: Factory, config: EngineConfig, crew: Crew) -> Built:
    """Returns once all ranks have built. Raises ConfigError where what they read, or chose, differs."""
    crew.agree(checkpoint_identity(config) | device_identity(config))
    built = factory(config, ranks=crew.join(detect(config.device).device_type))
    crew.agree(choices(built.report))
    return built


def _work(
    built: Built, crew: Crew | None, mailbox: Mailbox, send: Callable[[ToServer], None], itl_target_ms: float | None
) -> None:
    if crew is None:
        run(built.engine, mailbox, send, itl_target_ms, built.drafts)
    elif crew.place.rank:
        follow(built.engine, crew)
    else:
        lead = LeadEngine(built.engine, crew)
        run(lead, mailbox, send, itl_target_ms, built.drafts)
        if mailbox.is_end_meant:
            lead.close()


class Link:
    """This end of the socket to the server, for several threads."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock, self._lock = sock, threading.Lock()

    def send(self, message: ToServer) -> None:
        data = frame(message)
        with self._lock:
            self._sock.sendall(data)

    def beat(self) -> None:
        """A sign of life, unless that would have to wait: for a thread that sends, or for a server that does not read."""
        if self._lock.acquire(blocking=False):
            try:
                self._sock.send(frame(Alive()), socket.MSG_DONTWAIT)  # a few bytes: all or none
            except OSError:  # full, or gone: the mailbox tells
                pass
            finally:
                self._lock.release()

    def send_last(self, message: ToServer) -> None:
        """Unless the server does not read, or another thread is stuck in sending."""
        if self._lock.acquire(timeout=LAST_SEND_SECONDS):
            with contextlib.suppress(OSError):
                self._sock.settimeout(LAST_SEND_SECONDS)
                self._sock.sendall(frame(message))


def end_with_others(link: Link, words: Words) -> None:
    """What the watchdog does about another rank's end. The main thread may be in a collective that never returns, so nothing is tidied up."""
    link.send_last(Failed(kind=words.kind, message=words.message, fix=words.fix, trace=words.trace, heard=True))
    os._exit(LOST_STATUS)


def _first(payload: bytearray | None) -> Start | None:
    if payload is None:
        return None
    message = decode_for_engine(payload)
    if not isinstance(message, Start):
        raise L4Error(f"the first frame is {type(message).__name__}; wanted Start")
    return message


def _last_words(error: Exception, *, explained: bool) -> Failed:
    """explained: the error is a sentence for the user; otherwise the traceback goes along."""
    trace = "" if explained else "".join(traceback.format_exception(error))
    if isinstance(error, L4Error):
        return Failed(kind=type(error).__name__, message=error.message, fix=error.fix, trace=trace)
    return Failed(kind=type(error).__name__, message=f"{type(error).__name__}: {error}", trace=trace)


def exit_if_stuck() -> None:
    """The loop ends by itself when the server is gone, unless it is in the middle of loading weights or of a very long step."""
    time.sleep(ORPHAN_GRACE_SECONDS)
    os._exit(0)


def forward_all_logs(send: Callable[[ToServer], None], level: int) -> None:
    """This process writes no log of its own. level: of L4's records; warnings of other libraries go along."""
    root = logging.getLogger()
    root.handlers = [ForwardLogs(send)]
    root.setLevel(logging.WARNING)
    logging.getLogger("l4core").setLevel(level)


def _deferred(path: str) -> Factory:
    """The function that "package.module:function" names, imported when it is called: an import error is then among the last words."""

    def build(config: EngineConfig, **ranks: Ranks) -> Built:
        module, _, name = path.partition(":")
        made: Built = getattr(importlib.import_module(module), name)(config, **ranks)
        gc.collect()
        gc.freeze()  # what the model is made of lives as long as the process: later collections skip it
        return made

    return build


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the process. --fd: given several times, there is a process for each, and --report tells of their ends.  --factory: another
    builder of the engine (tests speak to a small one)."""
    parser = argparse.ArgumentParser(prog="l4core.engine.process.worker")
    parser.add_argument("--fd", type=int, required=True, action="append")
    parser.add_argument("--report", type=int)
    parser.add_argument("--factory", default=BUILD_ENGINE)
    args = parser.parse_args(argv)
    faulthandler.enable()  # a crash in native code leaves a trace on stderr
    faulthandler.register(TRACE_SIGNAL)
    for sig in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # Ctrl-C and service managers signal the whole group; the server decides when this ends
        signal.signal(sig, signal.SIG_IGN)
    serve_fd = partial(_serve_fd, args.factory)
    if args.report is None:
        return serve_fd(args.fd[0])
    raise_ranks(args.factory.partition(":")[0], args.fd, args.report, serve_fd)


def _serve_fd(factory: str, fd: int) -> int:
    sock = socket.socket(fileno=fd)
    sock.set_inheritable(False)
    return serve(sock, _deferred(factory), orphaned=exit_if_stuck, forward_logs=forward_all_logs)


if __name__ == "__main__":
    raise SystemExit(main())
