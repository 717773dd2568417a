"""Intel GPU attention operators on a CPU: the rules of vllm-xpu-kernels' `varlen_fwd` and of sgl-kernel-xpu's `fwd`, then plain torch.

The rules are facts of the libraries' source and of the messages in their binaries. The Python function over each operator is a thin one with the
recorded signature; of vllm-xpu-kernels it keeps what a caller can trip over: the rule on scales, the rewriting of small uniform batches into
one-row decodes, and the slow fallback with a warning where a kernel was not compiled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from l4core.testing.contracts import Contract
from l4core.testing.double_attention import Mask, check, paged_attention

__all__ = ["COMPILED", "OPERATOR", "bodies", "modules"]

OPERATOR: Mapping[str, str] = {"_vllm_fa2_C": "varlen_fwd", "sgl_kernel": "fwd"}
"""Namespace → the attention operator."""

COMPILED: Mapping[str, str] = {"_vllm_fa2_C": "vllm_xpu_kernels._vllm_fa2_C", "sgl_kernel": "sgl_kernel.common_ops"}
"""Namespace → the module whose import registers the operators."""

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SMALL_UNIFORM = 16
COMPILED_DECODE: Mapping[int, tuple[int, ...]] = {64: (16, 64), 128: (64,), 256: (16, 64), 512: (64,)}
"""vllm-xpu-kernels' default build: head_dim → page sizes of plain decode for groups up to 8 (multiples of 64 share one kernel)."""
COMPILED_PREFILL = (64, 128, 192, 256, 512)
SGL_HEAD_DIMS = (64, 96, 128, 192, 256, 512)
SGL_PAGE_SIZES = (64, 128)
SGL_LARGEST_GROUP = 16


def bodies(not_compiled: str) -> Mapping[str, Callable[[dict[str, Any]], Any]]:
    return {"varlen_fwd": partial(varlen_fwd, not_compiled=not_compiled), "fwd": fwd}


def modules(namespace: str, contract: Contract) -> Mapping[str, Mapping[str, object]]:
    """What importing the library makes importable, parents first."""
    if namespace == "sgl_kernel":
        function = partial(_sgl_function, contract)
        return {"sgl_kernel": {}, "sgl_kernel.flash_attn": {"flash_attn_with_kvcache": _signed(function, contract)}}
    function = _signed(partial(_vllm_function, contract), contract)
    home = {"flash_attn_varlen_func": function}
    return {"vllm_xpu_kernels": home, "vllm_xpu_kernels._vllm_fa2_C": {}, "vllm_xpu_kernels.flash_attn_interface": home}


def _signed(function: Any, contract: Contract) -> Any:
    """The function, showing the recorded signature to `inspect`."""

    def call(*args: object, **kwargs: object) -> object:
        return function(*args, **kwargs)

    call.__signature__ = contract.signature(next(iter(contract.functions)))  # type: ignore[attr-defined]
    return call


# ---------------------------------------------------------------- vllm-xpu-kernels


def varlen_fwd(a: dict[str, Any], not_compiled: str) -> list[torch.Tensor]:
    """→ [out, log-sum-exp or an empty tensor]"""
    q, k, v, out = a["q"], a["k"], a["v"], a["out"]
    _check_qkv(q, k, v)
    check(q.shape[-1] * q.dtype.itemsize % 16 == 0, "the last dimension must be a multiple of 16 bytes")
    check(a["block_table"] is not None and a["seqused_k"] is not None, "the double is for paged memory only")
    _check_table(a["block_table"], "block_table")
    _check_page_strides(k, v)
    num_seqs = len(a["cu_seqlens_q"]) - 1
    for name, size in (("cu_seqlens_q", num_seqs + 1), ("cu_seqlens_k", num_seqs + 1), ("seqused_k", num_seqs)):
        _check_int32(a[name], name, size)
    check(not a["return_softmax"], "softmax_lse output is only supported when is_paged=false")
    decode = a["max_seqlen_q"] == 1
    _check_compiled(q, k, decode, not_compiled)
    scales = _scales(a["k_scale"], a["v_scale"], k, num_seqs)
    bounds, lengths = a["cu_seqlens_q"].tolist(), a["seqused_k"].tolist()
    _check_bounds(bounds, lengths, a["max_seqlen_q"], a["max_seqlen_k"])
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


def _vllm_function(contract: Contract, *args: object, **kwargs: object) -> object:
    bound = contract.bind(next(iter(contract.functions)), *args, **kwargs)
    bound.apply_defaults()
    a = bound.arguments
    for name in ("q_descale", "k_descale", "v_descale"):
        scale = a[name]
        single = scale is None or scale.untyped_storage().nbytes() == scale.element_size()
        check(single, f"{name} must be view of single scalar tensor")
    if (a["k_descale"] is None) != (a["v_descale"] is None):
        raise NotImplementedError("FA2 only supports both KV cache descaled")
    given = _vllm_arguments(a)
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


def _vllm_arguments(a: dict[str, Any]) -> dict[str, Any]:
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
        descale=_scales(a["k_descale"], a["v_descale"], a["k"], len(lengths)),
    )
    out: torch.Tensor = torch.empty_like(a["q"]) if a["out"] is None else a["out"]
    return out.copy_(found)


# ---------------------------------------------------------------- sgl-kernel-xpu


def fwd(a: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """→ out, log-sum-exp (never filled for paged batches), two empty tensors. `cu_seqlens_k` carries each sequence's number of keys."""
    q, k, v, out = a["q"], a["k"], a["v"], a["out"]
    _check_qkv(q, k, v)
    check(k.shape[3] in SGL_HEAD_DIMS, f"Unsupported head size for paged decode attention: {k.shape[3]}")
    check(k.shape[1] in SGL_PAGE_SIZES, f"Unsupported page size for decode attention: {k.shape[1]}")
    check(q.shape[1] // k.shape[2] <= SGL_LARGEST_GROUP, f"Unsupported q_group_size: {q.shape[1] // k.shape[2]}")
    dense = all(x.stride(0) == x.shape[1] * x.stride(1) for x in (k, v))
    check(dense, "pages must lie back to back: a free stride of prefill was never seen to work")
    check(a["page_table"] is not None, "the double is for paged memory only")
    _check_table(a["page_table"], "page_table")
    num_seqs = len(a["cu_seqlens_q"]) - 1
    _check_int32(a["cu_seqlens_q"], "cu_seqlens_q", num_seqs + 1)
    _check_int32(a["cu_seqlens_k"], "cu_seqlens_k", num_seqs)
    scales = _scales(a["k_descale"], a["v_descale"], k, num_seqs)
    bounds, lengths = a["cu_seqlens_q"].tolist(), a["cu_seqlens_k"].tolist()
    _check_bounds(bounds, lengths, a["max_seqlen_q"], a["max_seqlen_k"])
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


def _sgl_function(contract: Contract, *args: object, **kwargs: object) -> object:
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


# ---------------------------------------------------------------- rules of both


def _check_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    check(q.dtype in (torch.float16, torch.bfloat16), f"q is {q.dtype}; wanted float16 or bfloat16")
    check(k.dtype == v.dtype, "key and value must have the same dtype")
    check(k.dtype == q.dtype or k.dtype in FP8, "query and key must have the same dtype")
    check(q.dim() == 3 and k.dim() == 4, "q must be [tokens, heads, head_dim], k [pages, page size, heads, head_dim]")
    check(all(x.stride(-1) == 1 for x in (q, k, v)), "Input tensor must have contiguous last dimension")
    check(q.shape[1] % k.shape[2] == 0, "Number of heads in key/value must divide number of heads in query")


def _check_table(table: torch.Tensor, name: str) -> None:
    check(table.dtype == torch.int32, f"{name} must have dtype torch.int32")
    check(table.stride(-1) == 1, f"{name} must have contiguous last dimension")


def _check_int32(x: torch.Tensor, name: str, size: int) -> None:
    check(x.dtype == torch.int32 and x.is_contiguous(), f"{name} must be contiguous int32")
    check(tuple(x.shape) == (size,), f"{name} is {tuple(x.shape)}; wanted ({size},)")


def _check_bounds(bounds: list[int], lengths: list[int], max_rows: int, max_keys: int) -> None:
    longest = max((end - start for start, end in pairwise(bounds)), default=0)
    check(longest <= max_rows, f"max_seqlen_q {max_rows} is below a sequence's {longest} rows")
    check(
        max(lengths, default=0) <= max_keys,
        f"max_seqlen_k {max_keys} is below a sequence's {max(lengths, default=0)} keys",
    )


def _scales(
    k_scale: torch.Tensor | None, v_scale: torch.Tensor | None, k: torch.Tensor, num_seqs: int
) -> tuple[None, torch.Tensor | None, torch.Tensor | None]:
    if k.dtype not in FP8:
        return None, None, None
    check(k_scale is not None and v_scale is not None, "FP8 KV cache requires both k_scale and v_scale tensors")
    found = []
    for scale in (k_scale, v_scale):
        assert scale is not None
        check(scale.dtype == torch.float32, "FP8 KV scales must be float32")
        single = all(stride == 0 or size == 1 for size, stride in zip(scale.shape, scale.stride(), strict=True))
        check(single, "FP8 KV scales must be views of a single element")
        found.append(scale.flatten()[0].expand(num_seqs, k.shape[2]))
    return None, found[0], found[1]
