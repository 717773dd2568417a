"""What the HTTP server and the engine process say to each other, and how it is framed: 4 bytes of length, then msgpack. Never pickle.

server → engine: `Start` once, then `Submit`.  engine → server: `Log`, then `Ready` or `Failed`, then `Stepped` and `Refused`, `Failed` at the
end; `Alive` all along, from each of several ranks. A closed socket means: the other side is gone.
"""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Sequence
from typing import TypeAlias, TypeVar

import msgspec

from l4core import errors
from l4core.config import EngineConfig
from l4core.engine.inbox import Inbox
from l4core.errors import EngineDeadError, L4Error
from l4core.parallel.place import Place
from l4core.parallel.wire import framed
from l4core.request import Request, StepOutput

TRACE_SIGNAL = signal.SIGUSR1
"""Makes the engine process write the stack of every thread to stderr, and go on."""

LOST_STATUS = 3
"""Exit status of a rank that ends because another one did."""


class Start(msgspec.Struct, tag="start", frozen=True):
    """First frame of all. log_level: Python's number.  place: which of the engine's ranks the process is."""

    config: EngineConfig
    log_level: int
    place: Place = Place()


class Submit(msgspec.Struct, tag="submit", frozen=True):
    """New requests and aborts; the engine takes them in before its next step. Requests travel without their prompt: the n sequences of one
    prompt share it, there and here. prompt_of: index into prompts, one entry a request."""

    prompts: Sequence[Sequence[int]]
    prompt_of: Sequence[int]
    requests: Sequence[Request]
    aborts: Sequence[str]
    flush_cache: bool = False

    @classmethod
    def of(cls, inbox: Inbox) -> Submit:
        """Prompts that are one object are sent once."""
        prompts = {id(request.prompt_token_ids): request.prompt_token_ids for request in inbox.requests}
        number = {key: index for index, key in enumerate(prompts)}
        return cls(
            prompts=list(prompts.values()),
            prompt_of=[number[id(request.prompt_token_ids)] for request in inbox.requests],
            requests=[dataclasses.replace(request, prompt_token_ids=()) for request in inbox.requests],
            aborts=inbox.aborts,
            flush_cache=inbox.flush_cache,
        )

    def inbox(self) -> Inbox:
        """What `of` was given."""
        requests = [
            dataclasses.replace(request, prompt_token_ids=self.prompts[index])
            for request, index in zip(self.requests, self.prompt_of, strict=True)
        ]
        return Inbox(requests=requests, aborts=self.aborts, flush_cache=self.flush_cache)


class Stop(msgspec.Struct, tag="stop", frozen=True):
    """The server ends on purpose. A socket that closes without it is a server that died: the ranks of other machines wait for another."""


class Alive(msgspec.Struct, tag="alive", frozen=True):
    """A rank's watchdog runs. Said at each of its looks, to whoever started the rank."""


class Log(msgspec.Struct, tag="log", frozen=True):
    """A log record of the engine process, to be printed by the server's own logging."""

    level: int
    name: str
    text: str


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """The model is loaded. report: lines of the start-up block.  folder: the checkpoint, resolved.  context_length: tokens."""

    report: Sequence[str]
    folder: str
    context_length: int


class Stepped(msgspec.Struct, tag="stepped", frozen=True):
    """One step was made."""

    output: StepOutput


class Refused(msgspec.Struct, tag="refused", frozen=True):
    """The engine would not take a request (a RequestError, by its parts); nothing of it was computed."""

    request_id: str
    message: str
    status: int
    param: str | None = None
    code: str | None = None


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """The engine process ends. kind: the error's class.  trace: a traceback when the error is not one that L4 raises on purpose.  heard: it is
    another rank's error, which the message names."""

    kind: str
    message: str
    fix: str = ""
    trace: str = ""
    heard: bool = False

    def error(self) -> L4Error:
        """The error to raise on the server's side, of the class it had over there."""
        known = getattr(errors, self.kind, None)
        if self.trace or not (isinstance(known, type) and issubclass(known, L4Error)):
            return EngineDeadError(f"the engine process failed: {self.message}\n{self.trace}".rstrip(), fix=self.fix)
        return known(self.message, fix=self.fix) if known is not errors.RequestError else L4Error(self.message)


class Ended(msgspec.Struct, tag="ended", frozen=True):
    """One of the processes that compute together is no more. index: among those of this machine.  status: negative = of a signal.
    put_down: it had to go because another one did."""

    index: int
    status: int
    put_down: bool = False

    @property
    def is_cause(self) -> bool:
        """Of the others' ends."""
        return not self.put_down and self.status not in (0, LOST_STATUS)


ToEngine: TypeAlias = Start | Submit | Stop
ToServer: TypeAlias = Alive | Log | Ready | Stepped | Refused | Failed | Ended

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_to_server: msgspec.msgpack.Decoder[ToServer] = msgspec.msgpack.Decoder(ToServer)
T = TypeVar("T")


def frame(message: ToEngine | ToServer) -> bytes:
    """Length and payload, ready to write. Raises OverflowError for an integer beyond 64 bits, L4Error for more than 2 GiB."""
    return framed(_encoder.encode(message))


def decode_for_engine(payload: bytes | bytearray) -> ToEngine:
    """A payload the server sent. Raises msgspec.ValidationError."""
    return _to_engine.decode(payload)


def decode_for_server(payload: bytes | bytearray) -> ToServer:
    """A payload the engine sent. Raises msgspec.ValidationError."""
    return _to_server.decode(payload)
