"""Where the backend says yes, and that every lack is a refusal with what was found, what was wanted and a way out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from l4_intel_xpu.probe import architecture, probe, workspace_bytes
from l4core.attention.verdicts import hold_to
from l4core.plugin_api import AttentionRequirements, Platform, Tier, Unusable, Usable
from l4core.testing.conformance import ProbeConformance
from l4core.testing.platforms import FAKE_PLATFORMS, fake_platform

VLLM, SGL = {"vllm_xpu_kernels": "0.1.16.2"}, {"sgl_kernel": "0.11.0"}
SCOUT = AttentionRequirements(
    num_q_heads=40, num_kv_heads=8, head_dim=128, q_dtype="bfloat16", kv_dtype="bfloat16", chunk_size=8192
)


class TestProbe(ProbeConformance):
    plugin, backend = "l4_intel_xpu", "intel_xpu"
    libraries = VLLM | SGL


@pytest.mark.parametrize("name", FAKE_PLATFORMS)
def test_only_intel_gpus(name: str) -> None:
    verdict = probe(fake_platform(name, VLLM | SGL), SCOUT)
    if name == "xpu":
        assert isinstance(verdict, Usable)
        assert verdict.tier == Tier.NATIVE
        assert verdict.provider == "vllm_xpu_kernels 0.1.16.2"
    else:
        assert isinstance(verdict, Unusable)
        assert "wanted an Intel GPU" in verdict.reason


@pytest.mark.parametrize(
    ("number", "name"),
    [
        ("12950962176", "12950962176"),
        ("13136561920", "pvc"),
        ("21479031808", "bmg_g21"),
        ("21491614720", "lnl_m"),
        ("bmg_g31", "bmg_g31"),
    ],
)
def test_torch_gives_architectures_as_numbers(number: str, name: str) -> None:
    """SYCL's values: IP version 12.60.7 (Ponte Vecchio), 20.1.4 (Battlemage G21), 20.4.4 (Lunar Lake); 12.7.0 is none of ours."""
    assert architecture(number) == name


@pytest.mark.parametrize("arch", ["21479031808", "bmg_g31", "pvc", "lnl_m"])
def test_known_architectures_are_native(arch: str) -> None:
    assert isinstance(probe(_machine(arch, VLLM), SCOUT), Usable)


@pytest.mark.parametrize("arch", ["ptl_h", "99999999999", "gfx942", "", "acm_g10"])
def test_unknown_architectures_are_refused(arch: str) -> None:
    assert isinstance(probe(_machine(arch, VLLM), SCOUT), Unusable)


@pytest.mark.parametrize(
    ("libraries", "words"),
    [
        ({}, "found neither library; wanted vllm_xpu_kernels 0.1.13 or sgl_kernel 0.11 or later"),
        ({"vllm_xpu_kernels": "0.1.3.1"}, "found vllm_xpu_kernels 0.1.3.1"),
        ({"sgl_kernel": "0.4.10"}, "found sgl_kernel 0.4.10"),  # NVIDIA's build goes by the same name
        ({"vllm_xpu_kernels": "0.1.12.3", "sgl_kernel": "0.3.9"}, "vllm_xpu_kernels 0.1.12.3, sgl_kernel 0.3.9"),
    ],
)
def test_libraries_absent_or_too_old(libraries: dict[str, str], words: str) -> None:
    verdict = probe(fake_platform("xpu", libraries), SCOUT)
    assert isinstance(verdict, Unusable)
    assert words in verdict.reason
    assert verdict.fix == "pip install vllm-xpu-kernels"


@pytest.mark.parametrize(
    ("libraries", "provider"),
    [
        (VLLM | SGL, "vllm_xpu_kernels 0.1.16.2"),
        (SGL, "sgl_kernel 0.11.0"),
        ({"vllm_xpu_kernels": "0.1.3", "sgl_kernel": "0.11.1"}, "sgl_kernel 0.11.1"),
        ({"vllm_xpu_kernels": "0"}, "vllm_xpu_kernels, version unknown"),
    ],
)
def test_the_first_library_that_fits(libraries: dict[str, str], provider: str) -> None:
    verdict = probe(fake_platform("xpu", libraries), SCOUT)
    assert isinstance(verdict, Usable)
    assert verdict.provider == provider


def test_sgl_kernel_is_for_battlemage_only() -> None:
    verdict = probe(_machine("pvc", SGL), SCOUT)
    assert isinstance(verdict, Unusable)
    assert verdict.reason == "found neither library; wanted vllm_xpu_kernels 0.1.13 or later"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q_dtype": "float32", "kv_dtype": "float32"}, "queries are float32; wanted bfloat16 or float16"),
        ({"kv_dtype": "float16"}, "KV is float16; wanted bfloat16 or float8_e4m3fn"),
        ({"kv_dtype": "float8_e4m3fnuz"}, "KV is float8_e4m3fnuz"),
        ({"head_dim": 80}, "head_dim is 80"),
        ({"num_q_heads": 7, "num_kv_heads": 2}, "7 query heads on 2 KV heads"),
        ({"num_q_heads": 32, "num_kv_heads": 1}, "32 query heads on 1 KV heads"),
        ({"page_size": 16}, "page size is 16; wanted 64 or 128"),
        ({"needs_tree": True, "num_draft_tokens": 7}, "log-sum-exp of unpaged keys only"),
        ({"needs_graph": True}, "graph capture is asked for"),
    ],
)
def test_every_lack_is_refused(changes: dict[str, object], words: str) -> None:
    asked = replace(SCOUT, **changes)  # type: ignore[arg-type]
    verdict = probe(fake_platform("xpu", VLLM), asked)
    assert isinstance(verdict, Unusable)
    assert words in verdict.reason
    assert verdict.fix or "head" in words or "head_dim" in words


@pytest.mark.parametrize("changes", [{"page_size": 128}, {"kv_dtype": "float8_e4m3fn"}, {"num_draft_tokens": 7}])
def test_what_is_claimed_is_granted(changes: dict[str, object]) -> None:
    asked = replace(SCOUT, **changes)  # type: ignore[arg-type]
    assert isinstance(hold_to(probe(fake_platform("xpu", VLLM), asked), asked), Usable)


def test_workspace_grows_with_rows_and_never_falls_under_the_split_of_one() -> None:
    one, many = workspace_bytes(SCOUT), workspace_bytes(replace(SCOUT, max_num_seqs=512, max_num_tokens=8192))
    assert one == 128 * 128 * (2 * 128 + 8) + 8
    assert many == 2 * 512 * 40 * (2 * 128 + 8) + 4 * 513


def _machine(arch: str, libraries: dict[str, str]) -> Platform:
    return Platform(device_type="xpu", vendor="intel", arch=arch, libraries=fake_platform("xpu", libraries).libraries)
