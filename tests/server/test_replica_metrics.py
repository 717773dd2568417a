"""What `/metrics` shows of several engines (`--dp`): one server, so gauges are of all of them, whoever stepped last."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from l4core.request import StepOutput, StepStats
from l4core.server.metrics import Metrics
from l4core.server.replicas import Latest, OneOfMany


def two_engines() -> tuple[Metrics, OneOfMany, OneOfMany]:
    metrics, latest = Metrics("m"), Latest()
    return metrics, OneOfMany(metrics, latest, 0), OneOfMany(metrics, latest, 1)


def shown(metrics: Metrics) -> dict[str, float]:
    """Name, with the values of its own labels, → value; our names only."""
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = [value for name, value in sample.labels.items() if name != "model_name"]
            if sample.name.startswith("l4_"):
                found[" ".join((sample.name.removeprefix("l4_"), *labels))] = sample.value
    return found


def step(running: int, decodes: int = 0, guesses: int = 0, cached: int = 0) -> StepOutput:
    """Every sequence that decodes has so many guesses verified, all wrong."""
    return StepOutput(
        stats=StepStats(
            num_running=running,
            num_decode_tokens=decodes,
            pages_used={"global": running},
            pages_total={"global": 10},
            pages_cached={"global": cached},
            drafted_at=(decodes,) * guesses,
            accepted_at=(0,) * guesses,
            num_drafted_tokens=decodes * guesses,
            num_guesses=guesses if decodes else None,
        )
    )


def test_guesses_are_a_mean_over_the_sequences_of_all_engines() -> None:
    metrics, first, second = two_engines()
    first.stepped(step(running=3, decodes=3, guesses=4))
    assert shown(metrics)["spec_decode_guesses"] == 4
    second.stepped(step(running=1, decodes=1, guesses=0))
    assert shown(metrics)["spec_decode_guesses"] == 3
    second.stepped(step(running=2))  # only a prompt: nothing is known anew
    assert shown(metrics)["spec_decode_guesses"] == 3
    assert shown(metrics)["spec_decode_draft_tokens_total"] == 12


def test_sequences_and_pages_are_sums() -> None:
    metrics, first, second = two_engines()
    first.stepped(step(running=3))
    second.stepped(step(running=1))
    found = shown(metrics)
    assert (found["requests_running"], found["kv_pages global used"], found["kv_pages global total"]) == (4, 4, 20)
    assert found["kv_usage_ratio"] == 0.2


def test_what_a_lost_engine_held_is_gone_and_the_others_is_not() -> None:
    """At once, not when the next engine makes a step: an idle one makes none."""
    metrics, first, second = two_engines()
    first.stepped(step(running=3, decodes=3, guesses=4))
    second.stepped(step(running=1, decodes=1, guesses=2, cached=5))
    first.lost()
    found = shown(metrics)
    assert (found["requests_running"], found["kv_pages global used"], found["kv_pages global cached"]) == (1, 1, 5)
    assert (found["kv_pages global total"], found["spec_decode_guesses"]) == (10, 2)
    assert found["spec_decode_drafts_total"] == 4
    second.lost()
    found = shown(metrics)
    assert (found["requests_running"], found["kv_pages global used"], found["kv_usage_ratio"]) == (0, 0, 0)
