from __future__ import annotations

import logging

import pytest

from l4core import builtin_plugins
from l4core.errors import BackendUnavailable
from l4core.experts.portable import TorchExperts
from l4core.experts.select import expert_candidates, select_experts
from l4core.plugin_api import (
    PLUGIN_API,
    ExpertContext,
    ExpertKernelEntry,
    ExpertRequirements,
    ExpertsUsable,
    Tier,
    Unusable,
)
from l4core.plugin_entries import PluginRow, Plugins, Provided
from l4core.testing.platforms import fake_platform

CPU = fake_platform("cpu", {})
SMALL = ExpertRequirements(num_experts=4, hidden_size=64, intermediate_size=48, dtype="float32")


def make(context: ExpertContext) -> TorchExperts:
    assert context.requirements == SMALL
    return TorchExperts()


def broken(context: ExpertContext) -> TorchExperts:
    raise RuntimeError("no such instruction")


def wrong(context: ExpertContext) -> object:
    return object()


def offer(name: str, verdict: object, create: str = "make", api: int = PLUGIN_API) -> Provided[ExpertKernelEntry]:
    def probe(platform: object, requirements: object) -> object:
        if isinstance(verdict, BaseException):
            raise verdict
        return verdict

    entry = ExpertKernelEntry(name=name, api=api, probe=probe, create=f"experts.test_select:{create}")  # type: ignore[arg-type]
    return Provided(entry=entry, distribution=f"l4-{name}", version="1.2")


def plugins(*offers: Provided[ExpertKernelEntry]) -> Plugins:
    dead = PluginRow(name="l4-dead", version="0.3", entry_point="l4_dead", status="failed", reason="it is dead")
    return Plugins(expert_kernels=offers, rows=(dead,))


TUNED = ExpertsUsable(tier=Tier.TUNED, provider="made 7")
PORTABLE = ExpertsUsable(tier=Tier.PORTABLE)


def test_the_highest_tier_wins_and_says_who_it_is() -> None:
    found = select_experts(plugins(offer("a", PORTABLE), offer("b", TUNED)), CPU, SMALL, device="cpu")
    assert found.describe() == "b (l4-b 1.2) · made 7 · tuned"


def test_one_that_fails_to_start_gives_way_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "l4core"):
        found = select_experts(plugins(offer("a", PORTABLE), offer("b", TUNED, "broken")), CPU, SMALL, device="cpu")
    assert found.name == "a"
    assert "expert kernel 'b' (l4-b 1.2) failed at start: RuntimeError: no such instruction" in caplog.text
    assert "using a" in caplog.text


def test_a_named_one_is_taken_or_ends_the_start() -> None:
    house = plugins(
        offer("a", PORTABLE), offer("b", TUNED, "broken"), offer("c", Unusable(reason="too cold", fix="warm it"))
    )
    assert select_experts(house, CPU, SMALL, device="cpu", named="a").name == "a"
    for name, text in {"b": "no such instruction", "c": "too cold", "aa": "there are a, b, c"}.items():
        with pytest.raises(BackendUnavailable, match=text):
            select_experts(house, CPU, SMALL, device="cpu", named=name)


@pytest.mark.parametrize(
    ("verdict", "reason"),
    [
        (ValueError("oops"), "its probe raised ValueError: oops"),
        (None, "its probe returned NoneType"),
        (ExpertsUsable(tier=3), "tier 3"),  # type: ignore[arg-type]
        (Unusable(reason=""), "refused without a reason"),
    ],
)
def test_a_bad_probe_is_a_reason(verdict: object, reason: str) -> None:
    (candidate,) = expert_candidates(plugins(offer("a", verdict)), CPU, SMALL)
    assert isinstance(candidate.verdict, Unusable)
    assert reason in candidate.verdict.reason


def test_nothing_usable_lists_every_reason_and_failed_plugins() -> None:
    named = ExpertsUsable(tier=Tier.NATIVE, named_only=True)
    house = plugins(
        offer("a", Unusable(reason="too cold")),
        offer("b", TUNED, "wrong"),
        offer("c", named),
        offer("d", PORTABLE, api=99),
    )
    with pytest.raises(BackendUnavailable) as caught:
        select_experts(house, CPU, SMALL, device="cpu")
    text = str(caught.value)
    for piece in ("too cold", "returned object", "c: used only when named", "plugin API 99", "l4-dead 0.3 failed"):
        assert piece in text


def test_graph_capture_is_never_assumed() -> None:
    needs = ExpertRequirements(num_experts=4, hidden_size=64, intermediate_size=48, dtype="float32", needs_graph=True)
    (candidate,) = expert_candidates(plugins(offer("a", TUNED)), CPU, needs)
    assert isinstance(candidate.verdict, Unusable)


def test_torch_refuses_quantised_weights() -> None:
    req = ExpertRequirements(
        num_experts=4, hidden_size=64, intermediate_size=48, dtype="bfloat16", weight_format="fp8_channel"
    )
    verdict = builtin_plugins.probe_torch_experts(CPU, req)
    assert isinstance(verdict, Unusable)
    assert "fp8_channel" in verdict.reason
