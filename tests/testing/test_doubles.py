"""Doubles: there inside the block and gone after it, never in place of a real library, and each recorded rule is enforced."""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from l4core.testing import contracts, doubles
from l4core.testing.doubles.attention import Mask, paged_attention

CONTRACTS = Path(__file__).parents[1] / "data/contracts"
INT = torch.int32


def contract(name: str) -> contracts.Contract:
    return contracts.load(CONTRACTS / f"{name}.json")


FA3 = {name: contract(name) for name in ("tokenspeed-fa3-3.0.0.post20260810", "sglang-kernel-0.4.10", "vllm-0.33.0")}
XPU = {name: contract(name) for name in ("vllm-xpu-kernels-0.1.16.2", "vllm-xpu-kernels-0.1.13.2")}
SGL_XPU = contract("sgl-kernel-xpu-0.11.0")
AITER = {name: contract(name) for name in ("amd-aiter-0.1.7.post2.dev18", "amd-aiter-0.1.20")}
ALL: list[tuple[AbstractContextManager[doubles.Double], str]] = [
    *((doubles.fa3(c), next(iter(c.functions))) for c in FA3.values()),
    *((doubles.xpu(c), next(iter(c.functions))) for c in (*XPU.values(), SGL_XPU)),
    *((doubles.aiter(c), next(iter(c.functions))) for c in AITER.values()),
]

# ---------------------------------------------------------------- coming and going


@pytest.mark.parametrize(("double", "name"), ALL, ids=[name for _, name in ALL])
def test_importable_inside_the_block_only(double: AbstractContextManager[doubles.Double], name: str) -> None:
    module = name.partition(":")[0]
    top = module.partition(".")[0]
    with double as opened:
        assert importlib.util.find_spec(top) is not None
        for operator in opened.contract.schemas:
            namespace, _, op = operator.partition("::")
            assert str(getattr(getattr(torch.ops, namespace), op).default._schema).startswith(operator)
    assert top not in sys.modules
    for operator in opened.contract.schemas:
        namespace, _, op = operator.partition("::")
        assert not hasattr(getattr(torch.ops, namespace), op)


def test_a_block_can_be_entered_again() -> None:
    for _ in range(2):
        with doubles.fa3(FA3["vllm-0.33.0"]):
            importlib.import_module("vllm.vllm_flash_attn._vllm_fa3_C")


def test_a_real_library_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn_interface", sys)
    with (
        pytest.raises(RuntimeError, match="flash_attn_interface imported already"),
        doubles.fa3(next(iter(FA3.values()))),
    ):
        pass
    assert sys.modules["flash_attn_interface"] is sys


@pytest.mark.parametrize(
    "recorded", [*XPU.values(), SGL_XPU, *AITER.values()], ids=lambda c: f"{c.library} {c.version}"
)
def test_functions_show_the_recorded_signature(recorded: contracts.Contract) -> None:
    name = next(iter(recorded.functions))
    module, _, function = name.partition(":")
    with (doubles.aiter if recorded.library == "amd-aiter" else doubles.xpu)(recorded):
        found = getattr(importlib.import_module(module), function)
    assert inspect.signature(found) == recorded.signature(name)


# ---------------------------------------------------------------- the attention behind them


@pytest.mark.parametrize(
    ("mask", "seen"),
    [
        (Mask(causal=True), lambda key, position: key <= position),
        (Mask(causal=False), lambda key, position: key == key),
        (Mask(causal=True, left=2), lambda key, position: (key <= position) & (key >= position - 2)),
        (Mask(causal=False, left=1, right=1), lambda key, position: (key - position).abs() <= 1),
        (Mask(causal=True, chunk=4), lambda key, position: (key <= position) & (key // 4 == position // 4)),
    ],
)
def test_paged_attention_is_attention(mask: Mask, seen: Any) -> None:
    draw = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(shape, generator=draw) for shape in ((4, 4, 8), (5, 4, 2, 8), (5, 4, 2, 8)))
    table = torch.tensor([[3, 1, 4], [2, 0, 0]], dtype=INT)
    scale = torch.tensor([[2.0, 0.5], [1.0, 1.0]])
    out, lse = paged_attention(
        q, k, v, bounds=[0, 3, 3], lengths=[9, 0], table=table, scale=0.3, mask=mask, descale=(None, scale, None)
    )
    keys, values = (x[[3, 1, 4]].flatten(0, 1)[:9].repeat_interleave(2, dim=1) for x in (k, v))
    keys = keys * scale[0].repeat_interleave(2)[:, None]
    scores = torch.einsum("nhd,khd->hnk", q[:3], keys) * 0.3
    scores = scores.masked_fill(~seen(torch.arange(9), torch.arange(6, 9)[:, None]), -torch.inf)
    torch.testing.assert_close(out[:3], torch.einsum("hnk,khd->nhd", scores.softmax(-1), values))
    torch.testing.assert_close(lse[:, :3], scores.logsumexp(-1))
    assert out[3].isnan().all()  # a row of no sequence


@pytest.mark.parametrize(
    ("reads_tail", "tail", "spoilt"), [(True, torch.nan, True), (True, 1e4, False), (False, torch.nan, False)]
)
def test_the_tail_of_the_last_page(reads_tail: bool, tail: float, spoilt: bool) -> None:
    k = torch.ones(2, 4, 1, 8)
    k[1, 3] = tail
    table = torch.tensor([[1]], dtype=INT)
    out, _ = paged_attention(
        k[0, :1, :, :],
        k,
        k,
        bounds=[0, 1],
        lengths=[3],
        table=table,
        scale=1.0,
        mask=Mask(causal=True),
        reads_tail=reads_tail,
    )
    assert out.isnan().all() if spoilt else torch.allclose(out, torch.ones_like(out))


def test_no_keys_give_zero_and_minus_infinity() -> None:
    k = torch.ones(1, 4, 1, 8)
    out, lse = paged_attention(
        k[0, :1],
        k,
        k,
        bounds=[0, 1],
        lengths=[0],
        table=torch.zeros(1, 1, dtype=INT),
        scale=1.0,
        mask=Mask(causal=True),
    )
    assert (out == 0).all()
    assert lse.isneginf().all()


# ---------------------------------------------------------------- the rules of FlashAttention-3


def fa3_call(**changes: Any) -> Any:
    """`fwd` on two sequences of 2 and 3 rows, 20 and 30 keys; everything not given is neutral."""
    bf16 = torch.bfloat16
    given: dict[str, Any] = {
        "q": torch.randn(5, 4, 64, dtype=bf16),
        "k": torch.randn(6, 16, 2, 64, dtype=bf16),
        "v": torch.randn(6, 16, 2, 64, dtype=bf16),
        "cu_seqlens_q": torch.tensor([0, 2, 5], dtype=INT),
        "seqused_k": torch.tensor([20, 30], dtype=INT),
        "max_seqlen_q": 3,
        "page_table": torch.tensor([[1, 2], [3, 4]], dtype=INT),
        "is_causal": True,
    } | changes
    fwd = torch.ops.flash_attn_3.fwd
    return fwd(*(given.get(a.name, a.default_value) for a in fwd.default._schema.arguments))


FP8 = torch.float8_e4m3fn
FA3_RULES: list[tuple[str, dict[str, Any]]] = [
    ("wanted one dtype", {"k": torch.randn(6, 16, 2, 64)}),
    ("wanted float16, bfloat16 or float8_e4m3fn", {"q": torch.randn(5, 4, 64)}),
    ("contiguous last dimension", {"v": torch.randn(6, 16, 64, 2, dtype=torch.bfloat16).transpose(2, 3)}),
    ("query heads on 2 KV heads", {"q": torch.randn(5, 3, 64, dtype=torch.bfloat16)}),
    ("head_dim 64", {"k": torch.zeros(6, 16, 2, 32, dtype=torch.bfloat16), "v": torch.zeros(6, 16, 2, 32, dtype=torch.bfloat16)}),
    ("page_table must be int32", {"page_table": torch.tensor([[1, 2], [3, 4]])}),
    ("page_table has 1 rows for 2 sequences", {"page_table": torch.tensor([[1, 2]], dtype=INT)}),
    ("seqused_k must be contiguous int32", {"seqused_k": torch.tensor([20, 30])}),
    (r"seqused_k is \(1,\)", {"seqused_k": torch.tensor([20], dtype=INT)}),
    ("max_seqlen_q must be given", {"max_seqlen_q": None}),
    ("max_seqlen_q 2 is below a sequence's 3 rows", {"max_seqlen_q": 2}),
    ("33 keys on 2 pages of 16", {"seqused_k": torch.tensor([20, 33], dtype=INT)}),
    ("a page id outside", {"page_table": torch.tensor([[1, 2], [3, 6]], dtype=INT)}),
    ("out is torch.float32", {"out": torch.zeros(5, 4, 64)}),
    (r"k_descale is \(2,\); wanted \(2, 2\)", {"k_descale": torch.ones(2)}),
    ("v_descale is torch.float64", {"v_descale": torch.ones(2, 2, dtype=torch.float64)}),
    ("the double does no k_new", {"k_new": torch.randn(5, 2, 64, dtype=torch.bfloat16)}),
    ("scheduler_metadata must be contiguous int32", {"scheduler_metadata": torch.ones(4)}),
    ("made for another call", {"scheduler_metadata": torch.ones(4, dtype=INT)}),
]  # fmt: skip


@pytest.mark.parametrize(("words", "changes"), FA3_RULES, ids=[words for words, _ in FA3_RULES])
def test_fa3_keeps_its_rules(words: str, changes: dict[str, Any]) -> None:
    with doubles.fa3(FA3["tokenspeed-fa3-3.0.0.post20260810"]):
        fa3_call()
        with pytest.raises(RuntimeError, match=words):
            fa3_call(**changes)


def test_fa3_takes_fp8_with_bf16_output() -> None:
    q, k = torch.randn(5, 4, 64).to(FP8), torch.randn(6, 16, 2, 64).to(FP8)
    with doubles.fa3(FA3["tokenspeed-fa3-3.0.0.post20260810"]) as double:
        out, lse, *_ = fa3_call(q=q, k=k, v=k, k_descale=torch.tensor(0.5).expand(2, 2))
    assert (out.dtype, out.shape, lse.shape) == (torch.bfloat16, (5, 4, 64), (4, 5))
    assert double.calls[-1]["k_descale"].shape == (2, 2)


# ---------------------------------------------------------------- the rules of vllm-xpu-kernels


def xpu_call(**changes: Any) -> Any:
    """The library's function on two sequences of 1 and 20 rows."""
    from vllm_xpu_kernels import flash_attn_varlen_func

    k = torch.randn(6, 64, 1, 128, dtype=torch.bfloat16)
    given: dict[str, Any] = {
        "q": torch.randn(21, 5, 128, dtype=torch.bfloat16),
        "k": k,
        "v": k,
        "cu_seqlens_q": torch.tensor([0, 1, 21], dtype=INT),
        "seqused_k": torch.tensor([20, 100], dtype=INT),
        "max_seqlen_q": 20,
        "max_seqlen_k": 128,
        "block_table": torch.tensor([[1, 2], [3, 4]], dtype=INT),
        "causal": True,
        "is_mix_batch": False,
    } | changes
    return flash_attn_varlen_func(**given)


KV = torch.randn(6, 2, 64, 1, 128, dtype=torch.bfloat16)
XPU_RULES: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (RuntimeError, "wanted float16 or bfloat16", {"q": torch.randn(21, 5, 128)}),
    (RuntimeError, "query and key must have the same dtype", {"k": KV[:, 0].float(), "v": KV[:, 0].float()}),
    (RuntimeError, "requires both k_scale and v_scale", {"k": KV[:, 0].to(FP8), "v": KV[:, 0].to(FP8)}),
    (RuntimeError, "page strides must match", {"v": KV[:, 0]}),
    (RuntimeError, "only supported when is_paged=false", {"return_softmax_lse": True}),
    (RuntimeError, "unsupported block_size=48", {"k": KV[:, 0, :48].contiguous(), "v": KV[:, 0, :48].contiguous()}),
    (RuntimeError, "block_table must have dtype", {"block_table": torch.tensor([[1, 2], [3, 4]])}),
    (RuntimeError, "below a sequence's 100 keys", {"max_seqlen_k": 99}),
    (RuntimeError, "out must be contiguous", {"out": torch.empty(5, 21, 128, dtype=torch.bfloat16).transpose(0, 1)}),
    (RuntimeError, "overwrite a neighbour's", {"cu_seqlens_q": torch.tensor([0, 0, 20], dtype=INT), "is_mix_batch": True}),
    (RuntimeError, "view of single scalar", {"k_descale": torch.ones(2, 1), "v_descale": torch.ones(2, 1)}),
    (NotImplementedError, "both KV cache descaled", {"k_descale": torch.ones(())}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "words", "changes"), XPU_RULES, ids=[words for _, words, _ in XPU_RULES])
def test_vllm_xpu_kernels_keeps_its_rules(error: type[Exception], words: str, changes: dict[str, Any]) -> None:
    with doubles.xpu(XPU["vllm-xpu-kernels-0.1.16.2"]):
        xpu_call()
        with pytest.raises(error, match=words):
            xpu_call(**changes)


@pytest.mark.parametrize("recorded", XPU.values(), ids=XPU)
def test_small_uniform_batches_become_one_row_decodes(recorded: contracts.Contract) -> None:
    """Right for a uniform one, and the trap for one that only looks so."""
    q = torch.randn(4, 5, 128, dtype=torch.bfloat16)
    with doubles.xpu(recorded) as double:
        torch.manual_seed(0)
        small = {
            "q": q,
            "cu_seqlens_q": torch.tensor([0, 2, 4], dtype=INT),
            "max_seqlen_q": 2,
            "k": KV[:, 0],
            "v": KV[:, 0],
        }
        rewritten = xpu_call(**small)
        assert (double.calls[-1]["max_seqlen_q"], len(double.calls[-1]["seqused_k"])) == (1, 4)
        straight = xpu_call(**small | {"max_seqlen_q": 17})
        torch.testing.assert_close(rewritten, straight, atol=1e-2, rtol=1e-2)
        ragged = {"cu_seqlens_q": torch.tensor([0, 1, 3], dtype=INT)}
        wrong, right = xpu_call(**small | ragged), xpu_call(**small | ragged | {"max_seqlen_q": 17})
        assert (wrong[:3] - right[:3]).abs().max() > 0.05


def test_a_kernel_that_is_not_compiled_falls_back_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with doubles.xpu(XPU["vllm-xpu-kernels-0.1.16.2"]) as double:
        q = torch.randn(21, 5, 128, dtype=torch.bfloat16)
        expected = xpu_call(q=q, k=KV[:, 0], v=KV[:, 0])
    with doubles.xpu(XPU["vllm-xpu-kernels-0.1.16.2"], not_compiled="bfloat16") as double:
        found = xpu_call(q=q, k=KV[:, 0], v=KV[:, 0])
    assert "not compiled" in caplog.text
    assert len(double.calls) == 1
    torch.testing.assert_close(found, expected)
