"""What a Serve application of engines was asked for. Knows no ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from l4core.config import EngineConfig, ServerConfig, from_mapping
from l4core.errors import ConfigError

OWN = ("replicas", "nnodes", "cpus", "retry_seconds")
CHOSEN_HERE = ("host", "port", "dp", "node_rank", "dist_init_addr")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What `app` was asked for. options: of `l4 serve`, by name.  nnodes: of one replica.  cpus: of one replica, beside its GPUs.
    retry_seconds: how long a request looks for a replica that answers."""

    options: dict[str, Any]
    engine: EngineConfig
    server: ServerConfig
    replicas: int = 1
    nnodes: int = 1
    cpus: float = 1.0
    retry_seconds: float = 120.0

    @property
    def gpus(self) -> bool:
        """Whether its ranks need GPUs of Ray's counting."""
        return not self.engine.device.startswith("cpu")


def plan_of(arguments: Mapping[str, Any]) -> Plan:
    """arguments: values as they are, or text as the command line has it. Raises ConfigError as `l4 serve` does, and for what Serve decides."""
    values = {name.replace("-", "_"): yaml.safe_load(v) if isinstance(v, str) else v for name, v in arguments.items()}
    own = {name: values.pop(name) for name in OWN if name in values}
    for name in CHOSEN_HERE:
        if name in values:
            raise ConfigError(
                f"{name} is chosen for each replica", fix="leave it out; Serve's HTTP options say where it listens"
            )
    engine, server = from_mapping(values)
    if not engine.model:
        raise ConfigError("no model is named", fix="model=DIR|ID")
    for name, kind in (("replicas", int), ("nnodes", int), ("cpus", (int, float)), ("retry_seconds", (int, float))):
        value = own.get(name, 1)
        if not isinstance(value, kind) or isinstance(value, bool) or value <= 0:
            raise ConfigError(f"{name} is {value!r}; wanted a number above 0")
    plan = Plan(options=values, engine=engine, server=server, **own)
    if plan.nnodes > 1 and engine.tp % plan.nnodes:
        raise ConfigError(f"tp is {engine.tp} and nnodes {plan.nnodes}: wanted as many ranks on each node")
    return plan
