"""The ranks of one engine over the nodes of a Ray cluster: a placement group, an actor for each rank, and in each actor the `l4 serve` process that
torchrun would have started there. Rank 0's answers HTTP; the ranks find each other at its node's address.
"""

from __future__ import annotations

import logging
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from l4_ray.places import Where, rank_places
from l4_ray.process import LeashedProcess, free_port
from l4core.errors import L4Error

logger = logging.getLogger(__name__)
CALL_SECONDS = 30.0
PLACE_SECONDS = 600.0
LOOK_SECONDS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Of a rank's process. started: it was.  code: its exit status, None while it runs.  last_lines: that it printed."""

    started: bool
    code: int | None = None
    last_lines: str = ""

    @property
    def runs(self) -> bool:
        return self.started and self.code is None


class RankActor:
    """Where a rank's process lives. Ray starts it anew where it can, without its process: its owner sees `started` false, and starts that again."""

    def __init__(self) -> None:
        self._process: LeashedProcess | None = None

    def where(self) -> Where:
        context = ray.get_runtime_context()
        devices = tuple(str(device) for device in context.get_accelerator_ids().get("GPU", []))
        return Where(node=context.get_node_id(), address=ray.util.get_node_ip_address(), devices=devices)

    def free_port(self, host: str) -> int:
        return free_port(host)

    def start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self.stop()
        self._process = LeashedProcess(arguments, environment)

    def state(self) -> State:
        if self._process is None:
            return State(started=False)
        code = self._process.code
        return State(started=True, code=code, last_lines=self._process.last_lines if code is not None else "")

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop()
            self._process = None


def bundles(size: int, nodes: int | None, *, gpus: bool) -> tuple[list[dict[str, float]], str]:
    """(bundles, strategy) for `size` ranks: one bundle a rank, packed; or an equal share on each of `nodes` nodes. ValueError where that is none."""
    if nodes is None:
        return [_resources(1, gpus=gpus)] * size, "PACK"
    if size % nodes:
        raise ValueError(f"{size} ranks on {nodes} nodes: wanted as many on each")
    return [_resources(size // nodes, gpus=gpus)] * nodes, "STRICT_SPREAD"


def _resources(ranks: int, *, gpus: bool) -> dict[str, float]:
    return {"CPU": float(ranks)} | ({"GPU": float(ranks)} if gpus else {})


def _wait_for_room(group: PlacementGroup, wanted: Sequence[Mapping[str, float]]) -> None:
    """A cluster may grow. Raises L4Error when it has not within PLACE_SECONDS."""
    needed = {kind: sum(bundle.get(kind, 0) for bundle in wanted) for kind in wanted[0]}
    there = ray.cluster_resources()
    text = ", ".join(f"{number:g} {kind} (the cluster has {there.get(kind, 0):g})" for kind, number in needed.items())
    if any(there.get(kind, 0) < number for kind, number in needed.items()):
        logger.warning("waiting for room: %s on %d bundles", text, len(wanted))
    try:
        ray.get(group.ready(), timeout=PLACE_SECONDS)
    except GetTimeoutError as error:
        remove_placement_group(group)
        raise L4Error(
            f"Ray found no room for the ranks within {PLACE_SECONDS:g} s: {text}, in {len(wanted)} bundles",
            fix="fewer ranks (--tp), other nodes (--nnodes), or --device cpu where there are no GPUs",
        ) from error


class RankLostError(Exception):
    """A rank's process or actor is gone. rank: which; the message says how it ended."""

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(message)
        self.rank = rank


class PlacedRanks:
    """The ranks of one engine. Not thread-safe."""

    def __init__(
        self,
        actors: Sequence[Any],
        arguments: Sequence[str],
        environment: Mapping[str, str],
        group: PlacementGroup | None,
    ) -> None:
        """actors: handles of RankActor.  arguments, environment: of `l4`, the same for all ranks.  group: removed with them."""
        self._actors = actors
        self._arguments = arguments
        self._environment = environment
        self._group = group
        self._starts: list[tuple[Any, list[str], dict[str, str]]] = []

    @classmethod
    def place(
        cls,
        size: int,
        arguments: Sequence[str],
        *,
        gpus: bool,
        nodes: int | None = None,
        group: PlacementGroup | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> PlacedRanks:
        """Actors in a placement group of their own, or in one that has a bundle for each node. Waits until there is room.

        arguments: `serve` and its options, without those that say where ranks, host and port are.
        """
        wanted, strategy = bundles(size, nodes, gpus=gpus)
        own = placement_group(wanted, strategy=strategy) if group is None else None
        if own is not None:
            _wait_for_room(own, wanted)
        kind = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0, max_restarts=-1)(RankActor)
        share = size // len(wanted)

        def place(rank: int) -> PlacementGroupSchedulingStrategy:
            return PlacementGroupSchedulingStrategy(own or group, placement_group_bundle_index=rank // share)

        actors = [kind.options(scheduling_strategy=place(rank)).remote() for rank in range(size)]
        return cls(actors, arguments, environment or {}, own)

    def start(self, host: str | None = None, port: int | None = None) -> str:
        """Find where the actors are and start all ranks → the address of the server. host, port: where it listens [rank 0's node, a free one]."""
        found: list[Where] = ray.get([actor.where.remote() for actor in self._actors], timeout=PLACE_SECONDS)
        first, address = self._actors[0], found[0].address
        meeting = ray.get(first.free_port.remote(address), timeout=CALL_SECONDS)
        port = port or ray.get(first.free_port.remote(host or address), timeout=CALL_SECONDS)
        arguments = [*self._arguments, "--host", host or address, "--port", str(port)]
        places = rank_places(found, meeting)
        self._starts = [(self._actors[p.actor], arguments, {**self._environment, **p.environment}) for p in places]
        ray.get([self._start(rank) for rank in range(len(places))], timeout=CALL_SECONDS)
        logger.info("%d ranks on %d nodes meet at %s:%d", len(places), len({w.node for w in found}), address, meeting)
        return f"http://{address if host in (None, '0.0.0.0') else host}:{port}"

    def check(self) -> None:
        """Raises RankLostError for the first rank that is not running."""
        for rank, (actor, _, _) in enumerate(self._starts):
            try:
                state: State = ray.get(actor.state.remote(), timeout=CALL_SECONDS)
            except RayError as error:
                raise RankLostError(rank, f"the actor of rank {rank} is gone: {type(error).__name__}") from error
            if not state.started:
                raise RankLostError(rank, f"the actor of rank {rank} was started anew")
            if state.code is not None:
                raise RankLostError(rank, f"rank {rank} ended with exit status {state.code}:\n{state.last_lines}")

    def wait_until_ready(self, url: str) -> None:
        """Until the server there is healthy. Raises RankLostError for a rank that ends instead: what kept it from starting would do so again."""
        while True:
            self.check()
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=5) as reply:  # 503 raises, too
                    if reply.status == 200:
                        return
            except OSError:
                time.sleep(LOOK_SECONDS)

    def start_one(self, rank: int) -> None:
        """Any rank but 0 joins those that are there."""
        ray.get(self._start(rank), timeout=PLACE_SECONDS)

    def stop(self) -> None:
        """End the processes; the actors stay."""
        stopping = [actor.stop.remote() for actor in self._actors]
        for one in stopping:
            try:
                ray.get(one, timeout=CALL_SECONDS)
            except RayError as error:
                logger.warning("a rank's actor did not answer: %s", type(error).__name__)

    def close(self) -> None:
        """End processes and actors, give the room back."""
        self.stop()
        for actor in self._actors:
            ray.kill(actor)
        if self._group is not None:
            remove_placement_group(self._group)

    def _start(self, rank: int) -> Any:
        actor, arguments, environment = self._starts[rank]
        return actor.start.remote(arguments, environment)


def supervise(ranks: PlacedRanks, start: Callable[[], str], *, restarts: int = 10) -> None:
    """Starts again what is gone, the n-th time after n - 1 seconds and at most `restarts` times, then raises RankLostError. start: of all ranks, for
    when rank 0 is gone, since the others look for it where it was."""
    used = 0
    while True:
        time.sleep(LOOK_SECONDS)
        try:
            ranks.check()
        except RankLostError as lost:
            if used == restarts:
                raise
            used += 1
            time.sleep(used - 1)
            logger.warning("%s; starting %s again (%d of %d)", lost, "all" if lost.rank == 0 else "it", used, restarts)
            if lost.rank == 0:
                ranks.stop()
                logger.warning("all ranks were started again: %s", start())
            else:
                ranks.start_one(lost.rank)
