"""What `/metrics` says of speculation: guesses by depth and in all, how many are made now, and why they pause."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from l4core.engine.inbox import Inbox
from l4core.engine.pace import paced
from l4core.engine.speculation.draft_pace import DraftPace
from l4core.engine.speculation.step_times import VerifyCosts
from l4core.request import StepOutput, StepStats
from l4core.server.metrics import Metrics


def shown(metrics: Metrics) -> dict[str, float]:
    """Name, with the value of its own label, → value; speculation's series only."""
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = [value for name, value in sample.labels.items() if name != "model_name"]
            if sample.name.startswith("l4_spec_decode_"):
                found[" ".join((sample.name.removeprefix("l4_spec_decode_"), *labels))] = sample.value
    return found


def test_every_node_of_a_tree_is_a_guess_and_each_depth_is_counted_once() -> None:
    """Two sequences, twelve guesses each in three levels; one was right to the second."""
    metrics = Metrics("m")
    stats = StepStats(
        num_decode_tokens=2, drafted_at=(2, 2, 2), accepted_at=(1, 1, 0), num_drafted_tokens=24, num_guesses=3
    )
    metrics.stepped(StepOutput(stats=stats))
    found = shown(metrics)
    assert (found["drafts_total"], found["draft_tokens_total"], found["accepted_tokens_total"]) == (2, 24, 2)
    assert [found[f"position_drafted_total {i}"] for i in (1, 2, 3)] == [2, 2, 2]
    assert [found[f"position_accepted_total {i}"] for i in (1, 2, 3)] == [1, 1, 0]
    assert found["guesses"] == 3
    assert (found["pauses_total slower"], found["pauses_total no_guesses"]) == (0, 0)


class Guessing:
    """An engine whose guesses, three for its one sequence, are all wrong and take as long as another step each."""

    has_work = True

    def __init__(self) -> None:
        self.now = 0.0

    def step(self, inbox: Inbox) -> StepOutput:
        guesses = inbox.num_drafts or 0
        self.now += 1e-3 * (1 + guesses / 2)
        drafted = (1,) * guesses
        stats = StepStats(
            num_running=1,
            num_decode_tokens=1,
            drafted_at=drafted,
            accepted_at=(0,) * guesses,
            num_drafted_tokens=guesses,
            num_guesses=guesses,
        )
        return StepOutput(stats=stats)


def test_a_pause_is_counted_with_its_reason() -> None:
    """A plain step among speculating ones, which keeps the comparison true, is none."""
    engine, metrics = Guessing(), Metrics("m")
    costs = VerifyCosts(fixed=1.0, expert=0.0, num_experts=0, draft=0.1)
    step = paced(engine, None, DraftPace("test", 3, costs, clock=lambda: engine.now, max_running=1))
    for _ in range(100):
        metrics.stepped(step(Inbox()))
    found = shown(metrics)
    assert (found["pauses_total slower"], found["pauses_total no_guesses"]) == (1, 0)
    assert found["guesses"] == 0
    assert found["drafts_total"] >= 16
