"""Where each rank is, and how it finds the others: from `--tp`, from `--nnodes/--node-rank/--dist-init-addr`, or from what torchrun sets.

Plain records; torch is not imported. Who starts ranks (server/bridge.py, server/node.py) is given a `Layout`; each rank is told its `Place`.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from l4core.config import EngineConfig, ServerConfig
from l4core.errors import ConfigError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun (or anyone who starts one process a rank) sets for each process."""
LOOPBACK = "127.0.0.1"
EVERYWHERE = ("0.0.0.0", "::")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One rank's. rank: 0 … size − 1.  device: index among the machine's devices.  num_local: ranks on this machine, of all its engines.
    machine: 0 … for messages.  host, port: where rank 0 listens; with in_store, where a store is that rank 0 leaves its own address in.
    whole: all ranks are on this machine.  timeout: `--dist-timeout`, seconds.  listen_fd: rank 0's listening socket, where its parent opened it.
    secret: by which ranks that one process started know each other; "" where there are others.
    """

    rank: int = 0
    size: int = 1
    device: int = 0
    num_local: int = 1
    machine: int = 0
    host: str = LOOPBACK
    port: int = 0
    in_store: bool = False
    whole: bool = True
    timeout: float = 30.0
    listen_fd: int | None = None
    secret: str = field(default="", repr=False)

    def __str__(self) -> str:
        """As messages name it."""
        return f"rank {self.rank}" if self.whole else f"rank {self.rank} ({self.where})"

    @property
    def where(self) -> str:
        return f"machine {self.machine}, {socket.gethostname()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The ranks of one engine that this process starts. listens: rank 0 is here, and its address is still to be opened."""

    places: tuple[Place, ...] = (Place(),)
    listens: bool = False

    @property
    def serves(self) -> bool:
        """Whether rank 0 is among them, which answers the HTTP server."""
        return self.places[0].rank == 0

    def open(self) -> socket.socket | None:
        """Rank 0's listening socket, kept open while its process is started anew. Raises ConfigError where the address is not to be had."""
        if not self.listens:
            return None
        first = self.places[0]
        try:
            return listening(first.host, first.port, reachable=not first.whole)
        except OSError as error:
            raise ConfigError(
                f"cannot listen at {first.host}:{first.port}: {error.strerror or error}",
                fix="--dist-init-addr with an address of machine 0 (`ip addr` lists them), and a port that is free there",
            ) from error

    def with_listener(self, listener: socket.socket | None) -> tuple[Place, ...]:
        """The places, told where rank 0 listens, and a new secret where all ranks are among them: other users of this machine reach the loopback
        too."""
        if listener is None:
            return self.places
        host, port = listener.getsockname()[:2]
        secret = secrets.token_hex(16) if len(self.places) == self.places[0].size else ""
        return tuple(
            replace(
                place, host=host, port=port, listen_fd=listener.fileno() if place.rank == 0 else None, secret=secret
            )
            for place in self.places
        )


def listening(host: str, port: int, *, reachable: bool = False) -> socket.socket:
    """A socket bound to that address alone. reachable: from other machines; a name of this machine that means the loopback here (a line of many
    /etc/hosts) then stands for all addresses. localhost means what it says."""
    family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    if reachable and str(where[0]).startswith("127.") and host not in (where[0], "localhost"):
        where = (EVERYWHERE[0], port)
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
        sock.listen(512)
    except OSError:
        sock.close()
        raise
    return sock


def layouts(engine: EngineConfig, server: ServerConfig, environ: Mapping[str, str]) -> tuple[Layout, ...]:
    """One for each engine of this machine (`--dp`). Raises ConfigError for numbers that do not fit together."""
    check_device(engine, num_engines=server.dp)
    if all(name in environ for name in TORCHRUN) and (environ["WORLD_SIZE"] != "1" or engine.tp > 1):
        return (_from_torchrun(engine, server, environ),)
    if server.nnodes > 1:
        return (_from_options(engine, server),)
    return tuple(local_layout(engine.tp, engine.dist_timeout, index=i, num_engines=server.dp) for i in range(server.dp))


def check_device(engine: EngineConfig, *, num_engines: int = 1) -> None:
    """Raises ConfigError where `--device` is one device and more are needed."""
    num = engine.tp * num_engines
    if ":" in engine.device and num > 1:
        dp = f" --dp {num_engines}" if num_engines > 1 else ""
        raise ConfigError(
            f"--device {engine.device} is one device, and --tp {engine.tp}{dp} take {num}",
            fix=f"--device {engine.device.partition(':')[0]}; CUDA_VISIBLE_DEVICES and its like choose among them",
        )


def refuse_torchrun(engine: EngineConfig, environ: Mapping[str, str]) -> None:
    """Raises ConfigError where each process of torchrun would start all ranks."""
    if engine.tp > 1 and all(name in environ for name in TORCHRUN) and environ["WORLD_SIZE"] != "1":
        raise ConfigError(
            f"torchrun started this process as one of {environ['WORLD_SIZE']} (WORLD_SIZE), and LLM(tp={engine.tp}) starts its ranks itself, in each",
            fix="`python` in place of torchrun; torchrun places ranks of `-m l4core.launch_server`. Where it was not torchrun: "
            f"`unset {' '.join(TORCHRUN)}`",
        )


def local_layout(tp: int, timeout: float, *, index: int = 0, num_engines: int = 1) -> Layout:
    """All ranks on this machine. index: which of its engines."""
    places = tuple(
        Place(rank=rank, size=tp, device=index * tp + rank, num_local=tp * num_engines, timeout=timeout)
        for rank in range(tp)
    )
    return Layout(places=places, listens=tp > 1)


def _from_options(engine: EngineConfig, server: ServerConfig) -> Layout:
    """An equal share of the ranks on each machine, in the machines' order."""
    if engine.tp % server.nnodes:
        raise ConfigError(
            f"--tp {engine.tp} ranks on --nnodes {server.nnodes} machines: wanted as many on each",
            fix=f"--tp {server.nnodes * max(1, engine.tp // server.nnodes)}",
        )
    host, port = split_address(server.dist_init_addr or "")
    if host in EVERYWHERE and server.node_rank:
        raise ConfigError(
            f"--dist-init-addr is {server.dist_init_addr} on machine {server.node_rank}: that is every address of a machine, and none to go to",
            fix=f"--dist-init-addr with an address of machine 0 (`ip addr` there lists them), and port {port}",
        )
    here = engine.tp // server.nnodes
    places = tuple(
        Place(
            rank=server.node_rank * here + index,
            size=engine.tp,
            device=index,
            num_local=here,
            machine=server.node_rank,
            host=host,
            port=port,
            whole=False,
            timeout=engine.dist_timeout,
        )
        for index in range(here)
    )
    return Layout(places=places, listens=server.node_rank == 0)


def _from_torchrun(engine: EngineConfig, server: ServerConfig, environ: Mapping[str, str]) -> Layout:
    """This process is one rank; the store at MASTER_ADDR, which torchrun keeps open, tells the others where rank 0 is."""
    numbers = {name: _number(name, environ[name]) for name in TORCHRUN if name != "MASTER_ADDR"}
    size, local = numbers["WORLD_SIZE"], numbers["LOCAL_WORLD_SIZE"]
    if size != engine.tp:
        raise ConfigError(
            f"torchrun started {size} processes (WORLD_SIZE), and --tp is {engine.tp}",
            fix=f"--tp {size}, or `unset {' '.join(TORCHRUN)}` where it was not torchrun",
        )
    if server.dp > 1 or server.nnodes > 1:
        raise ConfigError("--dp and --nnodes do not go with torchrun, which places the ranks", fix="leave them out")
    in_store = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    place = Place(
        rank=numbers["RANK"],
        size=size,
        device=numbers["LOCAL_RANK"],
        num_local=local,
        machine=int(environ.get("GROUP_RANK", numbers["RANK"] // local)),
        host=environ["MASTER_ADDR"],
        port=numbers["MASTER_PORT"],
        in_store=in_store,
        whole=size == local,
        timeout=engine.dist_timeout,
    )
    return Layout(places=(place,), listens=place.rank == 0 and not in_store)


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(
            f"{name} in the environment is {text!r}; wanted a number, as torchrun sets it",
            fix=f"`unset {' '.join(TORCHRUN)}` where it was not torchrun",
        )
    return int(text)


def split_address(text: str) -> tuple[str, int]:
    """ "host:port" or "[v6]:port" → its parts. Raises ConfigError."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("tcp://").strip("[]")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"--dist-init-addr is {text!r}; wanted HOST:PORT", fix="--dist-init-addr 10.0.0.1:29500")
    return host, int(port)
