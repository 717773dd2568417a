"""What ranks say to each other beside tensors. msgpack, never pickle; only while they find each other, and to tell that they are alive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import msgspec


class Hello(msgspec.Struct, tag="hello", frozen=True, kw_only=True):
    """A rank to rank 0. nonce: of this process.  host: its machine, as messages name it.  identity: what must be the same on all ranks, by name.
    secret: of the place."""

    rank: int
    size: int
    nonce: str
    host: str
    identity: Mapping[str, str]
    secret: str = ""


class Attach(msgspec.Struct, tag="attach", frozen=True):
    """First words on a rank's second connection, which carries the steps."""

    rank: int
    nonce: str


class Waiting(msgspec.Struct, tag="waiting", frozen=True):
    """Rank 0 is there; these ranks are not yet."""

    missing: Sequence[int]


class Refusal(msgspec.Struct, tag="refusal", frozen=True):
    """These ranks do not go together."""

    message: str
    fix: str


class Welcome(msgspec.Struct, tag="welcome", frozen=True):
    """All are there. store_port: of torch.distributed's store, on rank 0's machine."""

    store_port: int


class Beat(msgspec.Struct, tag="beat", frozen=True):
    """I am alive. step: the last one begun.  busy: it has not ended."""

    step: int
    busy: bool


class Words(msgspec.Struct, tag="words", frozen=True):
    """The last ones of a rank: why all must end. kind: class of the error.  trace: of one that L4 does not raise on purpose."""

    kind: str
    message: str
    fix: str = ""
    trace: str = ""


Message: TypeAlias = Hello | Attach | Waiting | Refusal | Welcome | Beat | Words
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
MOST_BYTES = 1 << 20
"""Of one of these."""


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(payload: bytes | bytearray) -> Message:
    """Raises msgspec.DecodeError."""
    return _decoder.decode(payload)
