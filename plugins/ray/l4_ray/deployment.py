"""Replicas behind Ray Serve: `serve run l4_ray:app model=DIR replicas=2 tp=1`, or `serve.run(l4_ray.app({...}))` from Python.

Each Replica is one engine with its own `l4 serve`; the Gate takes requests from Serve's proxy, hands each to a replica and, until its answer has
begun, to another one when that is lost. Which replica: Serve's router says. When the engine of a replica dies, so does the replica, and Serve starts
another: nobody is sent to one that is loading.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncGenerator, Mapping
from typing import Any
from urllib.parse import quote

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve import Application
from ray.serve.exceptions import ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from l4_ray.plan import Plan, plan_of
from l4_ray.ranks import PlacedRanks, RankLostError, bundles
from l4_ray.replica import Health, LocalServer, key_environment, serve_arguments
from l4_ray.retry import Ask, Part, ReplicaLostError, ask_until_answered

logger = logging.getLogger("ray.serve")
WATCH_SECONDS = 0.5
LAST_WORDS_SECONDS = 1.0
GATE_REQUESTS = 100_000
HEALTH_PERIOD_SECONDS = 2.0
GATE_CPUS = 0.5


class Replica:
    """One engine and its server."""

    async def __init__(self, plan: Plan) -> None:  # type: ignore[misc]  # Serve awaits it
        """Until the model is loaded. What keeps it from that is in the error, with the last lines that `l4 serve` printed."""
        self._lost = ""
        self._ranks: Any = None
        if plan.nnodes == 1:
            self._server = LocalServer.start(plan.options)
        else:
            self._server = LocalServer(await asyncio.to_thread(self._place, plan))
        await self._server.wait_until_ready(self._check_ranks)
        self._watching = asyncio.create_task(self._watch(), name="l4-watch")

    async def forward(self, ask: Ask) -> AsyncGenerator[Part, None]:
        """The exchange with its server. Raises ReplicaLostError."""
        async with contextlib.aclosing(self._server.forward(ask)) as parts:
            async for part in parts:
                yield part

    def check_health(self) -> None:
        """Asked by Serve."""
        if self._lost:
            raise RuntimeError(self._lost)

    async def _watch(self) -> None:
        """Once its engine is gone the replica is: what it had in hand gets its errors, then the process ends, and Serve starts another."""
        while not self._lost:
            await asyncio.sleep(WATCH_SECONDS)
            if await self._server.look() is Health.DEAD:
                self._lost = "its engine is gone"
            try:
                await asyncio.to_thread(self._check_ranks)
            except RankLostError as error:
                self._lost = str(error)
        logger.error("this replica ends: %s", self._lost)
        await asyncio.sleep(LAST_WORDS_SECONDS)
        os._exit(1)

    def _place(self, plan: Plan) -> str:
        """Ranks on the nodes of this replica's placement group → the address of rank 0's server."""
        from ray.util.placement_group import get_current_placement_group

        options = {name: value for name, value in plan.options.items() if name != "nnodes"}
        self._ranks = PlacedRanks.place(
            plan.engine.tp,
            serve_arguments(options),
            nodes=plan.nnodes,
            gpus=plan.gpus,
            group=get_current_placement_group(),
            environment=key_environment(options),
        )
        return str(self._ranks.start())

    def _check_ranks(self) -> None:
        if self._ranks is not None:
            self._ranks.check()


class Gate:
    """Where requests come in."""

    def __init__(self, replica: DeploymentHandle[Any], patience: float) -> None:
        """patience: seconds for a request to find a replica that answers."""
        self._replica = replica.options(stream=True, method_name="forward")
        self._patience = patience

    async def __call__(self, request: Request) -> Response:
        """Any route of `l4 serve`."""
        scope = request.scope
        ask = Ask(
            method=request.method,
            path=quote(scope["path"].removeprefix(scope.get("root_path", "")) or "/"),
            query=scope.get("query_string", b"").decode("latin-1"),
            headers=tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]),
            body=await request.body(),
        )
        answer = await ask_until_answered(ask, self._attempt, patience=self._patience)
        response = StreamingResponse(answer.body, status_code=answer.head.status)
        response.raw_headers = [(n.lower().encode("latin-1"), v.encode("latin-1")) for n, v in answer.head.headers]
        return response

    async def _attempt(self, ask: Ask) -> AsyncGenerator[Part, None]:
        parts = self._replica.remote(ask)
        try:
            async for part in parts:
                yield part
        except ReplicaLostError:
            raise
        except RayTaskError:  # a mistake of ours in the replica: another one would make it too
            raise
        except (RayError, ReplicaUnavailableError) as error:
            raise ReplicaLostError(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
        finally:
            parts.cancel()  # nothing, where it has ended; else the replica hangs up and its engine stops


def app(arguments: Mapping[str, Any]) -> Application:
    """What `serve run` and `serve.run` take. arguments: `model` and any option of `l4 serve` by name, and those of Plan."""
    plan = plan_of(arguments)
    ranks = bundles(plan.engine.tp, plan.nnodes, gpus=plan.gpus)[0] if plan.nnodes > 1 else None
    place: dict[str, Any] = {"ray_actor_options": {"num_cpus": plan.cpus}}
    if ranks is None:
        place["ray_actor_options"]["num_gpus"] = plan.engine.tp if plan.gpus else 0
    else:  # the replica itself sits beside the first node's ranks
        first = ranks[0] | {"CPU": ranks[0]["CPU"] + plan.cpus}
        place |= {"placement_group_bundles": [first, *ranks[1:]], "placement_group_strategy": "STRICT_SPREAD"}
    replica = serve.deployment(
        Replica,
        name="l4",
        num_replicas=plan.replicas,
        max_ongoing_requests=plan.server.max_queued_requests,
        health_check_period_s=HEALTH_PERIOD_SECONDS,
        **place,
    )
    gate = serve.deployment(
        Gate, name="gate", max_ongoing_requests=GATE_REQUESTS, ray_actor_options={"num_cpus": GATE_CPUS}
    )
    made: Application = gate.bind(replica.bind(plan), plan.retry_seconds)
    return made
