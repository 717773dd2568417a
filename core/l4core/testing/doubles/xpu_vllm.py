"""vllm-xpu-kernels' attention on a CPU: the rules of its operator `varlen_fwd`, then plain torch.

The rules are facts of the library's source and of the messages in its binary. The Python function over the operator is a thin one with the
recorded signature; it keeps what a caller can trip over: the rule on scales, the rewriting of small uniform batches into one-row decodes, and the
slow fallback with a warning where a kernel was not compiled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from l4core.testing.contracts import Contract
from l4core.testing.doubles.attention import Mask, check, paged_attention
from l4core.testing.doubles.xpu_rules import check_bounds, check_int32, check_qkv, check_table, scales_of, signed

__all__ = ["COMPILED", "OPERATOR", "bodies", "modules"]

OPERATOR = "varlen_fwd"
COMPILED = "vllm_xpu_kernels._vllm_fa2_C"
"""The module whose import registers the operator."""

SMALL_UNIFORM = 16
COMPILED_DECODE: Mapping[int, tuple[int, ...]] = {64: (16, 64), 128: (64,), 256: (16, 64), 512: (64,)}
"""The default build: head_dim → page sizes of plain decode for groups up to 8 (multiples of 64 share one kernel)."""
COMPILED_PREFILL = (64, 128, 192, 256, 512)


def bodies(not_compiled: str) -> Mapping[str, Callable[[dict[str, Any]], Any]]:
    """not_compiled: a dtype name for which the operator raises."""
    return {OPERATOR: partial(varlen_fwd, not_compiled=not_compiled)}


def modules(contract: Contract) -> Mapping[str, Mapping[str, object]]:
    """What importing the library makes importable, parents first."""
    home = {"flash_attn_varlen_func": signed(partial(_function, contract), contract)}
    return {"vllm_xpu_kernels": home, COMPILED: {}, "vllm_xpu_kernels.flash_attn_interface": home}


def varlen_fwd(a: dict[str, Any], not_compiled: str) -> list[torch.Tensor]:
    """→ [out, log-sum-exp or an empty tensor]"""
    q, k, v, out = a["q"], a["k"], a["v"], a["out"]
    check_qkv(q, k, v)
    check(q.shape[-1] * q.dtype.itemsize % 16 == 0, "the last dimension must be a multiple of 16 bytes")
    check(a["block_table"] is not None and a["seqused_k"] is not None, "the double is for paged memory only")
    check_table(a["block_table"], "block_table")
    _check_page_strides(k, v)
    num_seqs = len(a["cu_seqlens_q"]) - 1
    for name, size in (("cu_seqlens_q", num_seqs + 1), ("cu_seqlens_k", num_seqs + 1), ("seqused_k", num_seqs)):
        check_int32(a[name], name, size)
    check(not a["return_softmax"], "softmax_lse output is only supported when is_paged=false")
    decode = a["max_seqlen_q"] == 1
    _check_compiled(q, k, decode, not_compiled)
    scales = scales_of(a["k_scale"], a["v_scale"], k, num_seqs)
    bounds, lengths = a["cu_seqlens_q"].tolist(), a["seqused_k"].tolist()
    check_bounds(bounds, lengths, a["max_seqlen_q"], a["max_seqlen_k"])
    if a["mix_batch"] and not decode:
        rows = zip(bounds[:-1], bounds[1:], lengths, strict=True)
        lost = [b for b, (start, end, length) in enumerate(rows) if start == end and length]
        check(not lost, f"sequences {lost} have keys and no row: in a mixed batch they overwrite a neighbour's")
    mask = Mask(causal=a["is_causal"] and not decode, left=a["window_size_left"], right=a["window_size_right"])
    found, _ = paged_attention(
        q,
        k,
        v,
        bounds=bounds,
        lengths=lengths,
        table=a["block_table"],
        scale=a["softmax_scale"],
        mask=mask,
        descale=scales,
        reads_tail=True,
    )
    out = torch.empty_like(q) if out is None else out
    check(out.is_contiguous(), "out must be contiguous: the decode kernel writes packed rows")
    out.copy_(found)
    return [out, torch.empty(0)]


def _check_compiled(q: torch.Tensor, k: torch.Tensor, decode: bool, not_compiled: str) -> None:
    head_dim, page_size, group = q.shape[2], k.shape[1], q.shape[1] // k.shape[2]
    sizes = COMPILED_DECODE.get(head_dim, ())
    held = page_size in sizes or (64 in sizes and page_size % 64 == 0) if decode else head_dim in COMPILED_PREFILL
    check(page_size in (16, 32) or page_size % 64 == 0, f"unsupported block_size={page_size}")
    check(
        held and str(k.dtype) != f"torch.{not_compiled}",
        f"kernel not compiled: head_dim {head_dim}, page size {page_size}, group {group}, {k.dtype}, decode {decode}",
    )


def _check_page_strides(k: torch.Tensor, v: torch.Tensor) -> None:
    for x, name in ((k, "K"), (v, "V")):
        check(x.stride(0) % x.stride(1) == 0, f"Paged {name} page stride must be divisible by its token stride")
    check(k.stride(0) // k.stride(1) == v.stride(0) // v.stride(1), "Paged K/V page strides must match in tokens")


def _function(contract: Contract, *args: object, **kwargs: object) -> object:
    bound = contract.bind(next(iter(contract.functions)), *args, **kwargs)
    bound.apply_defaults()
    a = bound.arguments
    for name in ("q_descale", "k_descale", "v_descale"):
        scale = a[name]
        single = scale is None or scale.untyped_storage().nbytes() == scale.element_size()
        check(single, f"{name} must be view of single scalar tensor")
    if (a["k_descale"] is None) != (a["v_descale"] is None):
        raise NotImplementedError("FA2 only supports both KV cache descaled")
    given = _arguments(a)
    uniform = (
        1 < a["max_seqlen_q"] <= SMALL_UNIFORM and a["q"].shape[0] == (len(a["cu_seqlens_q"]) - 1) * a["max_seqlen_q"]
    )
    if uniform and a["causal"] and not a["return_softmax_lse"]:
        given |= _one_row_decodes(a)
    schema = contract.schema("_vllm_fa2_C::varlen_fwd")
    try:
        return torch.ops._vllm_fa2_C.varlen_fwd(*(given.get(x.name) for x in schema.arguments))[0]
    except RuntimeError as error:
        if "not compiled" not in str(error):
            raise
        logging.getLogger("vllm_xpu_kernels.flash_attn_interface").warning(
            "XPU kernel not compiled, falling back: %s", error
        )
        return _fallback(a)


def _arguments(a: dict[str, Any]) -> dict[str, Any]:
    window = a["window_size"] or (-1, -1)
    return {
        "q": a["q"],
        "k": a["k"],
        "v": a["v"],
        "out": a["out"],
        "cu_seqlens_q": a["cu_seqlens_q"],
        "cu_seqlens_k": torch.zeros_like(a["cu_seqlens_q"]),
        "seqused_k": a["seqused_k"],
        "block_table": a["block_table"],
        "max_seqlen_q": a["max_seqlen_q"],
        "max_seqlen_k": a["max_seqlen_k"],
        "p_dropout": 0.0,
        "k_scale": a["k_descale"],
        "v_scale": a["v_descale"],
        "softmax_scale": a["softmax_scale"] or a["q"].shape[-1] ** -0.5,
        "zero_tensors": False,
        "is_causal": a["causal"],
        "window_size_left": window[0],
        "window_size_right": window[1],
        "softcap": a["softcap"],
        "return_softmax": a["return_softmax_lse"],
        "num_splits": a["num_splits_kv"],
        "mix_batch": a["is_mix_batch"],
    }


def _one_row_decodes(a: dict[str, Any]) -> dict[str, Any]:
    """What the library makes of a batch that it takes for uniform, padding rows counted as rows: wrong for one that is not."""
    rows, tokens = a["max_seqlen_q"], a["q"].shape[0]
    lengths = a["seqused_k"][:, None] - (rows - 1 - torch.arange(rows))
    return {
        "cu_seqlens_q": torch.arange(tokens + 1, dtype=torch.int32),
        "cu_seqlens_k": torch.zeros(tokens + 1, dtype=torch.int32),
        "seqused_k": lengths.clamp(min=1).flatten().int(),
        "block_table": a["block_table"].repeat_interleave(rows, dim=0),
        "max_seqlen_q": 1,
        "is_causal": False,
        "mix_batch": False,
    }


def _fallback(a: dict[str, Any]) -> torch.Tensor:
    """The right answer, slowly."""
    lengths = a["seqused_k"].tolist()
    found, _ = paged_attention(
        a["q"],
        a["k"],
        a["v"],
        bounds=a["cu_seqlens_q"].tolist(),
        lengths=lengths,
        table=a["block_table"],
        scale=a["softmax_scale"] or a["q"].shape[-1] ** -0.5,
        mask=Mask(causal=a["causal"]),
        descale=scales_of(a["k_descale"], a["v_descale"], a["k"], len(lengths)),
    )
    out: torch.Tensor = torch.empty_like(a["q"]) if a["out"] is None else a["out"]
    return out.copy_(found)
