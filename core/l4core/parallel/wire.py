"""Bytes in frames over a stream socket: 4 bytes of length, then the payload. What the payload means is for others to say."""

from __future__ import annotations

import socket
import struct
import time

from l4core.errors import L4Error

HEADER = struct.Struct("<I")
MAX_FRAME_BYTES = (1 << 31) - 1


def framed(payload: bytes) -> bytes:
    """Length and payload, ready to write. Raises L4Error for more than 2 GiB."""
    if len(payload) > MAX_FRAME_BYTES:
        raise L4Error(f"a message between processes has {len(payload):,} bytes; at most {MAX_FRAME_BYTES:,}")
    return HEADER.pack(len(payload)) + payload


def read_frame(sock: socket.socket, *, most: int = MAX_FRAME_BYTES, seconds: float | None = None) -> bytearray | None:
    """Blocks for one payload; None when the other side closed. seconds: for all of it, however little comes at a time; None = the socket's time-out
    for each piece. Raises TimeoutError, L4Error for more than `most` bytes."""
    until = None if seconds is None else time.monotonic() + seconds
    header = _read_exactly(sock, HEADER.size, until)
    if header is None:
        return None
    size = HEADER.unpack(header)[0]
    if size > most:
        raise L4Error(f"a frame of {size:,} bytes where at most {most:,} are expected")
    return _read_exactly(sock, size, until)


def _read_exactly(sock: socket.socket, size: int, until: float | None) -> bytearray | None:
    buffer = bytearray(size)
    view, filled = memoryview(buffer), 0
    while filled < size:
        if until is not None:
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"{filled} of {size} bytes came in time")
            sock.settimeout(left)
        try:
            count = sock.recv_into(view[filled:])
        except ConnectionResetError:
            return None
        if count == 0:
            return None
        filled += count
    return buffer
