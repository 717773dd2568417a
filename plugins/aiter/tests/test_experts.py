"""AITER's experts on a double (level D): the recorded signatures, weights read in tiles as the kernel does, the definition in plain torch."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from experts.problem import make
from l4_aiter import experts
from l4_aiter.probe import probe_experts
from l4core.errors import BackendUnavailable
from l4core.experts.portable import TorchExperts
from l4core.plugin_api import ExpertRequirements, ExpertsUsable, ExpertWeights, Unusable
from l4core.testing import contracts
from l4core.testing.platforms import fake_platform

CONTRACT = contracts.load(Path(__file__).parents[3] / "tests/data/contracts/amd-aiter-0.1.7.post2.dev18.json")
MI300 = fake_platform("gfx942", {"aiter": "0.1.20"})


def needs(**changed: object) -> ExpertRequirements:
    given = {"num_experts": 16, "hidden_size": 5120, "intermediate_size": 8192, "dtype": "bfloat16"}
    return ExpertRequirements(**{**given, **changed})  # type: ignore[arg-type]


def shuffle_weight(x: torch.Tensor) -> torch.Tensor:
    """[N, K] of 2-byte elements: tiles of 16 outputs by 32 inputs, in each of them pieces of 8 inputs before the outputs."""
    n, k = x.shape
    return x.reshape(n // 16, 16, k // 32, 4, 8).permute(0, 2, 3, 1, 4).reshape(n, k)


def unshuffled(x: torch.Tensor) -> torch.Tensor:
    e, n, k = x.shape
    return x.reshape(e, n // 16, k // 32, 4, 16, 8).permute(0, 1, 4, 2, 3, 5).reshape(e, n, k)


def fused_moe(*args: object, **kwargs: object) -> torch.Tensor:
    bound = CONTRACT.bind("aiter.fused_moe:fused_moe", *args, **kwargs)
    bound.apply_defaults()
    a = bound.arguments
    assert a["topk_ids"].dtype == torch.int32
    assert a["topk_weight"].dtype == torch.float32
    assert a["topk_ids"].shape == a["topk_weight"].shape == (len(a["hidden_states"]), 1)
    weights = ExpertWeights(gate_up=unshuffled(a["w1"]), down=unshuffled(a["w2"]))
    score = a["topk_weight"].squeeze(1) if a["doweight_stage1"] else torch.ones(len(a["topk_ids"]))
    return TorchExperts().forward(a["hidden_states"], a["topk_ids"].squeeze(1), score, weights)


@pytest.fixture
def aiter(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    modules = {name: ModuleType(name) for name in ("aiter", "aiter.fused_moe", "aiter.ops", "aiter.ops.shuffle")}
    fused_moe.__signature__ = CONTRACT.signature("aiter.fused_moe:fused_moe")  # type: ignore[attr-defined]
    modules["aiter.fused_moe"].fused_moe = fused_moe  # type: ignore[attr-defined]
    modules["aiter.ops.shuffle"].shuffle_weight = shuffle_weight  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules


@pytest.mark.parametrize("shared", [True, False])
def test_the_call_and_the_order_of_weights(aiter: dict[str, ModuleType], shared: bool) -> None:
    kernel = experts.create(None)  # type: ignore[arg-type]
    problem = make([1, 0, 1, 2, 2, 2], 3, hidden=64, inter=96, dtype=torch.bfloat16, shared=shared)
    assert problem.error(kernel) > 0.1  # the order does matter
    kernel.prepare(problem.weights)
    assert problem.error(kernel) < 2e-2


def test_another_signature_is_refused(aiter: dict[str, ModuleType]) -> None:
    aiter["aiter.fused_moe"].fused_moe = lambda hidden_states, w1, w2: None  # type: ignore[attr-defined]
    with pytest.raises(BackendUnavailable, match="not known: got an unexpected keyword argument 'topk_weight'"):
        experts.create(None)  # type: ignore[arg-type]


def test_no_aiter_is_a_refusal() -> None:
    with pytest.raises(BackendUnavailable, match="aiter cannot be used"):
        experts.create(None)  # type: ignore[arg-type]


def test_usable_where_named_on_its_own_devices() -> None:
    verdict = probe_experts(MI300, needs())
    assert isinstance(verdict, ExpertsUsable)
    assert verdict.named_only


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"dtype": "float32"}, "dtype is float32"),
        ({"weight_format": "fp8_channel"}, "weights are fp8_channel"),
        ({"intermediate_size": 8200}, "multiples of 32"),
    ],
)
def test_what_it_does_not_do_is_said(changed: dict[str, object], reason: str) -> None:
    verdict = probe_experts(MI300, needs(**changed))
    assert isinstance(verdict, Unusable)
    assert reason in verdict.reason


@pytest.mark.parametrize("platform", [fake_platform("sm90", {"aiter": "0.1.20"}), fake_platform("gfx942", {})])
def test_other_machines_are_refused(platform: object) -> None:
    assert isinstance(probe_experts(platform, needs()), Unusable)  # type: ignore[arg-type]
