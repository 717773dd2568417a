"""Rules that both libraries of attention for Intel GPUs check, and a function that shows a recorded signature."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from l4core.testing.contracts import Contract
from l4core.testing.doubles.attention import check

__all__ = ["check_bounds", "check_int32", "check_qkv", "check_table", "scales_of", "signed"]

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def signed(function: Any, contract: Contract) -> Any:
    """`function`, showing the recorded signature to `inspect`."""

    def call(*args: object, **kwargs: object) -> object:
        return function(*args, **kwargs)

    call.__signature__ = contract.signature(next(iter(contract.functions)))  # type: ignore[attr-defined]
    return call


def check_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    check(q.dtype in (torch.float16, torch.bfloat16), f"q is {q.dtype}; wanted float16 or bfloat16")
    check(k.dtype == v.dtype, "key and value must have the same dtype")
    check(k.dtype == q.dtype or k.dtype in FP8, "query and key must have the same dtype")
    check(q.dim() == 3 and k.dim() == 4, "q must be [tokens, heads, head_dim], k [pages, page size, heads, head_dim]")
    check(all(x.stride(-1) == 1 for x in (q, k, v)), "Input tensor must have contiguous last dimension")
    check(q.shape[1] % k.shape[2] == 0, "Number of heads in key/value must divide number of heads in query")


def check_table(table: torch.Tensor, name: str) -> None:
    check(table.dtype == torch.int32, f"{name} must have dtype torch.int32")
    check(table.stride(-1) == 1, f"{name} must have contiguous last dimension")


def check_int32(x: torch.Tensor, name: str, size: int) -> None:
    check(x.dtype == torch.int32 and x.is_contiguous(), f"{name} must be contiguous int32")
    check(tuple(x.shape) == (size,), f"{name} is {tuple(x.shape)}; wanted ({size},)")


def check_bounds(bounds: list[int], lengths: list[int], max_rows: int, max_keys: int) -> None:
    longest = max((end - start for start, end in pairwise(bounds)), default=0)
    check(longest <= max_rows, f"max_seqlen_q {max_rows} is below a sequence's {longest} rows")
    check(
        max(lengths, default=0) <= max_keys,
        f"max_seqlen_k {max_keys} is below a sequence's {max(lengths, default=0)} keys",
    )


def scales_of(
    k_scale: torch.Tensor | None, v_scale: torch.Tensor | None, k: torch.Tensor, num_seqs: int
) -> tuple[None, torch.Tensor | None, torch.Tensor | None]:
    """→ none for q, and those of k and v as [num_seqs, num_kv_heads]; none where KV is not fp8."""
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
