"""The ASGI application, and `serve`, which runs it. Reading order: lifecycle.py for the process, openai.py for the routes."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Awaitable, Callable

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route as StarletteRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from l4core.config import EngineConfig, ServerConfig
from l4core.parallel.place import layouts
from l4core.server.failures import error_response, handle
from l4core.server.lifecycle import Serving
from l4core.server.metrics import Metrics
from l4core.server.node import Node
from l4core.server.openai import Route, routes
from l4core.server.openapi import describe
from l4core.server.security import KeyCheck
from l4core.server.service import Service

ROUTE = "l4.route"
UNMATCHED = "unmatched"
CLIENT_GONE = 499


def serve(
    engine_config: EngineConfig,
    server_config: ServerConfig,
    *,
    on_ready: Callable[[str], None] | None = None,
    factory: str | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain and return. on_ready: called with the address once the model answers.  factory: "module:function"
    that builds another engine, for tests.

    A machine without rank 0 (`--node-rank`, torchrun) computes with the one that has it, and serves nothing.
    Raises ConfigError when the address is taken, the L4Error that kept the engine from starting, or EngineDeadError when it died too often.
    """
    placed = layouts(engine_config, server_config, os.environ)
    if not placed[0].serves:
        asyncio.run(Node(engine_config, server_config, placed[0], factory=factory).run())
        return
    serving = Serving(
        engine_config, server_config, build_app=build_app, on_ready=on_ready, factory=factory, layouts=placed
    )
    asyncio.run(serving.run())


def build_app(service: Service, key: str | None) -> ASGIApp:
    """All routes of the table, behind the key check (key None: no check)."""
    document = b""

    async def openapi(_: Service, http: Request) -> Response:
        return Response(document, media_type="application/json")

    table = routes(openapi)
    document = msgspec.json.encode(describe(table))
    app = Starlette(
        routes=[
            StarletteRoute(_starlette_path(r.path), _endpoint(r, service), methods=[r.method], name=r.path)
            for r in table
        ],
        exception_handlers={HTTPException: handle, Exception: handle},
    )
    app.router.redirect_slashes = False  # a redirect would be made from the Host header
    return _CountReplies(KeyCheck(app, key), service.metrics)


def _starlette_path(path: str) -> str:
    """A path parameter may hold slashes: model names do."""
    return re.sub(r"{(\w+)}", r"{\1:path}", path)


def _endpoint(route: Route, service: Service) -> Callable[[Request], Awaitable[Response]]:
    async def call(http: Request) -> Response:
        http.scope[ROUTE] = route.path
        try:
            return await route.handler(service, http)
        except ClientDisconnect:
            return Response(status_code=CLIENT_GONE)
        except Exception as error:  # noqa: BLE001  (one request's failure ends that request; failures.py logs what is not explained)
            return error_response(error)

    return call


class _CountReplies:
    """ASGI middleware: every reply, by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.replied(scope.get(ROUTE, UNMATCHED), message["status"])
            await send(message)

        await self._app(scope, receive, counted)
