"""A machine (or a torchrun process) without rank 0: starts its ranks, starts them anew when the engine died, and ends with rank 0's server."""

from __future__ import annotations

import asyncio
import collections
import logging
import signal
import time

from l4core.config import EngineConfig, ServerConfig
from l4core.engine.process.messages import Failed, Log, Ready
from l4core.errors import EngineDeadError, L4Error, RankLostError
from l4core.parallel.place import Layout
from l4core.server.bridge import RestartPolicy
from l4core.server.log import configure_logging, log_level
from l4core.server.process import EngineProcess

logger = logging.getLogger(__name__)
REJOIN_SECONDS = 0.5
GRACE_SECONDS = 5.0
"""Beyond the time that rank 0's requests have to finish."""


class Node:
    """`run` once. factory, policy: another engine and other restart limits, for tests."""

    def __init__(
        self,
        engine_config: EngineConfig,
        server_config: ServerConfig,
        layout: Layout,
        *,
        factory: str | None = None,
        policy: RestartPolicy | None = None,
    ) -> None:
        self._engine_config, self._server_config, self._layout = engine_config, server_config, layout
        self._factory = factory
        self._policy = policy or RestartPolicy()
        self._deaths: collections.deque[float] = collections.deque()
        self._stopping, self._at_once = asyncio.Event(), asyncio.Event()
        self._is_ready = self._was_ready = False

    async def run(self) -> None:
        """Until rank 0's server ends on purpose, or some time after SIGTERM (at once after a second).

        Raises the L4Error that kept the ranks from starting, or EngineDeadError when ranks of this machine died too often.
        """
        configure_logging(self._server_config)
        for sig in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(sig, self._stop)
        stopping = asyncio.create_task(self._stopping.wait(), name="stopping")
        while not self._stopping.is_set():
            process = await EngineProcess.spawn(
                self._engine_config,
                log_level=log_level(self._server_config),
                factory=self._factory,
                places=self._layout.places,
            )
            self._is_ready = False
            talk = asyncio.create_task(self._listen(process), name="ranks")
            await asyncio.wait({talk, stopping}, return_when=asyncio.FIRST_COMPLETED)
            await self._drain(talk)
            ending = await process.stop()
            words = await talk
            if self._stopping.is_set():
                return
            if words is None and ending.endswith("exit status 0"):
                logger.info("the engine was shut down")
                return
            self._judge(words or EngineDeadError(f"the engine process {ending}"))
            await asyncio.wait({stopping}, timeout=REJOIN_SECONDS)

    def _stop(self) -> None:
        if self._stopping.is_set():
            self._at_once.set()
        self._stopping.set()

    async def _drain(self, talk: asyncio.Task[L4Error | None]) -> None:
        """Rank 0 may have been told to end as well (torchrun and Kubernetes tell all at once), and its requests still need these ranks."""
        if talk.done() or not self._is_ready:
            return
        seconds = self._server_config.drain_seconds + GRACE_SECONDS
        logger.info(
            "%s: waiting for rank 0's server to end, at most %g s; a second signal ends at once", self._names(), seconds
        )
        at_once = asyncio.create_task(self._at_once.wait(), name="at-once")
        await asyncio.wait({talk, at_once}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        at_once.cancel()

    async def _listen(self, process: EngineProcess) -> L4Error | None:
        """Until the ranks are gone → why, if one said so."""
        words: L4Error | None = None
        try:
            while (message := await process.receive()) is not None:
                if isinstance(message, Ready):
                    self._is_ready = self._was_ready = True
                    logger.info("%s: ready", self._names())
                elif isinstance(message, Log):
                    logging.getLogger(message.name).log(message.level, "%s", message.text)
                elif isinstance(message, Failed):
                    words = message.error()
        except EngineDeadError as error:
            words = error
        return words

    def _judge(self, words: L4Error) -> None:
        """Log and go on, or raise. What happened to ranks of other machines is no fault of these: they wait for the engine to come back."""
        if isinstance(words, RankLostError):
            logger.warning("%s\n%s: starting again", words, self._names())
            return
        if not self._was_ready and not isinstance(words, EngineDeadError):
            raise words
        logger.error("%s", words)
        now = time.monotonic()
        self._deaths.append(now)
        while now - self._deaths[0] > self._policy.window_seconds:
            self._deaths.popleft()
        if len(self._deaths) > self._policy.max_restarts:
            raise EngineDeadError(f"{self._names()} died {len(self._deaths)} times; giving up")

    def _names(self) -> str:
        ranks = [place.rank for place in self._layout.places]
        return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}–{ranks[-1]}"
