"""The listening sockets. Bound before the model loads, so that a taken port is told at once."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket

from l4core.errors import ConfigError

NO_SUCH_ADDRESS = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})


def listen(host: str, port: int, *, backlog: int) -> list[socket.socket]:
    """One socket per address of `host` ("localhost" may have two), all on one port; port 0 = any free one. Raises ConfigError."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(
            f"--host {host!r} is not an address of this machine: {error}", fix="--host 127.0.0.1"
        ) from error
    sockets: list[socket.socket] = []
    refused: OSError | None = None
    for family, kind, protocol, _, where in dict.fromkeys(found):
        wanted = sockets[0].getsockname()[1] if sockets else port
        try:
            sockets.append(_bind(socket.socket(family, kind, protocol), (where[0], wanted, *where[2:]), backlog))
        except OSError as error:
            refused = error
            if error.errno not in NO_SUCH_ADDRESS:
                break
    if refused is not None and (not sockets or refused.errno not in NO_SUCH_ADDRESS):
        for sock in sockets:
            sock.close()
        reason = os.strerror(refused.errno or 0)
        raise ConfigError(f"cannot listen on {host}:{port}: {reason}", fix="--port 0 takes any free port") from refused
    return sockets


def _bind(sock: socket.socket, where: tuple[str | int, ...], backlog: int) -> socket.socket:
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(where)
        sock.listen(backlog)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def address(host: str, sock: socket.socket) -> str:
    """http://host:port as a client would write it."""
    name = host or "localhost"
    return f"http://{f'[{name}]' if ':' in name else name}:{sock.getsockname()[1]}"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`. A name other than localhost counts as reachable."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
