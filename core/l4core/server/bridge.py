"""Between HTTP handlers and the engine process: hands requests over, deals updates out, and starts the engine anew when it dies.

One task reads everything the engine says; each handler waits on its own `UpdateStream`. Knows nothing of HTTP or text.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from l4core.config import EngineConfig
from l4core.engine.inbox import Inbox
from l4core.engine.process.messages import Failed, Log, Ready, Refused, Stepped, Submit
from l4core.errors import EngineDeadError, L4Error, RequestError
from l4core.parallel.place import Layout
from l4core.request import Request, SequenceUpdate, StepOutput
from l4core.server.process import STOP_SECONDS, EngineProcess

logger = logging.getLogger(__name__)


class EngineState(StrEnum):
    """STARTING: loading the model.  READY: stepping.  RESTARTING: died, loading again.  STOPPED: closed, or died too often."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """At most max_restarts within window_seconds; the n-th of them waits n × pause_seconds first (the first starts at once)."""

    max_restarts: int = 3
    window_seconds: float = 600.0
    pause_seconds: float = 1.0


WATCHDOG_LOOKS = 10
"""Looks within one time-out."""


class Observer(Protocol):
    """Who counts (server/metrics.py)."""

    def submitted(self, requests: Sequence[Request]) -> None: ...
    def stepped(self, output: StepOutput) -> None: ...
    def dropped(self, request_ids: Iterable[str]) -> None: ...
    def stopped(self, request_id: str) -> None: ...
    def lost(self) -> None: ...
    def restarted(self) -> None: ...


def not_ready(state: EngineState) -> RequestError:
    """There is no engine now."""
    return RequestError(f"the engine is {state.value}; try again shortly", status=503, code="engine_not_ready")


def full(num_active: int, most: int) -> RequestError:
    """The queue holds no more."""
    return RequestError(
        f"{num_active} sequences are waiting or running and at most {most} may; try again shortly",
        status=429,
        code="queue_full",
    )


class UpdateStream:
    """What the engine says of the requests of one HTTP call, in order. Always `close()` it: that aborts what has not ended."""

    def __init__(self, bridge: Bridge, request_ids: Iterable[str]) -> None:
        self._bridge = bridge
        self._unfinished = set(request_ids)
        self._pending: list[SequenceUpdate] = []
        self._error: L4Error | None = None
        self._wake = asyncio.Event()

    async def next(self) -> list[SequenceUpdate]:
        """All updates since the last call, at least one. Raises EngineDeadError or RequestError when there will be no more."""
        while not self._pending:
            if self._error is not None:
                raise self._error
            self._wake.clear()
            await self._wake.wait()
        updates, self._pending = self._pending, []
        return updates

    def stop(self, request_id: str) -> None:
        """This one is complete (a stop string came), and the engine does not know."""
        self._unfinished.discard(request_id)
        self._bridge.stop(request_id)

    def close(self) -> None:
        self._bridge.abort(self._unfinished)
        self._unfinished.clear()

    def put(self, update: SequenceUpdate) -> None:
        if update.finish_reason is not None:
            self._unfinished.discard(update.request_id)
        self._pending.append(update)
        self._wake.set()

    def fail(self, error: L4Error) -> None:
        self._error = self._error or error
        self._wake.set()


class Bridge:
    """Owner of the engine process. layout: its ranks.  max_sequences: waiting or running, before `submit` refuses with 429.
    step_timeout: seconds without a step, while one is due, after which the process is hung and is ended; 0 = never."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        max_sequences: int,
        observer: Observer,
        step_timeout: float = 0.0,
        log_level: int = logging.INFO,
        factory: str | None = None,
        policy: RestartPolicy | None = None,
        layout: Layout | None = None,
    ) -> None:
        self._config = config
        self._layout = layout or Layout()
        self._listener: socket.socket | None = None
        self._max_sequences = max_sequences
        self._observer = observer
        self._step_timeout = step_timeout
        self._step_is_due = False  # the engine owes us a step
        self._num_steps = 0
        self._log_level = log_level
        self._factory = factory
        self._policy = policy or RestartPolicy()
        self._process: EngineProcess | None = None
        self._owners: dict[str, UpdateStream] = {}
        self._deaths: collections.deque[float] = collections.deque()
        self._closed = False
        self.state = EngineState.STARTING

    @property
    def num_active(self) -> int:
        """Sequences waiting or running."""
        return len(self._owners)

    @property
    def num_ready(self) -> int:
        """Engines that run with a loaded model."""
        return int(self.state is EngineState.READY)

    @property
    def pid(self) -> int | None:
        """Of the engine process, None while there is none."""
        return self._process.pid if self._process else None

    async def start(self) -> Ready:
        """Start the engine process and wait until the model is loaded. Raises the L4Error that the engine ended with."""
        if self._listener is None:
            self._listener = self._layout.open()
        self._process = process = await EngineProcess.spawn(
            self._config,
            log_level=self._log_level,
            factory=self._factory,
            places=self._layout.with_listener(self._listener),
        )
        words: L4Error | None = None
        try:
            while (message := await process.receive()) is not None:
                if isinstance(message, Ready):
                    self.state = EngineState.READY
                    return message
                if isinstance(message, Failed):
                    words = message.error()
                elif isinstance(message, Log):
                    logging.getLogger(message.name).log(message.level, "%s", message.text)
        except EngineDeadError as error:
            words = error
        ending = await self._end_process()
        raise words or EngineDeadError(
            f"the engine process {ending} while it was starting",
            fix="SIGKILL usually means that memory ran out: see `l4 check MODEL` and --mem-fraction-static",
        )

    async def run(self) -> None:
        """Deal out what a started engine says, restart it when it dies. Returns after `close`, raises EngineDeadError when it dies too often."""
        while True:
            last_words = await self._pump()
            if self._closed:
                return
            self.state = EngineState.RESTARTING
            ending = await self._end_process()
            self._observer.lost()
            logger.error("the engine process %s%s", ending, last_words)
            self._fail_all(EngineDeadError(f"the engine process {ending}; it is being started again"))
            await self._restart()

    def submit(self, requests: Sequence[Request]) -> UpdateStream:
        """Hand over the sequences of one HTTP call. Raises RequestError: 429 full now, 503 no engine now."""
        self._admit(len(requests))
        stream = UpdateStream(self, [r.request_id for r in requests])
        try:
            self._send(Inbox(requests=requests))
        except OverflowError as error:
            raise RequestError(f"a number in the request does not fit 64 bits ({error})") from error
        self._owners.update((r.request_id, stream) for r in requests)
        self._observer.submitted(requests)
        return stream

    def flush_cache(self) -> None:
        """The engine forgets all cached prefixes before it takes in what is submitted later. RequestError (503) while there is no engine."""
        self._check_ready()
        self._send(Inbox(flush_cache=True))

    def abort(self, request_ids: Iterable[str]) -> None:
        """Nobody waits for these any more. Unknown and ended ids are left out."""
        known = [i for i in request_ids if self._owners.pop(i, None) is not None]
        if known:
            self._send(Inbox(aborts=known))
            self._observer.dropped(known)

    def stop(self, request_id: str) -> None:
        """This one has all its tokens."""
        if self._owners.pop(request_id, None) is not None:
            self._send(Inbox(aborts=[request_id]))
            self._observer.stopped(request_id)

    def shut(self, error: RequestError) -> None:
        """End all requests with `error` now (the drain deadline passed)."""
        streams = list(self._owners.values())
        self.abort(list(self._owners))
        for stream in streams:
            stream.fail(error)

    async def close(self) -> None:
        """End the engine process and whatever still runs in it."""
        loading = self.state is not EngineState.READY  # nothing is lost when it is killed, and it would not listen
        self._closed = True
        self.state = EngineState.STOPPED
        self._fail_all(EngineDeadError("the server is shutting down"))
        await self._end_process(patience=0.0 if loading else STOP_SECONDS)
        if self._listener is not None:
            self._listener.close()

    def _check_ready(self) -> None:
        if self.state is not EngineState.READY:
            raise not_ready(self.state)

    def _admit(self, count: int) -> None:
        self._check_ready()
        if len(self._owners) + count > self._max_sequences:
            raise full(len(self._owners), self._max_sequences)

    def _send(self, inbox: Inbox) -> None:
        if self._process is not None:
            self._process.send(Submit.of(inbox))
            self._step_is_due = True

    async def _pump(self) -> str:
        """Until the process is gone → its last words, for the log."""
        process = self._process
        last_words = ""
        watchdog = asyncio.create_task(self._watch(process), name="watchdog")
        try:
            while process is not None and (message := await process.receive()) is not None:
                if isinstance(message, Stepped):
                    self._deal(message.output)
                elif isinstance(message, Refused):
                    self._refuse(message)
                elif isinstance(message, Log):
                    logging.getLogger(message.name).log(message.level, "%s", message.text)
                elif isinstance(message, Failed):
                    last_words = f"\n{message.error()}"
        except EngineDeadError as error:
            last_words = f"\n{error}"
        finally:
            watchdog.cancel()
        return last_words

    async def _watch(self, process: EngineProcess | None) -> None:
        """Every message is answered by a step, and so is every step while sequences are left. When none comes for too long, let go of the process:
        `_pump` then ends as if it had died. Looks are counted, not the clock: a server that was stopped itself finds no fault with its engine."""
        num_silent, seen = 0, self._num_steps
        while process is not None and self._step_timeout:
            await asyncio.sleep(self._step_timeout / WATCHDOG_LOOKS)
            num_silent = num_silent + 1 if self._step_is_due and self._num_steps == seen else 0
            seen = self._num_steps
            if num_silent > WATCHDOG_LOOKS:
                logger.error(
                    "the engine process made no step for %g s (--watchdog-timeout); where it hangs is on stderr",
                    self._step_timeout,
                )
                await process.abandon()
                return

    def _deal(self, output: StepOutput) -> None:
        self._num_steps += 1
        self._observer.stepped(output)
        for update in output.updates:
            ended = update.finish_reason is not None
            owner = self._owners.pop(update.request_id, None) if ended else self._owners.get(update.request_id)
            if owner is not None:  # otherwise: aborted here, and the engine has not heard yet
                owner.put(update)
        self._step_is_due = bool(self._owners)

    def _refuse(self, refused: Refused) -> None:
        owner = self._owners.pop(refused.request_id, None)
        self._observer.dropped([refused.request_id])
        if owner is not None:
            owner.fail(RequestError(refused.message, status=refused.status, param=refused.param, code=refused.code))

    def _fail_all(self, error: L4Error) -> None:
        owners, self._owners = self._owners, {}
        self._observer.dropped(owners)
        for stream in owners.values():
            stream.fail(error)

    async def _restart(self) -> None:
        while not self._closed:
            now = time.monotonic()
            while self._deaths and now - self._deaths[0] > self._policy.window_seconds:
                self._deaths.popleft()
            if len(self._deaths) >= self._policy.max_restarts:
                self.state = EngineState.STOPPED
                raise EngineDeadError(
                    f"the engine process died {len(self._deaths) + 1} times within {self._policy.window_seconds:.0f} s; giving up"
                )
            await asyncio.sleep(len(self._deaths) * self._policy.pause_seconds)
            self._deaths.append(now)
            self._observer.restarted()
            logger.warning("starting the engine process again (%d of %d)", len(self._deaths), self._policy.max_restarts)
            try:
                await self.start()
            except L4Error as error:
                logger.error("%s", error)
            else:
                logger.warning("the engine is back")
                return

    async def _end_process(self, patience: float = STOP_SECONDS) -> str:
        process, self._process = self._process, None
        self._step_is_due = False
        return "ended" if process is None else await process.stop(patience)
