"""engine/process/turns.py without processes: what rank 0 says is what the others do, and a step that differs is found."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4core.config import EngineConfig
from l4core.engine.batch import NewPages, ScheduledBatch, ScheduledSequence
from l4core.engine.engine import Engine
from l4core.engine.inbox import Inbox
from l4core.engine.process.turns import LeadEngine, Turn, _decoder, _encoder, checksum, follow
from l4core.engine.schedule.step_costs import StepCosts
from l4core.engine.start.build import build_engine
from l4core.errors import EngineDeadError
from l4core.parallel.place import Place
from l4core.request import Request, SamplingParams, SequenceUpdate, StepOutput


class NoWatchdog:
    stopped = False

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        yield

    def stop(self) -> None:
        self.stopped = True


class Line:
    """A crew of two without a connection."""

    def __init__(self) -> None:
        self.sent: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.watchdog = NoWatchdog()
        self.place = Place(rank=1, size=2)

    def send(self, payload: bytes) -> None:
        self.sent.put(payload)

    def receive(self) -> bytes:
        return self.sent.get_nowait()


class Noting:
    """Draws as many tokens as it was given steps. drifts: in that step it draws another one."""

    def __init__(self, drifts: int = 0) -> None:
        self.drifts, self.taken = drifts, list[Any]()
        self.launched: ScheduledBatch | None = None
        self.has_work = False

    def check(self, request: Request) -> object:
        return None

    def abort(self, request_ids: Sequence[str]) -> None:
        self.taken.append(list(request_ids))

    def step(self, inbox: Inbox) -> StepOutput:
        self.taken.append(inbox)
        count = len(self.taken)
        return StepOutput(updates=[SequenceUpdate(request_id="a", new_token_ids=[count + (count == self.drifts)])])


def request(name: str, prompt: list[int]) -> Request:
    return Request(
        request_id=name, prompt_token_ids=prompt, params=SamplingParams(seed=1), eos_token_ids=[7], max_total_tokens=99
    )


def plain(taken: list[Any]) -> list[Any]:
    """A sequence that travelled is a list."""
    return [
        replace(one, requests=list(one.requests), aborts=list(one.aborts)) if isinstance(one, Inbox) else one
        for one in taken
    ]


INBOXES = [
    Inbox(requests=[request("a", [1, 2]), request("b", [3])], num_drafts=2),
    Inbox(aborts=["b"], step_costs=StepCosts(target_ms=20.0, max_prefill_tokens=64)),
    Inbox(),
    Inbox(flush_cache=True, num_drafts=0),
]


def test_the_others_take_in_what_rank_0_took_in() -> None:
    line = Line()
    mine, theirs = Noting(), Noting()
    lead = LeadEngine(mine, line)  # type: ignore[arg-type]
    for inbox in INBOXES:
        lead.step(inbox)
    lead.abort(["a"])
    lead.step(Inbox())
    lead.close()
    follow(theirs, line)  # type: ignore[arg-type]
    assert plain(theirs.taken) == plain(mine.taken)
    assert line.watchdog.stopped


@pytest.mark.parametrize("drifts", [1, 2, 4])
def test_a_step_that_differs_is_named(drifts: int) -> None:
    line = Line()
    lead = LeadEngine(Noting(), line)  # type: ignore[arg-type]
    for inbox in INBOXES:
        lead.step(inbox)
    lead.close()
    with pytest.raises(EngineDeadError, match=f"step {drifts} was not the same on rank 1 and rank 0"):
        follow(Noting(drifts), line)  # type: ignore[arg-type]


def test_an_idle_step_is_a_few_bytes() -> None:
    assert len(_encoder.encode(Turn.of(Inbox(), 10**6, 2**32 - 1))) < 32


@given(
    st.lists(st.tuples(st.text(max_size=4), st.lists(st.integers(0, 2**20), max_size=4)), max_size=3),
    st.lists(st.text(max_size=3), max_size=2),
    st.booleans(),
    st.none() | st.integers(0, 63),
)
def test_a_turn_arrives_unchanged(
    asked: list[tuple[str, list[int]]], aborts: list[str], flush: bool, drafts: int | None
) -> None:
    inbox = Inbox(requests=[request(*one) for one in asked], aborts=aborts, flush_cache=flush, num_drafts=drafts)
    turn = _decoder.decode(_encoder.encode(Turn.of(inbox, 3, 4)))
    assert plain([turn.inbox()]) == plain([inbox])
    assert (turn.number, turn.checksum) == (3, 4)


def batch(**changes: Any) -> ScheduledBatch:
    fields = {
        "request": request("a", [1]),
        "row": 1,
        "start": 5,
        "token_ids": [9, 8],
        "new_pages": {"global": NewPages(first_index=0, pages=[4, 2])},
        "draws": True,
        "is_decode": True,
        "num_drafts": 1,
        **changes,
    }
    return ScheduledBatch(step=7, sequences=[ScheduledSequence(**fields)])


OUTPUT = StepOutput(updates=[SequenceUpdate(request_id="a", new_token_ids=[3])])


@pytest.mark.parametrize(
    "changes",
    [
        {"row": 2},
        {"start": 6},
        {"token_ids": [9, 7]},
        {"token_ids": [9]},
        {"num_drafts": 0},
        {"draws": False},
        {"new_pages": {"global": NewPages(first_index=0, pages=[4, 3])}},
        {"new_pages": {"global": NewPages(first_index=1, pages=[4, 2])}},
        {"new_pages": {}},
    ],
)
def test_a_checksum_is_of_all_that_was_scheduled(changes: dict[str, Any]) -> None:
    assert checksum(batch(), OUTPUT) == checksum(batch(), OUTPUT)
    assert checksum(batch(**changes), OUTPUT) != checksum(batch(), OUTPUT)


def test_a_checksum_is_of_what_was_drawn() -> None:
    other = StepOutput(updates=[SequenceUpdate(request_id="a", new_token_ids=[4])])
    assert checksum(None, OUTPUT) != checksum(None, other)


def real_engine(folder: Path, *, overlap: bool) -> Engine:
    """Of one rank; in the small pool requests evict each other."""
    config = EngineConfig(
        model=folder.as_posix(),
        device="cpu",
        dtype="float32",
        page_size=16,
        max_total_tokens=700,
        max_running_requests=8,
    )
    engine = build_engine(config, progress=False).engine
    engine.overlap, engine.scheduler.max_in_flight = overlap, 2 if overlap else 1
    return engine


@pytest.mark.parametrize("overlap", [False, True], ids=["simple", "overlapped"])
def test_two_engines_make_the_same_steps(tiny: Path, overlap: bool) -> None:
    """Requests that come, end, are aborted, evict each other and look back, in both loops: each step's checksum is checked by `follow`."""
    line = Line()
    lead = LeadEngine(real_engine(tiny, overlap=overlap), line)  # type: ignore[arg-type]
    drawn: list[int] = []
    for number in range(120):
        news = (
            []
            if number > 60 or number % 3
            else [request(str(number), [(number + j) % 256 for j in range(1 + 7 * number % 90)])]
        )
        if number % 15 == 6:
            news = [replace(one, params=SamplingParams(seed=2, repetition_penalty=1.2)) for one in news]
        aborts = [str(number - 6)] if number % 12 == 6 else []
        if number == 40:
            lead.abort(["36"])
        output = lead.step(Inbox(requests=news, aborts=aborts, flush_cache=number == 50))
        drawn += [token for update in output.updates for token in update.new_token_ids]
    lead.close()
    assert len(drawn) > 200
    follow(real_engine(tiny, overlap=overlap), line)  # type: ignore[arg-type]
