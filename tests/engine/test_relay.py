"""The relay: a batch is taken in, and its tokens are handed out while the device computes the next. Guesses may stay on the device. No token changes.

The drafter knows the true answers and is right with a chosen probability; freed pages hold NaN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from helpers.profile import FULL
from l4core import LLM, SamplingParams
from l4core.engine.batch import PENDING, Draft, DraftRequest, ScheduledBatch
from l4core.engine.engine import Engine
from l4core.engine.inbox import Inbox
from l4core.engine.speculation.drafter import PluginSpeculation
from l4core.engine.speculation.late import LateGuesses
from l4core.plugin_api import DraftRow
from l4core.request import FinishReason, Request
from l4core.testing.recorded_drafter import RecordedDrafter

SHAPE = {"layers": 4, "hidden": 64, "heads": 4, "head_dim": 16, "inter": 128, "chunk": 32, "floor_scale": 32}
COUNT, TOKENS, DRAFTS = (120, 120, 3) if FULL else (24, 50, 3)
MODES: Sequence[Mapping[str, Any]] = (
    {"temperature": 0.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "min_p": 0.01, "logprobs": 1},
    {"temperature": 0.0, "logprobs": 2, "top_k": 3},
    {"temperature": 1.0, "min_tokens": 15, "logprobs": 0, "stop_token_ids": tuple(range(150))},
    {"temperature": 0.9, "logit_bias": {5: 1.0}, "stop_token_ids": tuple(range(40, 60))},
)
"""None looks back at the tokens before it."""
PENALTY = {"temperature": 0.8, "presence_penalty": 0.5, "repetition_penalty": 1.2}


def asked(n: int, params: Mapping[str, Any] | None = None) -> Request:
    """Prompts around every border of the first chunks; many begin alike."""
    return Request(
        request_id=str(n),
        prompt_token_ids=[(7 * i + i // 9) % 250 for i in range(5 + 7 * n % 90)] + [n % 250],
        params=SamplingParams(**(MODES[n % len(MODES)] if params is None else params), max_tokens=TOKENS, seed=n),
        eos_token_ids=(),
        max_total_tokens=150,
        priority=n % 3,
    )


PLAIN = [asked(n) for n in range(COUNT)]
MIXED = [asked(n, PENALTY if n % 8 == 3 else None) for n in range(COUNT)]
"""Some look back: while they are there, the host waits for the guesses."""


class OnDevice(PluginSpeculation):
    """Its guesses are late where they may be."""

    def __init__(self, *given: Any, engine: Engine, **options: Any) -> None:
        super().__init__(*given, **options)
        self._pending, self._late, self.num_late = engine.runner.pending, None, 0

    def propose(self, requests: Sequence[DraftRequest], *, late: bool = False) -> Mapping[str, Draft]:
        drafts, self._late = super().propose(requests), None
        if not late or not drafts or any(draft.parents for draft in drafts.values()):
            return drafts
        rows = {wanted.request.request_id: wanted.row for wanted in requests}
        table = torch.zeros(max(len(draft.token_ids) for draft in drafts.values()), len(drafts), dtype=torch.int64)
        for column, draft in enumerate(drafts.values()):
            table[: len(draft.token_ids), column] = torch.tensor(draft.token_ids)
        where = torch.tensor([rows[name] for name in drafts])
        self._late = LateGuesses(table, where, {name: i for i, name in enumerate(drafts)}, self._pending)
        self.num_late += len(drafts)
        return {name: Draft(token_ids=(PENDING,) * len(draft.token_ids)) for name, draft in drafts.items()}

    def known(self, batch: ScheduledBatch) -> ScheduledBatch:
        return batch if self._late is None else self._late.told(batch)


Answers = Mapping[str, tuple[list[int], list[float], FinishReason]]


def build(folder: Path, **options: Any) -> Engine:
    given: dict[str, Any] = {"dtype": "float32", "device": "cpu", "progress": False, "page_size": 16}
    given |= {"max_running_requests": 16, "speculative_adaptive": "off"}
    engine: Engine = LLM(folder.as_posix(), **(given | options))._built.engine
    engine.scheduler.kv._on_empty = engine.runner.memory.poison
    return engine


def relay(
    folder: Path,
    answers: Answers,
    *,
    late: bool = True,
    drafts: int = DRAFTS,
    acceptance: float | None = None,
    branches: int = 1,
    **options: Any,
) -> Engine:
    """acceptance None: a quarter of the requests each at 0, 0.4, 0.8 and 1."""
    engine = build(folder, speculative_algorithm="NGRAM", speculative_num_steps=drafts, **options)
    engine.overlap, engine.scheduler.max_in_flight = True, 2

    def chance(row: DraftRow) -> float:
        return acceptance if acceptance is not None else (row.params.seed or 0) // 4 % 4 * 0.4

    vocab_size = engine.runner.model.config.vocab_size
    tokens = {(tuple(r.prompt_token_ids), _is_penalised(r.params)): answers[_name(r)][0] for r in (*PLAIN, *MIXED)}
    drafter = RecordedDrafter(
        lambda row: tokens[tuple(row.prompt_token_ids), _is_penalised(row.params)],
        chance,
        num_draft_tokens=drafts,
        vocab_size=vocab_size,
        branches=branches,
    )
    given: dict[str, Any] = {"num_drafts": drafts, "vocab_size": vocab_size, "trees": branches > 1}
    made = OnDevice("late", drafter, engine=engine, **given) if late else PluginSpeculation("early", drafter, **given)
    engine.speculation = made
    return engine


def _is_penalised(params: SamplingParams) -> bool:
    return params.presence_penalty != 0


def _name(request: Request) -> str:
    return f"{request.request_id} {_is_penalised(request.params)}"


@pytest.fixture(scope="module")
def folder(make_tiny) -> Path:
    made: Path = make_tiny(**SHAPE)
    return made


@pytest.fixture(scope="module")
def answers(folder: Path) -> Answers:
    """Of every request in the simple loop without speculation, by `_name`."""
    engine, found = build(folder), {}
    for requests in (PLAIN, [r for r in MIXED if _is_penalised(r.params)]):
        found |= {_name(r): answer for r, answer in zip(requests, served(engine, requests), strict=True)}
    return found


def served(
    engine: Engine, requests: Sequence[Request], *, trickle: bool = False
) -> list[tuple[list[int], list[float], FinishReason]]:
    """trickle: one arrives every other step, instead of all at once."""
    found, left, step = Found(requests), list(requests), 0
    while left or engine.has_work:
        count = len(left) if not trickle else step % 2
        found.take(engine.step(Inbox(requests=left[:count])).updates)
        left, step = left[count:], step + 1
    engine.scheduler.check_integrity()
    assert not any(engine.scheduler.kv.pages_used.values())
    return [(found.tokens[r.request_id], found.logprobs[r.request_id], found.ends[r.request_id]) for r in requests]


class Found:
    """What clients have received."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.tokens: dict[str, list[int]] = {r.request_id: [] for r in requests}
        self.logprobs: dict[str, list[float]] = {r.request_id: [] for r in requests}
        self.ends: dict[str, FinishReason] = {}

    def take(self, updates: Sequence[Any]) -> None:
        for update in updates:
            assert update.request_id not in self.ends, "an update came after the end"
            self.tokens[update.request_id] += update.new_token_ids
            self.logprobs[update.request_id] += [one.logprob for one in update.logprobs]
            if update.finish_reason is not None:
                self.ends[update.request_id] = update.finish_reason


def check(engine: Engine, requests: Sequence[Request], answers: Answers, *, trickle: bool = False) -> None:
    for request, (tokens, logprobs, reason) in zip(requests, served(engine, requests, trickle=trickle), strict=True):
        wanted = answers[_name(request)]
        assert tokens == wanted[0], request.request_id
        assert reason is wanted[2]
        assert logprobs == pytest.approx(wanted[1], abs=1e-4)


@pytest.mark.parametrize("late", [True, False])
def test_tokens_are_those_without_speculation(folder: Path, answers: Answers, late: bool) -> None:
    """Greedy and sampled, logprobs, stops inside an accepted draft, prefix hits, pieces beside verification, over every chunk border."""
    engine = relay(folder, answers, late=late)
    check(engine, PLAIN, answers)
    assert not late or engine.speculation.num_late > 10 * COUNT  # type: ignore[union-attr]


@pytest.mark.parametrize("drafts", [1, 7, 31])
def test_drafts_of_other_lengths(folder: Path, answers: Answers, drafts: int) -> None:
    check(relay(folder, answers, drafts=drafts, acceptance=0.9), PLAIN[:8], answers)


def test_samplers_that_look_back_come_and_go(folder: Path, answers: Answers) -> None:
    """Guesses are late before and after, and known to the host while a penalty reads them."""
    engine = relay(folder, answers, acceptance=0.7)
    speculation: Any = engine.speculation
    requests = [MIXED[0], MIXED[3], MIXED[7]]
    found, late = Found(requests), []
    for wave in ([requests[0]], [requests[1]], [requests[2]]):
        found.take(engine.step(Inbox(requests=wave)).updates)
        before = speculation.num_late
        for _ in range(6):
            found.take(engine.step().updates)
        late.append(speculation.num_late - before)
        while engine._looking_back:
            found.take(engine.step().updates)
    while engine.has_work:
        found.take(engine.step().updates)
    assert [found.tokens[r.request_id] for r in requests] == [answers[_name(r)][0] for r in requests]
    assert late[0] > 0 < late[2]
    assert late[1] <= 1


@pytest.mark.parametrize("requests", [PLAIN, MIXED])
def test_pieces_and_preemption(folder: Path, answers: Answers, requests: Sequence[Request]) -> None:
    """Those that come later go first."""
    options = {"chunked_prefill_size": 24, "max_running_requests": 8, "max_total_tokens": 200, "context_length": 150}
    engine, evicted = relay(folder, answers, acceptance=0.7, **options), 0
    preempt = engine.scheduler._preempt

    def counted(*given: Any) -> None:
        nonlocal evicted
        evicted += 1
        preempt(*given)

    engine.scheduler._preempt = counted  # type: ignore[method-assign]
    check(engine, sorted(requests[:18], key=lambda r: r.priority), answers, trickle=True)
    assert evicted > 3


def test_trees(folder: Path, answers: Answers) -> None:
    """Chosen by the host, beside chains."""
    options = {"attention_backend": "reference", "max_running_requests": 4, "chunked_prefill_size": 16}
    engine = relay(folder, answers, drafts=12, branches=3, acceptance=0.8, **options)
    check(engine, PLAIN[:6], answers)


@settings(
    max_examples=60 if FULL else 12,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # an example takes half a second: no time to make it smaller
)
@given(data=st.data())
def test_any_order_of_arrivals_aborts_and_numbers_of_guesses(
    folder: Path, answers: Answers, data: st.DataObject
) -> None:
    """Over a pool so small that requests evict each other; with pauses, in which the loop overlaps, and interrupted steps."""
    options = {"chunked_prefill_size": 24, "max_running_requests": 5, "max_total_tokens": 260, "context_length": 150}
    engine = relay(folder, answers, **options)
    requests = [MIXED[n] for n in data.draw(st.lists(st.integers(0, COUNT - 1), min_size=2, max_size=8, unique=True))]
    found, left, aborted, interrupt = Found(requests), list(requests), set[str](), data.draw(st.booleans())
    while left or engine.has_work:
        number = data.draw(st.sampled_from([None, None, None, None, 0, 1, 2, DRAFTS]))
        arriving, left = (
            (left[:2], left[2:]) if data.draw(st.integers(0, 3)) == 0 or not engine.has_work else ([], left)
        )
        running = [seq.request.request_id for seq in engine.scheduler.sequences]
        aborts = running[:1] if data.draw(st.integers(0, 30)) == 0 else []
        aborted |= set(aborts)
        if interrupt and not arriving and not aborts and data.draw(st.integers(0, 8)) == 0:
            with interrupted(engine):
                found.take(engine.step().updates)
            continue
        found.take(engine.step(Inbox(requests=arriving, aborts=aborts, num_drafts=number)).updates)
        engine.scheduler.check_integrity()
    for request in requests:
        tokens, _, reason = answers[_name(request)]
        mine = found.tokens[request.request_id]
        if request.request_id in aborted:
            assert mine == tokens[: len(mine)]
        else:
            assert (mine, found.ends[request.request_id]) == (tokens, reason)
    assert not any(engine.scheduler.kv.pages_used.values())


class interrupted:  # noqa: N801  (read as a verb)
    """The next batch cannot be launched: Ctrl-C comes instead."""

    def __init__(self, engine: Engine) -> None:
        self._runner: Any = engine.runner

    def __enter__(self) -> None:
        def stop(forward: object) -> None:
            raise KeyboardInterrupt

        self._runner.execute = stop

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> bool:
        del self._runner.execute
        return kind is None or kind is KeyboardInterrupt


def test_tokens_that_were_taken_in_before_an_interruption_come_with_the_next_step(
    folder: Path, answers: Answers
) -> None:
    engine, found = relay(folder, answers, acceptance=1.0), Found(PLAIN[:1])
    found.take(engine.step(Inbox(requests=PLAIN[:1])).updates)
    for _ in range(3):
        found.take(engine.step().updates)
    before = len(found.tokens["0"])
    with interrupted(engine):
        engine.step()
    found.take(engine.step().updates)
    assert len(found.tokens["0"]) == before + DRAFTS + 1, "what was taken in is lost"
    while engine.has_work:
        found.take(engine.step().updates)
    assert found.tokens["0"] == answers[_name(PLAIN[0])][0]


def test_the_next_batch_is_on_its_way_when_tokens_are_handed_out(folder: Path, answers: Answers) -> None:
    """And the host asks for late guesses only once it has launched what verifies them."""
    engine = relay(folder, answers, acceptance=1.0)
    order: list[str] = []
    for owner, name in ((engine.runner, "execute"), (engine.speculation, "propose"), (engine.scheduler, "commit")):
        _note(owner, name, order)
    told = LateGuesses.told

    def noted(*given: Any) -> ScheduledBatch:
        order.append("known")
        return told(*given)

    engine.step(Inbox(requests=PLAIN[:1]))
    engine.step()
    order.clear()
    engine.speculation.known = lambda batch: noted(engine.speculation._late, batch)  # type: ignore[union-attr, method-assign]
    engine.step()
    assert order == ["known", "commit", "propose", "execute"]


def _note(owner: Any, name: str, order: list[str]) -> None:
    call = getattr(owner, name)

    def noted(*given: Any, **options: Any) -> Any:
        order.append(name)
        return call(*given, **options)

    setattr(owner, name, noted)
