"""Engine.step's inbox: what is refused, and that a wrong request harms no other. Model and sampler are stand-ins."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from l4core import SamplingParams
from l4core.engine.batch import StepTokens
from l4core.engine.engine import Engine
from l4core.engine.inbox import Inbox
from l4core.engine.schedule.scheduler import Scheduler, SchedulerLimits
from l4core.errors import RequestError
from l4core.kv.blocks import KVGroup
from l4core.kv.manager import KVManager
from l4core.request import FinishReason, Request


class Runner:
    """Draws token 7 for everyone, and notes what each request's sampler parsed."""

    def __init__(self) -> None:
        self.pipeline = self
        self.seen: list[dict[str, object]] = []

    def check(self, params: SamplingParams) -> object:
        if params.sampler == "nobody":
            raise RequestError("unknown sampler 'nobody'", param="sampler")
        return params.seed

    def looks_back(self, params: SamplingParams, parsed: object) -> bool:
        return False

    def build(self, batch: Any) -> None: ...

    def execute(self, forward: None) -> None: ...

    def draw(self, batch: Any, forward: None, hidden: None, parsed: dict[str, object]) -> Any:
        self.seen.append(dict(parsed))
        drawn = [
            SimpleNamespace(
                request_id=s.request.request_id,
                token_ids=(7,) if s.draws else (),
                error="",
                logprobs=(),
                prompt_logprobs=(),
            )
            for s in batch.sequences
        ]
        return SimpleNamespace(wait=lambda: StepTokens(drawn=drawn))


@pytest.fixture
def engine() -> Engine:
    group = KVGroup(name="global", layer_ids=(0,), chunk_size=None)
    limits = SchedulerLimits(max_running=4, max_tokens_per_step=64, chunk_size=None, max_context=64)
    runner: Any = Runner()
    return Engine(Scheduler(limits, KVManager((group,), 4, 40)), runner)


def ask(request_id: str, **params: Any) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=[1, 2],
        params=SamplingParams(max_tokens=3, **params),
        eos_token_ids=(),
        max_total_tokens=5,
    )


def test_an_id_in_use_is_refused_and_its_owner_goes_on(engine: Engine) -> None:
    engine.step(Inbox(requests=[ask("a", seed=1)]))
    for requests in ([ask("b"), ask("a", seed=2)], [ask("c"), ask("c")]):
        with pytest.raises(RequestError, match="is in use"):
            engine.step(Inbox(requests=requests))
    output = engine.step()
    assert [u.request_id for u in output.updates] == ["a"]
    runner: Any = engine.runner
    assert runner.seen[-1] == {"a": 1}
    assert engine.step().updates[0].finish_reason is FinishReason.LENGTH
    assert not engine.has_work
    engine.step(Inbox(requests=[ask("a")]))  # an id that has ended may come again


def test_a_refused_request_ends_and_the_others_go_on(engine: Engine) -> None:
    output = engine.step(Inbox(requests=[ask("bad", sampler="nobody"), ask("good")]))
    reasons = {u.request_id: u.finish_reason for u in output.updates}
    assert reasons == {"bad": FinishReason.ERROR, "good": None}
    engine.step()
    engine.step()
    engine.step(Inbox(requests=[ask("bad")]))  # nothing of it is left
