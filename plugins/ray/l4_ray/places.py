"""Which rank is where: from the nodes that Ray chose to the environment that torchrun would set for each rank. Knows no ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """One actor. node: Ray's id.  address: of the node, for the others.  devices: indexes of the GPUs that Ray gave it, as the node counts them."""

    node: str
    address: str
    devices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlace:
    """actor: index into the actors that were asked.  environment: beside that of the actor."""

    actor: int
    environment: dict[str, str]


def rank_places(actors: Sequence[Where], port: int) -> list[RankPlace]:
    """By rank. Ranks of a node follow one another, nodes in the order of their first actor. port: free on the node of actor 0, which is rank 0.

    A node's ranks see all GPUs that the node's actors were given, each takes the one of its LOCAL_RANK: neighbours reach each other's memory.
    """
    nodes: dict[str, list[int]] = {}
    for index, actor in enumerate(actors):
        nodes.setdefault(actor.node, []).append(index)
    made: list[RankPlace] = []
    for machine, members in enumerate(nodes.values()):
        devices = [device for index in members for device in actors[index].devices]
        for local, index in enumerate(members):
            environment = {
                "RANK": str(len(made)),
                "WORLD_SIZE": str(len(actors)),
                "LOCAL_RANK": str(local),
                "LOCAL_WORLD_SIZE": str(len(members)),
                "GROUP_RANK": str(machine),
                "MASTER_ADDR": actors[0].address,
                "MASTER_PORT": str(port),
            }
            if devices:
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
            made.append(RankPlace(actor=index, environment=environment))
    return made
