"""The engine. Read `step` first: it is the whole story, and every other file is one of its words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from l4core.engine.batch import Draft, ScheduledBatch, StepTokens
from l4core.engine.inbox import Inbox
from l4core.engine.run.draws import PendingDraws
from l4core.engine.run.runner import Runner
from l4core.engine.schedule.scheduler import NO_DRAFTS, Scheduler
from l4core.engine.speculation.drafter import SettledDraws, Speculation
from l4core.errors import RequestError
from l4core.request import FinishReason, Request, SequenceUpdate, StepOutput

EMPTY = Inbox()


class Engine:
    """Generates token ids from token ids. Knows nothing of text, HTTP or time; two engines may live in one process."""

    def __init__(
        self, scheduler: Scheduler, runner: Runner, speculation: Speculation | None = None, *, overlap: bool = False
    ) -> None:
        """overlap: schedule and queue a batch while the device computes the one before, where the requests allow it. launched: the batch that the
        last step put on its way, None where it had none."""
        self.scheduler = scheduler
        self.runner = runner
        self.speculation = speculation
        self.overlap = overlap
        self.launched: ScheduledBatch | None = None
        self._parsed: dict[str, object] = {}
        self._looking_back: set[str] = set()
        self._in_flight: PendingDraws | SettledDraws | None = None
        self._owed: list[SequenceUpdate] = []  # by steps that were interrupted
        scheduler.max_in_flight = 2 if overlap else 1

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do without new requests."""
        return self.scheduler.has_work or bool(self._owed)

    def step(self, inbox: Inbox = EMPTY) -> StepOutput:
        """Take in what came, compute one batch, hand out what one brought. One call is one forward pass (or none, when idle)."""
        refused = self._drain(inbox)
        if not self.overlap:
            output = self._simple_step()
        elif self._tokens_come_first():
            output = self._relay_step()
        else:
            output = self._overlapped_step()
        return self._deliver(output, refused)

    def _simple_step(self) -> StepOutput:
        """The tokens of a batch are known before the next one is chosen, and handed out before it is launched."""
        self._in_flight = self._launch(self.scheduler.schedule(self._propose()))
        return self._take_in()

    def _relay_step(self) -> StepOutput:
        """The tokens of a batch are known before the next one is chosen, and handed out while the device computes it. Guesses may stay on the device:
        it makes them while the host chooses and queues the batch that verifies them."""
        output = self._take_in()
        try:
            self._in_flight = self._launch(self.scheduler.schedule(self._propose(late=not self._looking_back)))
        except BaseException:
            self._owed += output.updates
            raise
        return output

    def _overlapped_step(self) -> StepOutput:
        """While the device computes a batch the host chooses and queues the next. So the end of a sequence is seen one batch late, and the token that
        was computed behind it is dropped."""
        earlier = self._in_flight
        self._in_flight = self._launch(self.scheduler.schedule())
        return self.scheduler.commit(self._wait_for(earlier))

    def _tokens_come_first(self) -> bool:
        """Whether the next batch cannot be built without the tokens of the last: guesses follow from them, or are among them and may be refused, or
        a sampler looks back at them."""
        guesses = self.speculation is not None and self.speculation.num_drafts > 0
        verifies = self.launched is not None and self.launched.num_verified > 0
        return guesses or verifies or bool(self._looking_back)

    def abort(self, request_ids: Sequence[str]) -> None:
        """Forget requests without computing anything; unknown ids are no error. Their ABORT updates come with the next step."""
        for request_id in request_ids:
            self.scheduler.abort(request_id)
            self._forget(request_id)

    def check(self, request: Request) -> object:
        """What the request's sampler makes of its parameters. Raises RequestError (400)."""
        return self.runner.pipeline.check(request.params)

    def _propose(self, *, late: bool = False) -> Mapping[str, Draft]:
        """Guesses for the sequences that decode next. late: the host need not know them yet."""
        if self.speculation is None or not self.speculation.num_drafts:
            return NO_DRAFTS
        requests = self.scheduler.draftable(self.speculation.num_guesses, self.speculation.num_slots)
        self.runner.enter(requests)
        return self.speculation.propose(requests, late=late)

    def _forget(self, request_id: str) -> None:
        if request_id in self._parsed:
            del self._parsed[request_id]
            self._looking_back.discard(request_id)
            if self.speculation is not None:
                self.speculation.forget((request_id,))

    def _launch(self, batch: ScheduledBatch | None) -> PendingDraws | SettledDraws | None:
        """Queue a batch on the device, without waiting for it."""
        self.launched = batch
        if batch is None:
            return None
        with self._abandoning():
            forward = self.runner.build(batch)
            computed = self.runner.execute(forward)
            draws = self.runner.draw(batch, forward, computed, self._parsed)
            if self.speculation is None or not (self.speculation.reads_target or batch.num_verified):
                return draws
            aux = computed.aux
            if aux is not None and self.overlap:
                aux = aux.kept()  # the next batch may be queued before this one's tokens are taken in
            return SettledDraws(draws, self.runner, self.speculation, batch, aux, self.scheduler.holds)

    def _take_in(self) -> StepOutput:
        tokens = self._wait_for(self._in_flight)
        self._in_flight = None
        return self.scheduler.commit(tokens)

    def _wait_for(self, pending: PendingDraws | SettledDraws | None) -> StepTokens | None:
        with self._abandoning():
            return None if pending is None else pending.wait()

    @contextmanager
    def _abandoning(self) -> Iterator[None]:
        """Whatever interrupts (Ctrl-C too), the engine stays usable: its requests are still there, start over, and can be aborted."""
        try:
            yield
        except BaseException:
            self._in_flight = None
            self.scheduler.abandon()
            raise

    def _drain(self, inbox: Inbox) -> list[SequenceUpdate]:
        """Takes the inbox in → ends of requests that were refused. RequestError, and nothing taken in, when a request has the id of another: updates
        of the two could not be told apart."""
        self._check_ids(inbox.requests)
        if inbox.flush_cache:
            self.scheduler.kv.flush()
        if inbox.step_costs is not None:
            self.scheduler.costs = inbox.step_costs
        if inbox.num_drafts is not None and self.speculation is not None:
            self.speculation.want(inbox.num_drafts, reads=inbox.draft_reads)
        refused = []
        for request in inbox.requests:
            try:
                parsed = self.check(request)
            except RequestError as error:
                refused.append(
                    SequenceUpdate(request_id=request.request_id, finish_reason=FinishReason.ERROR, error=str(error))
                )
                continue
            self.scheduler.add(request)
            self._parsed[request.request_id] = parsed
            if self.runner.pipeline.looks_back(request.params, parsed):
                self._looking_back.add(request.request_id)
        self.abort(inbox.aborts)
        return refused

    def _check_ids(self, requests: Sequence[Request]) -> None:
        seen: set[str] = set()
        for request in requests:
            if request.request_id in self._parsed or request.request_id in seen:
                raise RequestError(f"request id {request.request_id!r} is in use", param="request_id")
            seen.add(request.request_id)

    def _deliver(self, output: StepOutput, refused: list[SequenceUpdate]) -> StepOutput:
        first, self._owed = [*self._owed, *refused], []
        updates = [*first, *output.updates] if first else output.updates
        for update in updates:
            if update.finish_reason is not None:
                self._forget(update.request_id)
        return StepOutput(updates=updates, stats=output.stats) if first else output
