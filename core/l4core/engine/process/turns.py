"""One engine on several ranks: rank 0 tells the others what goes into each step before it makes it, and every rank makes the same one.

The scheduler is deterministic and reads no clock, so equal inboxes give equal batches. Each turn carries a checksum of what rank 0 scheduled and
drew in the step before; a rank that did otherwise ends all, with the step's number.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
from typing import Protocol

import msgspec

from l4core.engine.batch import ScheduledBatch
from l4core.engine.inbox import Inbox
from l4core.engine.process.messages import Submit
from l4core.engine.schedule.step_costs import StepCosts
from l4core.errors import EngineDeadError
from l4core.parallel.connect import Crew
from l4core.request import Request, StepOutput

NOTHING = 0
"""The checksum before the first step."""


class RankedEngine(Protocol):
    """What is asked of an engine; `engine.engine.Engine` is one. launched: the batch that the last step put on its way."""

    @property
    def has_work(self) -> bool: ...
    @property
    def launched(self) -> ScheduledBatch | None: ...
    def check(self, request: Request) -> object: ...
    def step(self, inbox: Inbox) -> StepOutput: ...
    def abort(self, request_ids: Sequence[str]) -> None: ...


class Turn(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True, kw_only=True):
    """What rank 0 says before a step. number: of the step, from 1.  checksum: of rank 0's step before.  aborts_only: no step, `abort` these.
    last: no step, the engine ends."""

    number: int
    checksum: int
    submit: Submit | None = None
    step_costs: StepCosts | None = None
    num_drafts: int | None = None
    draft_reads: bool = True
    aborts_only: bool = False
    last: bool = False

    @classmethod
    def of(cls, inbox: Inbox, number: int, checksum: int) -> Turn:
        is_news = bool(inbox.requests or inbox.aborts or inbox.flush_cache)
        return cls(
            number=number,
            checksum=checksum,
            submit=Submit.of(inbox) if is_news else None,
            step_costs=inbox.step_costs,
            num_drafts=inbox.num_drafts,
            draft_reads=inbox.draft_reads,
        )

    def inbox(self) -> Inbox:
        """What `of` was given."""
        news = Inbox() if self.submit is None else self.submit.inbox()
        return Inbox(
            requests=news.requests,
            aborts=news.aborts,
            flush_cache=news.flush_cache,
            step_costs=self.step_costs,
            num_drafts=self.num_drafts,
            draft_reads=self.draft_reads,
        )


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Turn] = msgspec.msgpack.Decoder(Turn)


class LeadEngine:
    """Rank 0's engine, for whoever steps it: the other ranks make each of its steps too."""

    def __init__(self, engine: RankedEngine, crew: Crew) -> None:
        self._engine, self._crew = engine, crew
        self._number, self._checksum = 0, NOTHING

    @property
    def has_work(self) -> bool:
        return self._engine.has_work

    def check(self, request: Request) -> object:
        return self._engine.check(request)

    def step(self, inbox: Inbox) -> StepOutput:
        self._number += 1
        self._crew.send(_encoder.encode(Turn.of(inbox, self._number, self._checksum)))
        with self._crew.watchdog.step():
            output = self._engine.step(inbox)
        self._checksum = checksum(self._engine.launched, output)
        return output

    def abort(self, request_ids: Sequence[str]) -> None:
        turn = Turn(number=self._number, checksum=self._checksum, submit=_aborts(request_ids), aborts_only=True)
        self._crew.send(_encoder.encode(turn))
        self._engine.abort(request_ids)

    def close(self) -> None:
        """The others end."""
        self._crew.watchdog.stop()
        self._crew.send(_encoder.encode(Turn(number=self._number, checksum=self._checksum, last=True)))


def follow(engine: RankedEngine, crew: Crew) -> None:
    """Another rank's loop, until rank 0 ends it. Raises EngineDeadError when this rank did something else than rank 0 in a step."""
    own = NOTHING
    while True:
        turn = _decoder.decode(crew.receive())
        if turn.checksum != own:
            number = turn.number - (not turn.aborts_only and not turn.last)
            raise EngineDeadError(
                f"step {number} was not the same on {crew.place} and rank 0: they scheduled or drew different tokens",
                fix="report it, with the start-up block and the requests; results of this engine cannot be trusted",
            )
        if turn.last:
            crew.watchdog.stop()
            return
        if turn.aborts_only:
            engine.abort(turn.inbox().aborts)
            continue
        with crew.watchdog.step():
            output = engine.step(turn.inbox())
        own = checksum(engine.launched, output)


def _aborts(request_ids: Sequence[str]) -> Submit:
    return Submit.of(Inbox(aborts=list(request_ids)))


def checksum(batch: ScheduledBatch | None, output: StepOutput) -> int:
    """Of what a step scheduled (rows, positions, tokens, pages) and what it brought. 32 bits."""
    numbers = array("q", chain.from_iterable(map(attrgetter("new_token_ids"), output.updates)))
    if batch is not None:
        columns = batch.columns
        numbers.append(batch.step)
        numbers.extend(columns.borders)
        for column in (columns.rows, columns.starts, columns.lengths, columns.num_draws, columns.token_ids):
            numbers.frombytes(column.tobytes())
        for changes in map(attrgetter("new_pages"), batch.with_new_pages):
            for new in changes.values():
                numbers.append(new.first_index)
                numbers.extend(new.pages)
    return zlib.crc32(numbers)
