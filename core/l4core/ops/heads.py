"""From the product q | k | v to queries ready for attention, and keys and values in their pages: RoPE, QK norm, temperature, KV write.

What all layers of a step share is made once (`TorchHeads`, or its twin `heads_triton.TritonHeads`); what a layer does is its `HeadRule`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from l4core.ops.device import has_kernels
from l4core.ops.kv_write import kv_write
from l4core.ops.norm import qk_norm_
from l4core.ops.rope import rope_
from l4core.plugin_api import KVView


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRule:
    """What a layer does to its heads. rope: turns q and k.  chunked: by angles of p mod chunk, else of p.  qk_norm_eps: None = no norm.
    A layer without RoPE multiplies q by the temperature, where the model has one."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rope: bool
    chunked: bool
    qk_norm_eps: float | None


def has_heads_kernel(weight: torch.Tensor, kv_dtype: torch.dtype) -> bool:
    """Whether `heads_triton` runs beside such weights and writes such pages; the fp8 formats of gfx942 it does not know, the torch twin does."""
    return has_kernels(weight) and kv_dtype not in (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


class Heads(Protocol):
    """Made once a step."""

    def __call__(
        self, qkv: torch.Tensor, rule: HeadRule, group: str, pages: torch.Tensor, view: KVView
    ) -> torch.Tensor:
        """qkv [T, (Hq + 2 Hkv) · D], rows q | k | v, changed in place → q [T, Hq, D], a view of it.  Keys and values are written to `pages`
        [num_pages, 2, P, Hkv, D] of any page stride; `view` has their scales.  group: whose slots the tokens take."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchHeads:
    """slots: KV group name → (page, offset in the page) of each new token, int64 [T].  rope: chunked? → cos and sin [T, 1, D/2, 2].
    temperature: [T, 1, 1], None = off."""

    slots: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    rope: Mapping[bool, torch.Tensor]
    temperature: torch.Tensor | None

    def __call__(
        self, qkv: torch.Tensor, rule: HeadRule, group: str, pages: torch.Tensor, view: KVView
    ) -> torch.Tensor:
        num_tokens, num_qk = qkv.shape[0], rule.num_q_heads + rule.num_kv_heads
        heads = qkv.contiguous().view(num_tokens, num_qk + rule.num_kv_heads, rule.head_dim)  # [T, Hq+2Hkv, D]
        q, qk = heads[:, : rule.num_q_heads], heads[:, :num_qk]
        kv = heads[:, rule.num_q_heads :].view(num_tokens, 2, rule.num_kv_heads, rule.head_dim)
        if rule.rope:
            rope_(qk, self.rope[rule.chunked])
        if rule.qk_norm_eps is not None:
            qk_norm_(qk, rule.qk_norm_eps)
        if not rule.rope and self.temperature is not None:
            q.mul_(self.temperature)
        kv_write(pages, kv, *self.slots[group], view.k_scale, view.v_scale)
        return q
