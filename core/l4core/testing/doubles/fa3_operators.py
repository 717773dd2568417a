"""FlashAttention-3's operators on a CPU: the rules its `fwd` checks (facts of its source and of the messages in its binary), then plain torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch

from l4core.testing.doubles.attention import Mask, check, paged_attention

__all__ = ["BODIES", "MODULES"]

MODULES: Mapping[str, Mapping[str, Mapping[str, object]]] = {
    "flash_attn_3": {"flash_attn_3": {}, "flash_attn_3._C": {}, "flash_attn_interface": {}},
    "sgl_kernel": {"sgl_kernel": {}, "sgl_kernel.flash_attn": {}},
    "_vllm_fa3_C": {"vllm": {}, "vllm.vllm_flash_attn": {}, "vllm.vllm_flash_attn._vllm_fa3_C": {}},
}
"""Namespace of the operators → modules that importing the library makes importable, parents first."""

DTYPES = (torch.float16, torch.bfloat16, torch.float8_e4m3fn)
UNUSED = (
    "k_new",
    "v_new",
    "q_v",
    "cu_seqlens_k",
    "cu_seqlens_k_new",
    "seqused_q",
    "kv_batch_idx",
    "leftpad_k",
    "rotary_cos",
    "rotary_sin",
)
LARGEST_HEAD = 256


def fwd(a: dict[str, Any]) -> Any:
    """The attention itself: ragged rows with `cu_seqlens_q` (q [T, Hq, D], lse [Hq, T]) or equal ones without (q [B, S, Hq, D], lse [B, Hq, S])."""
    _check_tensors(a)
    ragged = a["cu_seqlens_q"] is not None
    num_seqs = len(a["cu_seqlens_q"]) - 1 if ragged else a["q"].shape[0]
    _check_batch(a, num_seqs, ragged)
    q = a["q"] if ragged else a["q"].flatten(0, 1)
    bounds = a["cu_seqlens_q"].tolist() if ragged else [b * a["q"].shape[1] for b in range(num_seqs + 1)]
    longest = max((end - start for start, end in pairwise(bounds)), default=0)
    check(
        not ragged or longest <= a["max_seqlen_q"],
        f"max_seqlen_q {a['max_seqlen_q']} is below a sequence's {longest} rows",
    )
    if a["scheduler_metadata"] is not None:
        check(
            torch.equal(a["scheduler_metadata"], _schedule_of_call(a, num_seqs, ragged)),
            "scheduler_metadata was made for another call",
        )
    mask = Mask(
        causal=a["is_causal"],
        left=a["window_size_left"],
        right=a["window_size_right"],
        chunk=a.get("attention_chunk", 0),
    )
    scale = a["softmax_scale"] if a["softmax_scale"] is not None else q.shape[-1] ** -0.5
    descale = (a["q_descale"], a["k_descale"], a["v_descale"])
    found, lse = paged_attention(
        q,
        a["k"],
        a["v"],
        bounds=bounds,
        lengths=a["seqused_k"].tolist(),
        table=a["page_table"],
        scale=scale,
        mask=mask,
        descale=descale,
    )
    out = a["out"] if a["out"] is not None else torch.empty(a["q"].shape, dtype=_out_dtype(a["q"].dtype))
    out.copy_(found.view(out.shape))
    lse = lse if ragged else lse.view(lse.shape[0], num_seqs, -1).transpose(0, 1).contiguous()
    return [out, lse, torch.empty(0), torch.empty(0)]


def get_scheduler_metadata(a: dict[str, Any]) -> torch.Tensor:
    """int32: what the schedule depends on, so that `fwd` can tell one made for another call (the real one would go wrong in silence)."""
    check(a["seqused_k"].dtype == torch.int32, "seqused_k must be int32")
    return _schedule(
        a,
        a["batch_size"],
        a["max_seqlen_q"],
        a["max_seqlen_k"],
        a["num_heads"],
        a["num_heads_k"],
        a["headdim"],
        a["page_size"],
        a["cu_seqlens_q"] is not None,
    )


BODIES: Mapping[str, Callable[[dict[str, Any]], Any]] = {"fwd": fwd, "get_scheduler_metadata": get_scheduler_metadata}


# ---------------------------------------------------------------- the rules


def _check_tensors(a: dict[str, Any]) -> None:
    q, k, v, out = a["q"], a["k"], a["v"], a["out"]
    check(q.dtype in DTYPES, f"q is {q.dtype}; wanted float16, bfloat16 or float8_e4m3fn")
    check(k.dtype == q.dtype and v.dtype == q.dtype, f"q is {q.dtype}, k {k.dtype}, v {v.dtype}; wanted one dtype")
    check(all(x.stride(-1) == 1 for x in (q, k, v)), "q, k and v must have a contiguous last dimension")
    check(k.dim() == 4 and v.shape[:3] == k.shape[:3], "k and v must be [pages, page size, KV heads, head dim]")
    check(q.shape[-2] % k.shape[2] == 0, f"{q.shape[-2]} query heads on {k.shape[2]} KV heads")
    multiple = 16 if q.dtype.itemsize == 1 else 8
    check(
        k.shape[3] == q.shape[-1] <= LARGEST_HEAD and q.shape[-1] % multiple == 0,
        f"head_dim {q.shape[-1]}; wanted a multiple of {multiple} up to {LARGEST_HEAD}",
    )
    if out is not None:
        check(out.dtype == _out_dtype(q.dtype), f"out is {out.dtype}; wanted {_out_dtype(q.dtype)}")
        check(out.shape == (*q.shape[:-1], v.shape[3]), f"out is {tuple(out.shape)}; wanted {tuple(q.shape)}")
        check(out.stride(-1) == 1, "out must have a contiguous last dimension")
    given = [name for name in UNUSED if a.get(name) is not None]
    check(not given, f"the double does no {', '.join(given)}")


def _check_batch(a: dict[str, Any], num_seqs: int, ragged: bool) -> None:
    if ragged:
        _check_int32(a, "cu_seqlens_q", (num_seqs + 1,))
        check(a["q"].dim() == 3, "q must be [tokens, heads, head dim] beside cu_seqlens_q")
        check(a["max_seqlen_q"] is not None, "max_seqlen_q must be given beside cu_seqlens_q")
    else:
        check(a["q"].dim() == 4, "q must be [sequences, rows, heads, head dim] without cu_seqlens_q")
    check(a["page_table"] is not None and a["seqused_k"] is not None, "paged memory wants page_table and seqused_k")
    table = a["page_table"]
    check(
        table.dtype == torch.int32 and table.stride(-1) == 1,
        "page_table must be int32 with a contiguous last dimension",
    )
    check(table.shape[0] == num_seqs, f"page_table has {table.shape[0]} rows for {num_seqs} sequences")
    _check_int32(a, "seqused_k", (num_seqs,))
    for name in ("q_descale", "k_descale", "v_descale"):
        if a[name] is not None:
            wanted = (num_seqs, a["k"].shape[2])
            check(a[name].dtype == torch.float32, f"{name} is {a[name].dtype}; wanted float32")
            check(tuple(a[name].shape) == wanted, f"{name} is {tuple(a[name].shape)}; wanted {wanted}")
    if a["scheduler_metadata"] is not None:
        _check_int32(a, "scheduler_metadata", None)


def _check_int32(a: dict[str, Any], name: str, shape: tuple[int, ...] | None) -> None:
    x = a[name]
    check(x.dtype == torch.int32 and x.is_contiguous(), f"{name} must be contiguous int32")
    check(shape is None or tuple(x.shape) == shape, f"{name} is {tuple(x.shape)}; wanted {shape}")


def _out_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype.itemsize == 1 else dtype


def _schedule_of_call(a: dict[str, Any], num_seqs: int, ragged: bool) -> torch.Tensor:
    page_size = a["k"].shape[1]
    rows = a["max_seqlen_q"] if ragged else a["q"].shape[1]
    keys = a["max_seqlen_k"] if a["max_seqlen_k"] is not None else a["page_table"].shape[1] * page_size
    return _schedule(a, num_seqs, rows, keys, a["q"].shape[-2], a["k"].shape[2], a["q"].shape[-1], page_size, ragged)


def _schedule(a: dict[str, Any], *sizes: object) -> torch.Tensor:
    options = [
        a["is_causal"],
        a["window_size_left"],
        a["window_size_right"],
        a.get("attention_chunk", 0),
        a["num_splits"],
        a["sm_margin"],
    ]
    return torch.cat(
        [torch.tensor([int(x) for x in (*sizes, *options) if x is not None], dtype=torch.int32), a["seqused_k"]]
    )
