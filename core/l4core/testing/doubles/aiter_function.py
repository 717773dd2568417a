"""AITER's `unified_attention` on a CPU: a function of the recorded signature that keeps the kernel's rules and computes in plain torch.

It is a Triton kernel behind a Python function, so there is no operator schema. The kernel itself runs under Triton's interpreter where AITER is at
hand (plugins/aiter/tests/test_vendor_kernel.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch

from l4core.testing.contracts import Contract
from l4core.testing.doubles.attention import Mask, check, paged_attention

__all__ = ["modules"]

TILE = 64
FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)


def modules(contract: Contract, calls: list[dict[str, Any]]) -> Mapping[str, Mapping[str, object]]:
    """What importing AITER makes importable, parents first. calls: grows by each call's arguments."""
    name = next(iter(contract.functions))
    module, _, function = name.partition(":")
    parents = module.split(".")

    def unified_attention(*args: object, **kwargs: object) -> torch.Tensor:
        bound = contract.bind(name, *args, **kwargs)
        bound.apply_defaults()
        calls.append(dict(bound.arguments))
        return _unified_attention(bound.arguments)

    unified_attention.__signature__ = contract.signature(name)  # type: ignore[attr-defined]
    homes: dict[str, dict[str, object]] = {".".join(parents[: i + 1]): {} for i in range(len(parents))}
    homes[module][function] = unified_attention
    return homes


def _unified_attention(a: Mapping[str, Any]) -> torch.Tensor:
    q, k, v, out = a["q"], a["k"], a["v"], a["out"]
    _check(a)
    decode = a["max_seqlen_q"] == 1
    num_seqs = len(a["seqused_k"])
    bounds, lengths = a["cu_seqlens_q"].tolist(), a["seqused_k"].tolist()
    if decode:  # one program a sequence and one row each, whatever cu_seqlens_q says
        check(
            q.shape[0] == num_seqs,
            f"{q.shape[0]} rows for {num_seqs} sequences of one row: the reduction runs over rows",
        )
        bounds = list(range(num_seqs + 1))
    longest = max(end - start for start, end in pairwise(bounds))
    check(longest <= a["max_seqlen_q"], f"max_seqlen_q {a['max_seqlen_q']} is below a sequence's {longest} rows")
    scales = (None, *(_expand(a[name], num_seqs, k.shape[2]) for name in ("k_descale", "v_descale")))
    found, _ = paged_attention(
        q,
        k,
        v,
        bounds=bounds,
        lengths=lengths,
        table=a["block_table"],
        scale=a["softmax_scale"],
        mask=Mask(causal=True),
        descale=(None, scales[1], scales[2]),
        reads_tail=k.shape[1] == TILE,
    )
    out.copy_(found)
    return torch.as_tensor(out)


def _check(a: Mapping[str, Any]) -> None:
    q, k, v = a["q"], a["k"], a["v"]
    check(a["causal"], "Only causal attention is supported")
    check(tuple(a["window_size"]) == (-1, -1) and not a["softcap"], "the double does no window and no softcap")
    unused = ("q_descale", "q_scales", "alibi_slopes", "output_scale", "qq_bias", "sinks")
    given = [name for name in unused if a.get(name) is not None]
    check(not given, f"the double does no {', '.join(given)}")
    check(k.dtype == v.dtype and (k.dtype == q.dtype or k.dtype in FP8), f"q is {q.dtype}, k {k.dtype}, v {v.dtype}")
    scaled = a["k_descale"] is not None and a["v_descale"] is not None
    check(scaled or k.dtype not in FP8, "fp8 KV wants both scales: the kernel multiplies only where both are given")
    check(k.shape[1] % 16 == 0, f"page size {k.shape[1]}; wanted a multiple of 16")
    check(k.shape[1] >= TILE, f"page size {k.shape[1]}: a tile of {TILE} keys reads the table past a row's end")
    for name in ("cu_seqlens_q", "seqused_k", "block_table"):
        check(
            a[name].dtype == torch.int32 and a[name].stride(-1) == 1, f"{name} must be int32, last dimension contiguous"
        )
    check(bool((a["seqused_k"] > 0).all()), "a sequence without keys: the reduction divides by its number of tiles")


def _expand(scale: torch.Tensor | None, num_seqs: int, num_kv_heads: int) -> torch.Tensor | None:
    if scale is None:
        return None
    check(scale.dtype == torch.float32, f"a scale is {scale.dtype}; wanted float32")
    return scale.flatten()[0].expand(num_seqs, num_kv_heads)
