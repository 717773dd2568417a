"""sgl-kernel-xpu's attention on a CPU: the rules of its operator `fwd`, then plain torch, under a thin function with the recorded signature.

The rules are facts of the library's source and of the messages in its binary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from l4core.testing.contracts import Contract
from l4core.testing.doubles.attention import Mask, check, paged_attention
from l4core.testing.doubles.xpu_rules import check_bounds, check_int32, check_qkv, check_table, scales_of, signed

__all__ = ["COMPILED", "OPERATOR", "bodies", "modules"]

OPERATOR = "fwd"
COMPILED = "sgl_kernel.common_ops"
"""The module whose import registers the operator."""

HEAD_DIMS = (64, 96, 128, 192, 256, 512)
PAGE_SIZES = (64, 128)
LARGEST_GROUP = 16


def bodies(_not_compiled: str) -> Mapping[str, Callable[[dict[str, Any]], Any]]:
    """The library has all kernels or none."""
    return {OPERATOR: fwd}


def modules(contract: Contract) -> Mapping[str, Mapping[str, object]]:
    """What importing the library makes importable, parents first."""
    function = signed(partial(_function, contract), contract)
    return {"sgl_kernel": {}, "sgl_kernel.flash_attn": {"flash_attn_with_kvcache": function}}


def fwd(a: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """→ out, log-sum-exp (never filled for paged batches), two empty tensors. `cu_seqlens_k` carries each sequence's number of keys."""
    q, k, v, out = a["q"], a["k"], a["v"], a["out"]
    check_qkv(q, k, v)
    check(k.shape[3] in HEAD_DIMS, f"Unsupported head size for paged decode attention: {k.shape[3]}")
    check(k.shape[1] in PAGE_SIZES, f"Unsupported page size for decode attention: {k.shape[1]}")
    check(q.shape[1] // k.shape[2] <= LARGEST_GROUP, f"Unsupported q_group_size: {q.shape[1] // k.shape[2]}")
    dense = all(x.stride(0) == x.shape[1] * x.stride(1) for x in (k, v))
    check(dense, "pages must lie back to back: a free stride of prefill was never seen to work")
    check(a["page_table"] is not None, "the double is for paged memory only")
    check_table(a["page_table"], "page_table")
    num_seqs = len(a["cu_seqlens_q"]) - 1
    check_int32(a["cu_seqlens_q"], "cu_seqlens_q", num_seqs + 1)
    check_int32(a["cu_seqlens_k"], "cu_seqlens_k", num_seqs)
    scales = scales_of(a["k_descale"], a["v_descale"], k, num_seqs)
    bounds, lengths = a["cu_seqlens_q"].tolist(), a["cu_seqlens_k"].tolist()
    check_bounds(bounds, lengths, a["max_seqlen_q"], a["max_seqlen_k"])
    empty = [b for b, (start, end) in enumerate(pairwise(bounds)) if start == end or not lengths[b]]
    check(not empty, f"sequences {empty} are empty: never seen to work")
    decode = a["max_seqlen_q"] == 1
    mask = Mask(causal=a["is_causal"] and not decode, left=a["window_size_left"], right=a["window_size_right"])
    found, _ = paged_attention(
        q,
        k,
        v,
        bounds=bounds,
        lengths=lengths,
        table=a["page_table"],
        scale=a["softmax_scale"],
        mask=mask,
        descale=scales,
        reads_tail=True,
    )
    out = torch.empty_like(q) if out is None else out
    check(
        out.dtype == q.dtype and out.shape == q.shape and out.stride(-1) == 1,
        "out must look like q, last dimension contiguous",
    )
    out.copy_(found)
    return out, torch.empty(0), torch.empty(0), torch.empty(0)


def _function(contract: Contract, *args: object, **kwargs: object) -> object:
    bound = contract.bind(next(iter(contract.functions)), *args, **kwargs)
    bound.apply_defaults()
    a = bound.arguments
    check(a["cache_seqlens"].shape[0] + 1 == a["cu_seqlens_q"].shape[0], "cache_seqlens and cu_seqlens_q disagree")
    given = dict(a) | {
        "k": a["k_cache"],
        "v": a["v_cache"],
        "q_v": a["qv"],
        "cu_seqlens_k": a["cache_seqlens"],
        "kv_batch_idx": a["cache_batch_idx"],
        "leftpad_k": a["cache_leftpad"],
        "seqlens_rotary": a["rotary_seqlens"],
        "softmax_scale": a["softmax_scale"] or a["q"].shape[-1] ** -0.5,
        "is_causal": a["causal"],
        "window_size_left": a["window_size"][0],
        "window_size_right": a["window_size"][1],
        "is_rotary_interleaved": a["rotary_interleaved"],
        "num_kv_splits": a["num_splits"],
    }
    schema = contract.schema("sgl_kernel::fwd")
    out, lse, *rest = torch.ops.sgl_kernel.fwd(*(given[x.name] for x in schema.arguments))
    return (out, lse, *rest) if a["return_softmax_lse"] else out
