"""Creation refuses what would be slow or wrong, and the calls keep clear of what the libraries do behind one's back."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from l4_intel_xpu.backend import create
from l4_intel_xpu.libraries import Operands, Step, sgl_arguments, vllm_arguments
from l4core.attention.smoke import smoke_check
from l4core.plugin_api import (
    AttentionContext,
    AttentionMetadata,
    AttentionRequirements,
    BackendUnavailable,
    KVView,
    Tier,
    Usable,
)
from l4core.testing import contracts, doubles
from l4core.testing.doubles import Double
from l4core.testing.platforms import fake_platform

CONTRACTS = Path(__file__).parents[3] / "tests/data/contracts"
VLLM = contracts.load(CONTRACTS / "vllm-xpu-kernels-0.1.16.2.json")
OLDER = contracts.load(CONTRACTS / "vllm-xpu-kernels-0.1.13.2.json")
SGL = contracts.load(CONTRACTS / "sgl-kernel-xpu-0.11.0.json")
REQUIREMENTS = AttentionRequirements(
    num_q_heads=5, num_kv_heads=1, head_dim=128, q_dtype="bfloat16", kv_dtype="bfloat16", page_size=64, chunk_size=8192
)
FP8 = replace(REQUIREMENTS, kv_dtype="float8_e4m3fn")


def context(req: AttentionRequirements = REQUIREMENTS, **options: str) -> AttentionContext:
    return AttentionContext(
        requirements=req,
        platform=fake_platform("xpu", {"vllm_xpu_kernels": "0.1.16.2"}),
        device="cpu",
        page_size=req.page_size or 64,
        options=options,
        logger=logging.getLogger(__name__),
    )


@pytest.fixture
def double() -> Iterator[Double]:
    with doubles.xpu(VLLM) as opened:
        yield opened


# ---------------------------------------------------------------- creation


def test_a_kernel_that_was_not_compiled_is_refused_each_time(caplog: pytest.LogCaptureFixture) -> None:
    """The library answers in slow Python then. It warns once a process; the refusal must not depend on that."""
    caplog.set_level(logging.CRITICAL)
    with doubles.xpu(VLLM, not_compiled="bfloat16"):
        for _ in range(2):
            with pytest.raises(
                BackendUnavailable, match=r"no working kernel for decode of 5 query heads.*not compiled"
            ):
                create(context())


def test_only_the_kernels_that_are_needed_must_be_there() -> None:
    with doubles.xpu(VLLM, not_compiled="float8_e4m3fn"):
        create(context())
        with pytest.raises(BackendUnavailable, match="KV float8_e4m3fn"):
            create(context(FP8))


def test_a_head_dim_without_prefill_kernel_is_refused(double: Double) -> None:
    with pytest.raises(BackendUnavailable, match="decode") as refusal:
        create(context(replace(REQUIREMENTS, head_dim=192)))
    assert "--attention-backend" in refusal.value.fix


def test_the_second_library_is_tried_when_the_first_has_no_kernel() -> None:
    with doubles.xpu(VLLM, not_compiled="bfloat16"), doubles.xpu(SGL):
        assert create(context()).library.provider == "sgl_kernel"  # type: ignore[attr-defined]


def test_nothing_installed() -> None:
    with pytest.raises(BackendUnavailable) as refusal:
        create(context())
    assert "vllm_xpu_kernels: ModuleNotFoundError" in refusal.value.reason
    assert "sgl_kernel: ModuleNotFoundError" in refusal.value.reason
    assert refusal.value.fix == "pip install vllm-xpu-kernels"


def test_an_unknown_provider_is_named(double: Double) -> None:
    with pytest.raises(BackendUnavailable, match="provider is 'vllm'; wanted one of vllm_xpu_kernels, sgl_kernel"):
        create(context(provider="vllm"))


def test_a_function_without_an_argument_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    older = ModuleType("vllm_xpu_kernels")
    older.flash_attn_varlen_func = lambda q, k, v, out, max_seqlen_q: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm_xpu_kernels", older)
    with pytest.raises(BackendUnavailable, match="takes no argument cu_seqlens_q, seqused_k, block_table"):
        create(context(provider="vllm_xpu_kernels"))


def test_a_library_that_fails_to_load_is_a_refusal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "vllm_xpu_kernels.py").write_text("raise OSError('libsycl.so.9: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(BackendUnavailable, match=r"OSError: libsycl\.so\.9"):
        create(context(provider="vllm_xpu_kernels"))


@pytest.mark.parametrize("req", [REQUIREMENTS, FP8], ids=["bfloat16", "fp8"])
@pytest.mark.parametrize("recorded", [VLLM, OLDER, SGL], ids=lambda c: f"{c.library} {c.version}")
def test_core_s_smoke_check_passes(recorded: contracts.Contract, req: AttentionRequirements) -> None:
    verdict = Usable(tier=Tier.NATIVE, page_sizes=(64, 128), page_stride="dense", empty_rows=False, finite_tail=True)
    with doubles.xpu(recorded):
        smoke_check(create(context(req)), verdict, context(req))


# ---------------------------------------------------------------- calls


def test_padding_rows_do_not_make_a_ragged_batch_uniform(double: Double) -> None:
    """Four rows and two sequences of at most two: the library would take that for two each, were the bound it sees not past what it rewrites."""
    q = torch.randn(4, 5, 128, dtype=torch.bfloat16)
    k = torch.randn(3, 64, 1, 128, dtype=torch.bfloat16)
    meta = AttentionMetadata(
        cu_seqlens_q=torch.tensor([0, 1, 3], dtype=torch.int32),  # the fourth row is padding
        seq_lens=torch.tensor([9, 7], dtype=torch.int32),
        block_table=torch.tensor([[1], [2]], dtype=torch.int32),
        max_seqlen_q=2,
        max_seqlen_k=64,
        num_seqs=2,
        phase="verify",
    )
    backend, out = create(context()), torch.empty_like(q)
    backend.attend(q, KVView(k=k, v=k), backend.plan(meta), out)
    for row, (page, keys) in enumerate([(1, 9), (2, 6), (2, 7)]):
        seen = k[page, :keys, 0].float()
        expected = torch.softmax(q[row].float() @ seen.T * 128**-0.5, dim=-1) @ seen
        torch.testing.assert_close(out[row].float(), expected, atol=2e-2, rtol=0)
    assert double.calls[-1]["max_seqlen_q"] == 17
    assert not double.calls[-1]["mix_batch"]


@pytest.mark.parametrize("packed", [True, False], ids=["slice of a tensor of scales", "own storage"])
@pytest.mark.parametrize("recorded", [VLLM, SGL], ids=lambda c: c.library)
def test_scales_are_views_of_one_number(recorded: contracts.Contract, packed: bool) -> None:
    """Also where core keeps the scales of all layers together, and where it gives only one of the two."""
    scales = torch.tensor([0.25, 0.5, 2.0])
    k_scale = scales[1] if packed else scales[1].clone()
    k = (torch.randn(2, 64, 1, 128) / 0.5).to(torch.float8_e4m3fn)
    q = torch.randn(1, 5, 128, dtype=torch.bfloat16)
    meta = AttentionMetadata(
        cu_seqlens_q=torch.tensor([0, 1], dtype=torch.int32),
        seq_lens=torch.tensor([5], dtype=torch.int32),
        block_table=torch.tensor([[1]], dtype=torch.int32),
        max_seqlen_q=1,
        max_seqlen_k=5,
        num_seqs=1,
        phase="decode",
    )
    with doubles.xpu(recorded):
        backend, out = create(context(FP8)), torch.empty_like(q)
        backend.attend(q, KVView(k=k, v=k, k_scale=k_scale), backend.plan(meta), out)
    keys = k[1, :5, 0].float()
    expected = torch.softmax(q[0].float() @ (keys * 0.5).T * 128**-0.5, dim=-1) @ keys
    torch.testing.assert_close(out[0].float(), expected, atol=2e-2, rtol=0)


def test_trees_and_chunks_that_were_not_declared_are_errors(double: Double) -> None:
    from l4core.plugin_api import ChunkInfo

    nothing = torch.zeros(1, dtype=torch.int32)
    meta = AttentionMetadata(
        cu_seqlens_q=nothing, seq_lens=nothing, block_table=nothing[None], max_seqlen_q=1, max_seqlen_k=1, num_seqs=1,
        phase="decode", chunk=ChunkInfo(size=8192),
    )  # fmt: skip
    with pytest.raises(ValueError, match="neither tree_mask nor native_chunk"):
        create(context()).plan(meta)


@pytest.mark.parametrize("recorded", [VLLM, OLDER, SGL], ids=lambda c: f"{c.library} {c.version}")
def test_our_arguments_bind(recorded: contracts.Contract) -> None:
    """Against the recorded signature of each version."""
    x = torch.empty(0)
    step = Step(cu_seqlens_q=x, seq_lens=x, block_table=x, max_seqlen_q=3, max_seqlen_k=4)
    operands = Operands(q=x, k=x, v=x, out=x, k_scale=x, v_scale=x)
    make = sgl_arguments if recorded is SGL else vllm_arguments
    recorded.bind(next(iter(recorded.functions)), **make(step, operands, 0.5))
