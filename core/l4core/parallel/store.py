"""torch.distributed's store of keys and values, served by one process and asked by the others."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any


def open_store(
    host: str, port: int, *, seconds: float, size: int | None = None, serve: socket.socket | None = None
) -> Any:
    """A `torch.distributed.TCPStore`. seconds: to wait for it, and for a key.  serve: here, on this listening socket, which it takes over.

    Raises RuntimeError (one of torch.distributed's) when nobody answers.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in its stubs

    return TCPStore(
        host,
        port,
        world_size=size,
        is_master=serve is not None,
        wait_for_workers=False,
        timeout=timedelta(seconds=seconds),
        master_listen_fd=None if serve is None else serve.detach(),
    )
