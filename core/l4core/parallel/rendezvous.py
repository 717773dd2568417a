"""How the ranks of one engine find each other: rank 0 listens, the others come and say what they are, and all start together or not at all.

Each rank keeps two connections to rank 0: one for the steps, which its main thread reads, and one for signs of life, which its watchdog reads.
Ranks that one process started know each other by a secret it gave them. Nothing else is checked against strangers, as with torch's own stores and
collectives: the addresses of several machines belong into a network of one's own.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import select
import socket
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec

from l4core.errors import ConfigError, L4Error, RankLostError
from l4core.parallel.messages import MOST_BYTES, Attach, Hello, Message, Refusal, Waiting, Welcome, decode, encode
from l4core.parallel.place import EVERYWHERE, LOOPBACK, Place, listening
from l4core.parallel.store import open_store
from l4core.parallel.wire import framed, read_frame

logger = logging.getLogger(__name__)

JOIN_SECONDS = 600.0
"""How long ranks wait for each other. A machine that starts anew may take its time."""
TICK_SECONDS = 1.0
HANDSHAKE_SECONDS = 5.0
RETRY_SECONDS = 0.2
TELL_SECONDS = 15.0
"""Between two log lines about who is missing."""
KEY = "l4/rank-0"
"""Where torchrun's store says where rank 0 is."""


@dataclass(kw_only=True)
class Met:
    """The ranks that found each other, as one of them sees the others. steps, beats: its connections, by rank (all others for rank 0, and rank 0
    for all others).  hosts: machines' names by rank, on rank 0.  store_host, store_port: of torch.distributed's store.  store, listener: rank 0's
    sockets, listening."""

    place: Place
    steps: Mapping[int, socket.socket]
    beats: Mapping[int, socket.socket]
    hosts: Mapping[int, str]
    store_host: str
    store_port: int
    store: socket.socket | None = None
    listener: socket.socket | None = None

    def name(self, rank: int) -> str:
        """As messages name a rank."""
        if self.place.whole or rank not in self.hosts:
            return f"rank {rank}"
        return f"rank {rank} ({self.hosts[rank]})"


def meet(place: Place, identity: Mapping[str, str]) -> Met:
    """Wait until all ranks are there. identity: what must be the same on all of them, by name.

    Raises ConfigError, on all ranks, where it is not, and RankLostError when someone does not come.
    """
    return _Gathering(place, identity).run() if place.rank == 0 else _join(place, identity)


@dataclass
class _Joined:
    hello: Hello
    beats: socket.socket
    steps: socket.socket | None = None

    @property
    def gone(self) -> bool:
        """Whether it has closed its connection, and will be back with a new one."""
        readable, _, _ = select.select([self.beats], [], [], 0)
        try:
            return bool(readable) and not self.beats.recv(1, socket.MSG_PEEK)
        except ConnectionError:
            return True

    def close(self) -> None:
        for sock in filter(None, (self.beats, self.steps)):
            sock.close()


@dataclass
class _Gathering:
    """Rank 0's side."""

    place: Place
    identity: Mapping[str, str]
    joined: dict[int, _Joined] = field(default_factory=dict)
    twice: set[int] = field(default_factory=set)

    def run(self) -> Met:
        listener = _own_listener(self.place)
        try:
            self._gather(listener)
        except BaseException:
            listener.close()
            for joined in self.joined.values():
                joined.close()
            raise
        host = listener.getsockname()[0]
        store = listening(host, 0)
        port = store.getsockname()[1]
        self._tell(Welcome(port))
        return Met(
            place=self.place,
            steps={rank: _steady(joined.steps) for rank, joined in self.joined.items() if joined.steps is not None},
            beats={rank: joined.beats for rank, joined in self.joined.items()},
            hosts={rank: joined.hello.host for rank, joined in self.joined.items()},
            store_host=LOOPBACK if host in EVERYWHERE else host,
            store_port=port,
            store=store,
            listener=listener,
        )

    def _gather(self, listener: socket.socket) -> None:
        listener.settimeout(TICK_SECONDS)
        host = listener.getsockname()[0]
        deadline, told = time.monotonic() + JOIN_SECONDS, time.monotonic()
        while missing := self._missing():
            with suppress(TimeoutError):
                self._admit(listener.accept()[0])
            now = time.monotonic()
            if now > deadline:
                raise RankLostError(
                    f"{ranks_text(missing)} did not come within {JOIN_SECONDS:.0f} s",
                    fix=_how_to_come(self.place),
                )
            if now > told + TELL_SECONDS:
                told = now
                logger.info("waiting for %s at %s:%d", ranks_text(missing), host, self.place.port)

    def _missing(self) -> list[int]:
        """Who is not there, or no more. Those who are hear of it: they are not forgotten."""
        for rank in [rank for rank, joined in self.joined.items() if joined.gone]:
            self.joined.pop(rank).close()
        missing = [r for r in range(1, self.place.size) if r not in self.joined or self.joined[r].steps is None]
        if missing:
            self._tell(Waiting(missing))
        return missing

    def _tell(self, message: Message) -> None:
        for joined in self.joined.values():
            with suppress(OSError):
                joined.beats.sendall(framed(encode(message)))

    def _admit(self, sock: socket.socket) -> None:
        message = first_message(sock)
        if isinstance(message, Attach):
            joined = self.joined.get(message.rank)
            if joined is not None and joined.hello.nonce == message.nonce:
                joined.steps = sock
                return
        elif isinstance(message, Hello) and is_ours(message, self.place):
            self._check(message, sock)
            self._replace(message, sock)
            return
        sock.close()

    def _replace(self, hello: Hello, sock: socket.socket) -> None:
        """One that comes again is a rank that was started anew, or two that take themselves for the same one: then neither would stay."""
        before = self.joined.get(hello.rank)
        if before is not None:
            if before.hello.host != hello.host and hello.rank not in self.twice:
                self.twice.add(hello.rank)
                logger.warning(
                    "rank %d comes from two places, %s and %s: --node-rank must be another on each machine",
                    *(hello.rank, before.hello.host, hello.host),
                )
            before.close()
        self.joined[hello.rank] = _Joined(hello, sock)

    def _check(self, hello: Hello, sock: socket.socket) -> None:
        problem = self._difference(hello)
        if problem is None:
            return
        with sock, suppress(OSError):
            sock.sendall(framed(encode(Refusal(*problem))))
        self._tell(Refusal(*problem))
        raise ConfigError(problem[0], fix=problem[1])

    def _difference(self, hello: Hello) -> tuple[str, str] | None:
        """(what differs, what helps)."""
        who = f"rank {hello.rank}" if self.place.whole else f"rank {hello.rank} ({hello.host})"
        if hello.size != self.place.size or not 0 < hello.rank < self.place.size:
            return f"{who} counts {hello.size} ranks, and rank 0 {self.place.size}", "the same --tp on all machines"
        return difference(who, self.identity, hello.identity)


def difference(who: str, here: Mapping[str, str], there: Mapping[str, str]) -> tuple[str, str] | None:
    """(what another rank has that rank 0, here, has not, what helps); None where both have the same."""
    for name in sorted({*here, *there}):
        ours, theirs = here.get(name, "nothing"), there.get(name, "nothing")
        if ours != theirs:
            return (
                f"{who} and rank 0 differ: {name} is {theirs} there, and {ours} here",
                "the same versions, options and files on all machines",
            )
    return None


def is_ours(hello: Hello, place: Place) -> bool:
    """Whether it comes from a rank and not from another user of this machine."""
    known = hmac.compare_digest(hello.secret.encode(), place.secret.encode())
    if not known:
        logger.warning("someone connected who calls itself rank %d and is none of this engine", hello.rank)
    return known


def first_message(sock: socket.socket, seconds: float = HANDSHAKE_SECONDS) -> Message | None:
    """What one that connects says; None where that is nothing a rank says, or not said within `seconds`."""
    try:
        payload = read_frame(sock, most=MOST_BYTES, seconds=seconds)
        sock.settimeout(HANDSHAKE_SECONDS)  # for what is said to it later
        return None if payload is None else decode(payload)
    except (L4Error, OSError, msgspec.DecodeError) as error:
        logger.warning("someone connected who is no rank of this engine: %s", error)
        return None


def _how_to_come(place: Place) -> str:
    """For the ranks that rank 0 misses."""
    if place.whole:
        return "what the log says of them; they are on this machine"
    if place.in_store:
        return f"torchrun on every machine with the same --rdzv-endpoint (or --master-addr), and {place.host} within their reach"
    host = "HOST" if place.host in EVERYWHERE else place.host
    there = ", HOST an address of this machine" if host == "HOST" else ""
    return f"start them with --dist-init-addr {host}:{place.port}{there}, and let them through the firewall"


def _how_to_wait(place: Place) -> str:
    """For the rank 0 that others miss."""
    if place.whole:
        return "what the log says of rank 0; it is on this machine"
    if place.in_store:
        return "let this machine through to the one of rank 0; what the log there says"
    return "start machine 0 with the same --dist-init-addr, and let this one through its firewall"


def _own_listener(place: Place) -> socket.socket:
    if place.listen_fd is not None:
        return socket.socket(fileno=place.listen_fd)
    if not place.in_store:
        return listening(place.host, place.port)
    host = LOOPBACK if place.whole else _local_address(place)
    listener = listening(host, 0)
    there = LOOPBACK if place.whole else place.host
    _torchrun_store(place).set(KEY, f"{listener.getsockname()[1]} {there}")
    return listener


def _local_address(place: Place) -> str:
    """This machine's, as the others reach it: torchrun's store is here. All of them where its name is one of the loopback here."""
    with socket.create_connection((place.host, place.port), timeout=HANDSHAKE_SECONDS) as probe:
        found: str = probe.getsockname()[0]
    return EVERYWHERE[0] if found.startswith("127.") else found


def _torchrun_store(place: Place) -> Any:
    return open_store(place.host, place.port, seconds=HANDSHAKE_SECONDS)


def _join(place: Place, identity: Mapping[str, str]) -> Met:
    """The other ranks' side. A rank 0 that is gone, or of an engine that is just ending, is tried again."""
    deadline, told = time.monotonic() + JOIN_SECONDS, time.monotonic()
    while True:
        try:
            return _try_join(place, identity)
        except OSError as error:
            now = time.monotonic()
            if now > deadline:
                raise RankLostError(
                    f"rank 0 does not answer at {place.host}:{place.port}: {error}",
                    fix=_how_to_wait(place),
                ) from error
            if now > told + TELL_SECONDS:
                told = now
                logger.info("waiting for rank 0 at %s:%d (%s)", place.host, place.port, error)
        time.sleep(RETRY_SECONDS)


def _try_join(place: Place, identity: Mapping[str, str]) -> Met:
    """Raises OSError for what may be better in a moment."""
    host, port = (place.host, place.port) if not place.in_store else _address_in_store(place)
    nonce = secrets.token_hex(8)
    hello = Hello(
        rank=place.rank, size=place.size, nonce=nonce, host=place.where, identity=identity, secret=place.secret
    )
    with ExitStack() as undo:
        beats = undo.enter_context(_connect(host, port, hello))
        try:
            steps = undo.enter_context(_connect(host, port, Attach(place.rank, nonce)))
        except OSError:
            _welcomed(beats)  # rank 0 may have ended because of this one: then it has said so
            raise
        beats.settimeout(max(place.timeout, HANDSHAKE_SECONDS + 2 * TICK_SECONDS))  # rank 0 says something every second
        store_port = _welcomed(beats)
        undo.pop_all()
    met = {0: _steady(steps)}
    return Met(place=place, steps=met, beats={0: beats}, hosts={}, store_host=host, store_port=store_port)


def _welcomed(beats: socket.socket) -> int:
    """Waits until all are there → the port of the store."""
    while (payload := read_frame(beats, most=MOST_BYTES)) is not None:
        message = decode(payload)
        if isinstance(message, Refusal):
            raise ConfigError(message.message, fix=message.fix)
        if isinstance(message, Welcome):
            return message.store_port
    raise ConnectionResetError("rank 0 went away")


def _address_in_store(place: Place) -> tuple[str, int]:
    try:
        port, host = bytes(_torchrun_store(place).get(KEY)).decode().split()
    except (
        RuntimeError
    ) as error:  # torch.distributed's errors: no store there (yet), or rank 0 has left nothing in it (yet)
        raise ConnectionError(str(error).partition("\n")[0]) from error
    return host, int(port)


def _connect(host: str, port: int, message: Message) -> socket.socket:
    sock = socket.create_connection((host, port), timeout=HANDSHAKE_SECONDS)
    if sock.getsockname() == sock.getpeername():  # the kernel may connect a socket with itself while nobody listens
        sock.close()
        raise ConnectionRefusedError("nobody listens")
    sock.sendall(framed(encode(message)))
    return sock


def _steady(sock: socket.socket) -> socket.socket:
    """For small messages that go out at once."""
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def ranks_text(ranks: list[int]) -> str:
    """[1, 2, 3, 6] → "ranks 1–3, 6"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs]
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(parts)}"
