"""The life of the server process: listen, start the engine, announce, serve, drain, end. Knows nothing of routes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import uvicorn
from starlette.types import ASGIApp

from l4core.config import EngineConfig, ServerConfig
from l4core.errors import RequestError
from l4core.parallel.place import Layout
from l4core.server.bridge import Bridge, RestartPolicy
from l4core.server.listen import address, is_loopback, listen
from l4core.server.log import configure_logging, log_level
from l4core.server.metrics import Metrics
from l4core.server.replicas import Engines, Latest, OneOfMany, Replicas
from l4core.server.security import resolve_key
from l4core.server.service import Loaded, Service, load_frontend, model_name

BACKLOG = 2048
KEEP_ALIVE_SECONDS = 30
MAX_HEADER_BYTES = 65_536
LAST_WRITES_SECONDS = 5.0

logger = logging.getLogger(__name__)


class _Http(uvicorn.Server):
    """uvicorn without its signal handlers: it would end the process by the signal, and ours drain first and end it with 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Serving:
    """One server from start to end. `run` once; `stop` from a signal handler or another thread.

    layouts: the ranks of each engine.  factory, policy: another engine and other restart limits, for tests.
    """

    def __init__(
        self,
        engine_config: EngineConfig,
        server_config: ServerConfig,
        *,
        build_app: Callable[[Service, str | None], ASGIApp],
        on_ready: Callable[[str], None] | None = None,
        factory: str | None = None,
        policy: RestartPolicy | None = None,
        layouts: Sequence[Layout] = (Layout(),),
    ) -> None:
        self._engine_config = engine_config
        self._server_config = server_config
        self._key = resolve_key(server_config.api_key, os.environ)
        self._on_ready = on_ready
        metrics = Metrics(model_name(engine_config))
        self.bridge = self._engines(metrics, factory, policy, layouts)
        self._service = Service(engine_config, server_config, bridge=self.bridge, metrics=metrics)
        self._http = _Http(_uvicorn_config(build_app(self._service, self._key), server_config))
        self._num_stops = 0
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Until `stop`. Raises ConfigError when the address is taken, or the engine's L4Error."""
        configure_logging(self._server_config)
        sockets = listen(self._server_config.host, self._server_config.port, backlog=BACKLOG)
        url = address(self._server_config.host, sockets[0])
        self._handle_signals()
        http = asyncio.create_task(self._http.serve(sockets=sockets), name="http")
        engine = asyncio.create_task(self._run_engine(url), name="engine")
        stopping = asyncio.create_task(self._stopping.wait(), name="stopping")
        try:
            await asyncio.wait({http, engine, stopping}, return_when=asyncio.FIRST_COMPLETED)
            await self._drain(http, engine)
        finally:
            stopping.cancel()
            failure = engine.exception() if engine.done() and not engine.cancelled() else None
            engine.cancel()
            await self.bridge.close()
            await asyncio.gather(engine, stopping, return_exceptions=True)
        if failure is not None:
            raise failure

    def stop(self) -> None:
        """Drain and end; called again: end at once. From the event loop's own thread."""
        self._num_stops += 1
        if self._num_stops > 1:
            self._end_requests()
        self._stopping.set()

    async def _run_engine(self, url: str) -> None:
        ready = await self.bridge.start()
        frontend = await asyncio.to_thread(load_frontend, self._engine_config, ready)
        self._service.loaded_model = Loaded(
            frontend=frontend, context_length=ready.context_length, created=int(time.time())
        )
        self._announce(ready.report, url)
        await self.bridge.run()

    def _engines(
        self, metrics: Metrics, factory: str | None, policy: RestartPolicy | None, layouts: Sequence[Layout]
    ) -> Engines:
        latest = Latest()
        bridges = [
            Bridge(
                self._engine_config,
                max_sequences=self._server_config.max_queued_requests,
                observer=metrics if len(layouts) == 1 else OneOfMany(metrics, latest, index),
                step_timeout=self._server_config.watchdog_timeout,
                log_level=log_level(self._server_config),
                factory=factory,
                policy=policy,
                layout=layout,
            )
            for index, layout in enumerate(layouts)
        ]
        if len(bridges) == 1:
            return bridges[0]
        return Replicas(bridges, max_sequences=self._server_config.max_queued_requests)

    def _announce(self, report: Sequence[str], url: str) -> None:
        """The start-up block, on stdout."""
        lines = [*report, f"{'address':<16}{url}"]
        if self._key is None and not is_loopback(self._server_config.host):
            lines.append(f"{'key':<16}none: whoever reaches this address may use the model (--api-key sets one)")
        print("\n".join(lines), flush=True)
        if self._on_ready is not None:
            self._on_ready(url)

    async def _drain(self, http: asyncio.Task[None], engine: asyncio.Task[None]) -> None:
        """No new connections, no new requests; what runs may finish until the deadline."""
        self._service.draining = True
        self._http.should_exit = True
        seconds = 0.0 if engine.done() else self._server_config.drain_seconds
        if self.bridge.num_active:
            logger.info("draining %d sequences, at most %g s", self.bridge.num_active, seconds)
        deadline = asyncio.get_running_loop().call_later(seconds, self._end_requests)
        await http
        deadline.cancel()

    def _end_requests(self) -> None:
        self.bridge.shut(RequestError("the server is shutting down", status=503, code="draining"))

    def _handle_signals(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        loop = asyncio.get_running_loop()
        for sig in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sig, self.stop)


def _uvicorn_config(app: ASGIApp, config: ServerConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="info" if config.log_level == "debug" else "warning",
        access_log=config.log_level == "debug",
        proxy_headers=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=math.ceil(config.drain_seconds + LAST_WRITES_SECONDS),
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
    )
