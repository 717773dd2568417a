"""From a place to `Ranks`: finds the others, keeps the watchdog, and joins torch.distributed (NCCL, gloo on CPUs, the device's own elsewhere)."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING

import msgspec

from l4core.errors import ConfigError, RankLostError
from l4core.parallel.messages import Words
from l4core.parallel.place import Place
from l4core.parallel.rendezvous import JOIN_SECONDS, Met, difference, meet
from l4core.parallel.store import open_store
from l4core.parallel.watchdog import HANG_FACTOR, LOST, Watchdog
from l4core.parallel.wire import framed, read_frame

if TYPE_CHECKING:
    import torch

    from l4core.parallel.ranks import Ranks

ECHO_SECONDS = 0.5
LOAD_SECONDS = 3600.0
"""By which one rank may have read its weights before another, with a sum over both to come."""


class Crew:
    """The other ranks of this rank's engine: what rank 0 sends to all, what each answers, and the watchdog over them."""

    def __init__(
        self,
        place: Place,
        identity: Mapping[str, str],
        end: Callable[[Words], None],
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """Waits until all ranks are there. end, beat: called by the watchdog. Raises ConfigError where `identity` is not the same on all,
        RankLostError when someone does not come."""
        self.place = place
        self.met: Met = meet(place, identity)
        self.watchdog = Watchdog(self.met, end, beat)
        self.watchdog.start()

    def send(self, payload: bytes) -> None:
        """Rank 0 to all others; or another rank to rank 0. Raises RankLostError when one is gone."""
        frame = framed(payload)
        try:
            for sock in self.met.steps.values():
                sock.sendall(frame)
        except OSError as error:
            raise RankLostError(f"{self._others()} is gone: {error.strerror or error}") from error

    def receive(self, rank: int = 0) -> bytearray:
        """What that rank sends next. Raises RankLostError when it is gone."""
        payload = read_frame(self.met.steps[rank])
        if payload is None:
            raise RankLostError(f"{self.met.name(rank)} closed its connection")
        return payload

    def agree(self, values: Mapping[str, str]) -> None:
        """All ranks call this at one point. Raises ConfigError on all of them where a value differs from rank 0's, naming it and the rank."""
        problem: tuple[str, str] | None = None
        if self.place.rank:
            self.send(msgspec.msgpack.encode(values))
            problem = msgspec.msgpack.decode(self.receive(), type=tuple[str, str] | None)
        else:
            for rank in self.met.steps:
                theirs = msgspec.msgpack.decode(self.receive(rank), type=dict[str, str])
                problem = problem or difference(self.met.name(rank), values, theirs)
            self.send(msgspec.msgpack.encode(problem))
        if problem is not None:
            raise ConfigError(problem[0], fix=problem[1])

    def part(self, kind: str, message: str, fix: str, trace: str) -> None:
        """This rank ends because of an error. What looks like one may be the echo of another rank's end: then it does not return."""
        if trace or kind == LOST:
            self.watchdog.wait_for_verdict(ECHO_SECONDS)
        self.watchdog.tell(Words(kind, f"{self.place}: {message}", fix, trace))

    def join(self, device_type: str) -> Ranks:
        """Into torch's collectives, on this rank's device, which becomes the current one. One such group a process."""
        from torch import distributed

        from l4core.parallel.ranks import Ranks

        device = take_device(device_type, self.place)
        _name_interface(self.met.steps[max(self.met.steps)], alone=self.place.whole)
        longest = max(LOAD_SECONDS, 2 * HANG_FACTOR * self.place.timeout)  # the watchdog is sooner
        backend = distributed.get_default_backend_for_device(device_type)
        distributed.init_process_group(
            backend,
            store=open_store(
                self.met.store_host,
                self.met.store_port,
                seconds=JOIN_SECONDS,
                size=self.place.size,
                serve=self.met.store,
            ),
            rank=self.place.rank,
            world_size=self.place.size,
            timeout=timedelta(seconds=longest),
            device_id=device
            if backend == "nccl"
            else None,  # then it connects now, not when the weights have been read
        )
        group = distributed.group.WORLD
        if group is None:
            raise RankLostError("torch.distributed has made no group")
        return Ranks(group)

    def _others(self) -> str:
        return "one of the other ranks" if self.place.rank == 0 else self.met.name(0)


def take_device(device_type: str, place: Place) -> torch.device:
    """The one of this rank, which becomes the current one. Raises ConfigError where the machine has fewer."""
    import torch

    if device_type == "cpu":
        if "OMP_NUM_THREADS" not in os.environ:  # ranks on one CPU would each take all cores, and wait for each other
            torch.set_num_threads(max(1, torch.get_num_threads() // place.num_local))
        return torch.device("cpu")
    found = torch.accelerator.device_count()
    if place.device >= found:
        raise ConfigError(
            f"{place} is to have device {place.device}, and this machine has {found}",
            fix=f"--tp times --dp at most {found}",
        )
    torch.accelerator.set_device_index(place.device)
    return torch.device(device_type, place.device)


def _name_interface(sock: socket.socket, *, alone: bool) -> None:
    """gloo takes the network that this machine's own name stands for, which may be none that the others reach; they reach the one of `sock`.
    alone: on this machine."""
    import psutil

    here = sock.getsockname()[0]
    if here.startswith("127.") and not alone:
        return
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.partition("%")[0] == here for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            return
