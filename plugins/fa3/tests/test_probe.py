"""Where fa3 says it runs, over fake machines, and the reason for each refusal."""

from __future__ import annotations

from dataclasses import replace

import pytest

from l4_fa3.probe import PARTIAL_BYTES, probe
from l4core.plugin_api import AttentionRequirements, Tier, Unusable, Usable
from l4core.testing.platforms import FAKE_PLATFORMS, fake_platform

LLAMA4 = AttentionRequirements(
    num_q_heads=40, num_kv_heads=8, head_dim=128, q_dtype="bfloat16", kv_dtype="bfloat16", chunk_size=8192
)
TOKENSPEED = {"flash_attn_interface": "3.0.0.post20260810"}
ALL = TOKENSPEED | {"sgl_kernel": "0.4.10", "vllm": "0.33.0"}


def refusal(platform: str, libraries: dict[str, str], **changes: object) -> Unusable:
    verdict = probe(fake_platform(platform, libraries), replace(LLAMA4, **changes))  # type: ignore[arg-type]
    assert isinstance(verdict, Unusable), verdict
    return verdict


@pytest.mark.parametrize("platform", FAKE_PLATFORMS)
def test_the_platforms(platform: str) -> None:
    """Native on Hopper; on older NVIDIA devices only when named; nowhere else."""
    verdict = probe(fake_platform(platform, ALL), LLAMA4)
    if platform == "sm90":
        assert isinstance(verdict, Usable)
        assert (verdict.tier, verdict.named_only) == (Tier.NATIVE, False)
    elif platform in ("sm80", "sm89"):
        assert isinstance(verdict, Usable)
        assert verdict.named_only
        assert verdict.tier < Tier.NATIVE
        assert "only when named" in verdict.note
    else:
        assert isinstance(verdict, Unusable)
        assert "Hopper" in verdict.reason
        assert fake_platform(platform).arch in verdict.reason


@pytest.mark.parametrize(
    ("libraries", "provider"),
    [
        (ALL, "flash_attn_interface 3.0.0.post20260810"),
        ({"sgl_kernel": "0.4.10", "vllm": "0.33.0"}, "sgl_kernel 0.4.10"),
        ({"vllm": "0.33.0"}, "vllm 0.33.0"),
        ({"flash_attn_interface": "2.8", "vllm": "0.33.0"}, "vllm 0.33.0"),
        ({"flash_attn_interface": "0"}, "flash_attn_interface, version unknown"),
    ],
)
def test_the_first_library_that_fits_is_named(libraries: dict[str, str], provider: str) -> None:
    verdict = probe(fake_platform("sm90", libraries), LLAMA4)
    assert isinstance(verdict, Usable)
    assert verdict.provider == provider


@pytest.mark.parametrize(
    ("libraries", "found"),
    [
        ({}, "no build of FlashAttention-3"),
        ({"flash_attn_interface": "2.8"}, "flash_attn_interface 2.8"),
        ({"sgl_kernel": "0.1", "vllm": "0.9"}, "sgl_kernel 0.1, vllm 0.9"),
    ],
)
def test_a_library_that_is_missing_or_too_old(libraries: dict[str, str], found: str) -> None:
    verdict = refusal("sm90", libraries)
    assert verdict.reason.startswith(f"found {found}; wanted flash_attn_interface 3.0.0b1")
    assert verdict.fix == "pip install tokenspeed-fa3"


def test_only_sglang_builds_for_older_devices() -> None:
    verdict = refusal("sm80", TOKENSPEED)
    assert "wanted sgl_kernel 0.4" in verdict.reason
    assert verdict.fix == "pip install sglang-kernel"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"q_dtype": "float32", "kv_dtype": "float32"}, "queries are float32"),
        ({"kv_dtype": "float16"}, "KV is float16; wanted bfloat16 or float8_e4m3fn"),
        ({"kv_dtype": "float8_e5m2"}, "KV is float8_e5m2"),
        ({"q_dtype": "float16", "kv_dtype": "float8_e4m3fn"}, "writes bfloat16 only"),
        ({"head_dim": 80}, "head_dim is 80; wanted 64, 128, 192, 256"),
        ({"num_q_heads": 7, "num_kv_heads": 3}, "7 query heads on 3 KV heads"),
        ({"needs_tree": True, "num_draft_tokens": 64}, "64 draft tokens in a tree; wanted at most 63"),
    ],
)
def test_what_the_kernel_lacks_is_refused(changes: dict[str, object], reason: str) -> None:
    assert reason in refusal("sm90", ALL, **changes).reason


def test_fp8_is_for_hopper() -> None:
    assert "KV is fp8 on sm80; wanted sm90" in refusal("sm80", ALL, kv_dtype="float8_e4m3fn").reason
    assert isinstance(probe(fake_platform("sm90", ALL), replace(LLAMA4, kv_dtype="float8_e4m3fn")), Usable)


def test_no_page_on_which_the_kernel_lets_nan_through() -> None:
    """Pages of 128 take another path of the kernel, which multiplies what lies past a sequence's end by zero."""
    verdict = probe(fake_platform("sm90", ALL), LLAMA4)
    assert isinstance(verdict, Usable)
    assert verdict.page_sizes is not None
    assert max(verdict.page_sizes) == verdict.preferred_page_size == 64
    assert not verdict.finite_tail


def test_the_claimed_memory_covers_partial_results() -> None:
    verdict = probe(fake_platform("sm90", ALL), replace(LLAMA4, max_num_tokens=8192, max_num_seqs=256))
    assert isinstance(verdict, Usable)
    assert verdict.workspace_bytes > PARTIAL_BYTES
