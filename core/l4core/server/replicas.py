"""Several engines of one model behind one server (`--dp`): each request goes to the least loaded, each engine dies and comes back alone."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Protocol

from l4core.engine.process.messages import Ready
from l4core.errors import EngineDeadError, RequestError
from l4core.request import Request, SequenceUpdate, StepOutput, StepStats
from l4core.server.bridge import Bridge, EngineState, Observer, full, not_ready

logger = logging.getLogger(__name__)


class Updates(Protocol):
    """What is said of the requests of one HTTP call (`bridge.UpdateStream`)."""

    async def next(self) -> list[SequenceUpdate]: ...
    def stop(self, request_id: str) -> None: ...
    def close(self) -> None: ...


class Engines(Protocol):
    """What the server asks of its engine: a `Bridge` to one, or `Replicas`."""

    @property
    def state(self) -> EngineState: ...
    @property
    def num_active(self) -> int: ...
    @property
    def num_ready(self) -> int: ...
    @property
    def pid(self) -> int | None: ...
    async def start(self) -> Ready: ...
    async def run(self) -> None: ...
    def submit(self, requests: Sequence[Request]) -> Updates: ...
    def flush_cache(self) -> None: ...
    def shut(self, error: RequestError) -> None: ...
    async def close(self) -> None: ...


class Replicas:
    """Bridges to engines of one model. max_sequences: of all together."""

    def __init__(self, bridges: Sequence[Bridge], *, max_sequences: int) -> None:
        self.bridges = bridges
        self._max_sequences = max_sequences

    @property
    def state(self) -> EngineState:
        """READY as soon as one is."""
        states = {bridge.state for bridge in self.bridges}
        order = (EngineState.READY, EngineState.STARTING, EngineState.RESTARTING, EngineState.STOPPED)
        return next(state for state in order if state in states)

    @property
    def num_active(self) -> int:
        return sum(bridge.num_active for bridge in self.bridges)

    @property
    def num_ready(self) -> int:
        return sum(bridge.num_ready for bridge in self.bridges)

    @property
    def pid(self) -> int | None:
        """Of the first."""
        return self.bridges[0].pid

    async def start(self) -> Ready:
        """All of them. Raises the error of one that could not be started; `close` ends the others."""
        loaded = await asyncio.gather(*(bridge.start() for bridge in self.bridges))
        line = f"{'engines':<16}{len(loaded)}, each with devices of its own · the least loaded gets the next request"
        return Ready(
            report=[*loaded[0].report, line],
            folder=loaded[0].folder,
            context_length=min(ready.context_length for ready in loaded),
        )

    async def run(self) -> None:
        """Until `close`. An engine that dies too often is given up, the others go on; raises EngineDeadError when none is left."""
        endings = await asyncio.gather(*(self._run(bridge) for bridge in self.bridges))
        errors = [error for error in endings if error is not None]
        if len(errors) == len(self.bridges):
            raise errors[0]

    def submit(self, requests: Sequence[Request]) -> Updates:
        """To the engine with the fewest sequences. Should that one die before it has said anything, the next one gets them.

        Raises RequestError: 429 full now, 503 no engine now.
        """
        if self.num_active + len(requests) > self._max_sequences:
            raise full(self.num_active, self._max_sequences)
        return _Rerouted(self, requests)

    def least_loaded(self) -> Bridge:
        """Raises RequestError (503) where none is ready."""
        ready = [bridge for bridge in self.bridges if bridge.state is EngineState.READY]
        if not ready:
            raise not_ready(self.state)
        return min(ready, key=lambda bridge: bridge.num_active)

    def flush_cache(self) -> None:
        self.least_loaded()
        for bridge in self.bridges:
            if bridge.state is EngineState.READY:  # one that starts has nothing cached
                bridge.flush_cache()

    def shut(self, error: RequestError) -> None:
        for bridge in self.bridges:
            bridge.shut(error)

    async def close(self) -> None:
        await asyncio.gather(*(bridge.close() for bridge in self.bridges))

    async def _run(self, bridge: Bridge) -> EngineDeadError | None:
        try:
            await bridge.run()
        except EngineDeadError as error:
            logger.error("an engine is given up, %d are left: %s", self._num_alive(), error)
            return error
        return None

    def _num_alive(self) -> int:
        return sum(bridge.state is not EngineState.STOPPED for bridge in self.bridges)


class _Rerouted:
    """Updates of requests that another engine takes over when theirs dies before the first."""

    def __init__(self, replicas: Replicas, requests: Sequence[Request]) -> None:
        self._replicas, self._requests = replicas, requests
        self._stream = replicas.least_loaded().submit(requests)
        self._has_begun = False

    async def next(self) -> list[SequenceUpdate]:
        while True:
            try:
                updates = await self._stream.next()
            except EngineDeadError:
                if self._has_begun or self._replicas.state is not EngineState.READY:
                    raise
                self._stream = self._replicas.least_loaded().submit(self._requests)
                continue
            self._has_begun = True
            return updates

    def stop(self, request_id: str) -> None:
        self._stream.stop(request_id)

    def close(self) -> None:
        self._stream.close()


class OneOfMany:
    """Observer of one engine, for an observer of all: gauges are of all engines, sums but for the guesses, which are a mean over sequences."""

    def __init__(self, observer: Observer, latest: Latest, index: int) -> None:
        self._observer, self._latest, self._index = observer, latest, index

    def submitted(self, requests: Sequence[Request]) -> None:
        self._observer.submitted(requests)

    def stepped(self, output: StepOutput) -> None:
        self._latest.put(self._index, output.stats)
        self._observer.stepped(StepOutput(updates=output.updates, stats=self._latest.of_all(output.stats)))

    def dropped(self, request_ids: Iterable[str]) -> None:
        self._observer.dropped(request_ids)

    def stopped(self, request_id: str) -> None:
        self._observer.stopped(request_id)

    def lost(self) -> None:
        """The others go on: their gauges are shown again, though none has made a step."""
        self._latest.drop(self._index)
        self._observer.lost()
        self._observer.stepped(StepOutput(stats=self._latest.of_all(StepStats())))

    def restarted(self) -> None:
        self._observer.restarted()


class Latest:
    """What each engine said last. Shared by the observers of all."""

    def __init__(self) -> None:
        self._stats: dict[int, StepStats] = {}
        self._decoded: dict[int, StepStats] = {}  # the last with decodes

    def put(self, index: int, stats: StepStats) -> None:
        self._stats[index] = stats
        if stats.num_guesses is not None:
            self._decoded[index] = stats

    def drop(self, index: int) -> None:
        """This engine is gone, and what it held with it."""
        self._stats.pop(index, None)
        self._decoded.pop(index, None)

    def of_all(self, own: StepStats) -> StepStats:
        """`own` with the gauges of all engines; its counters are those of this step."""
        stats = self._stats.values()
        pages: dict[str, Counter[str]] = {"pages_used": Counter(), "pages_total": Counter(), "pages_cached": Counter()}
        for one in stats:
            for name, counts in pages.items():
                counts.update(getattr(one, name))
        return replace(
            own,
            num_running=sum(one.num_running for one in stats),
            num_waiting=sum(one.num_waiting for one in stats),
            num_guesses=self._num_guesses(),
            pages_used=pages["pages_used"],
            pages_total=pages["pages_total"],
            pages_cached=pages["pages_cached"],
        )

    def _num_guesses(self) -> float | None:
        """For a sequence, whichever engine it is in."""
        num_sequences = sum(one.num_decode_tokens for one in self._decoded.values())
        num_guesses = sum(one.num_decode_tokens * (one.num_guesses or 0) for one in self._decoded.values())
        return num_guesses / num_sequences if num_sequences else None
