"""Where trtllm_mha says it runs, over fake machines, the reason for each refusal, and what `create` refuses."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from types import ModuleType

import pytest

from l4_trtllm_mha.backend import create
from l4_trtllm_mha.calls import find_calls
from l4_trtllm_mha.probe import probe
from l4core.plugin_api import (
    AttentionContext,
    AttentionRequirements,
    BackendUnavailable,
    Tier,
    Unusable,
    Usable,
)
from l4core.testing.platforms import FAKE_PLATFORMS, fake_platform

LLAMA4 = AttentionRequirements(
    num_q_heads=40, num_kv_heads=8, head_dim=128, q_dtype="bfloat16", kv_dtype="bfloat16", chunk_size=8192
)
FLASHINFER = {"flashinfer": "0.7.2"}


def refusal(platform: str, libraries: dict[str, str], **changes: object) -> Unusable:
    verdict = probe(fake_platform(platform, libraries), replace(LLAMA4, **changes))  # type: ignore[arg-type]
    assert isinstance(verdict, Unusable), verdict
    return verdict


@pytest.mark.parametrize("platform", FAKE_PLATFORMS)
def test_the_platforms(platform: str) -> None:
    """Native on Blackwell; on Hopper when named, through other kernels; nowhere else, the smaller Blackwell devices included."""
    verdict = probe(fake_platform(platform, FLASHINFER), LLAMA4)
    if platform in ("sm100", "sm103"):
        assert isinstance(verdict, Usable)
        assert (verdict.tier, verdict.named_only, verdict.tree_mask) == (Tier.NATIVE, False, True)
        assert verdict.finite_tail
    elif platform == "sm90":
        assert isinstance(verdict, Usable)
        assert (verdict.tier, verdict.named_only, verdict.tree_mask) == (Tier.REFERENCE, True, False)
        assert "sibling=xqa" in verdict.note
    else:
        assert isinstance(verdict, Unusable)
        assert "sm100, sm103" in verdict.reason


@pytest.mark.parametrize(("libraries", "found"), [({}, "is not installed"), ({"flashinfer": "0.2.9"}, "0.2.9")])
def test_flashinfer_missing_or_too_old(libraries: dict[str, str], found: str) -> None:
    verdict = refusal("sm100", libraries)
    assert verdict.reason == f"flashinfer {found}; wanted 0.6.14 or later"
    assert "flashinfer-cubin" in verdict.fix


@pytest.mark.parametrize(
    ("platform", "changes", "reason"),
    [
        ("sm100", {"q_dtype": "float32", "kv_dtype": "float32"}, "queries are float32"),
        ("sm100", {"kv_dtype": "float8_e5m2"}, "KV is float8_e5m2; wanted bfloat16 or float8_e4m3fn"),
        ("sm100", {"head_dim": 64}, "head_dim is 64; wanted 128"),
        ("sm100", {"num_q_heads": 7, "num_kv_heads": 3}, "7 query heads on 3 KV heads"),
        ("sm100", {"needs_tree": True, "num_draft_tokens": 64}, "64 draft tokens in a tree"),
        ("sm90", {"head_dim": 256}, "head_dim is 256; wanted 64, 128"),
        ("sm90", {"needs_tree": True, "num_draft_tokens": 7}, "no log-sum-exp"),
    ],
)
def test_what_the_kernels_lack_is_refused(platform: str, changes: dict[str, object], reason: str) -> None:
    assert reason in refusal(platform, FLASHINFER, **changes).reason


def test_only_the_fp8_kernel_of_the_sibling_needs_finite_tails() -> None:
    for kv_dtype in ("bfloat16", "float8_e4m3fn"):
        verdict = probe(fake_platform("sm90", FLASHINFER), replace(LLAMA4, kv_dtype=kv_dtype))
        assert isinstance(verdict, Usable)
        assert verdict.finite_tail is (kv_dtype != "bfloat16")


# ---------------------------------------------------------------- create


def context(platform: str, **options: str) -> AttentionContext:
    return AttentionContext(
        requirements=LLAMA4,
        platform=fake_platform(platform, FLASHINFER),
        device="cpu",
        page_size=64,
        options=options,
        logger=logging.getLogger(__name__),
    )


@pytest.mark.parametrize(
    ("platform", "options", "reason"),
    [
        ("sm90", {}, "found sm90: TensorRT-LLM's kernels are for Blackwell"),
        ("sm100", {"sibling": "xqa"}, "sibling=xqa is for Hopper only"),
        ("sm90", {"sibling": "fa2"}, "sibling is 'fa2'; wanted xqa"),
        ("sm100", {"workspace_mb": "1"}, "workspace_mb is '1'; wanted a number of at least 32"),
        ("sm100", {"workspace_mb": "many"}, "workspace_mb is 'many'"),
    ],
)
def test_options_that_do_not_fit_the_device(platform: str, options: dict[str, str], reason: str) -> None:
    with pytest.raises(BackendUnavailable) as error:
        create(context(platform, **options))
    assert reason in error.value.reason
    assert error.value.fix


def test_a_flashinfer_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    monkeypatch.setitem(sys.modules, "flashinfer.decode", None)
    with pytest.raises(BackendUnavailable, match="flashinfer cannot be used"):
        create(context("sm100"))


def test_a_flashinfer_whose_functions_lack_an_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    decode, prefill = ModuleType("flashinfer.decode"), ModuleType("flashinfer.prefill")

    def trtllm_batch_decode_with_kv_cache(query: object, kv_cache: object) -> None: ...

    decode.trtllm_batch_decode_with_kv_cache = trtllm_batch_decode_with_kv_cache  # type: ignore[attr-defined]
    prefill.trtllm_batch_context_with_kv_cache = trtllm_batch_decode_with_kv_cache  # type: ignore[attr-defined]
    for name, module in (("flashinfer", ModuleType("flashinfer")), ("flashinfer.decode", decode)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "flashinfer.prefill", prefill)
    with pytest.raises(BackendUnavailable, match="trtllm_batch_decode_with_kv_cache has no argument backend, block_"):
        find_calls()
