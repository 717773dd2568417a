"""The attention backend: one call a layer. Imported only when it was chosen."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from l4_cpu.library import Attention, load
from l4core.plugin_api import (
    AttentionBackend,
    AttentionContext,
    AttentionMetadata,
    AttentionRequirements,
    KVView,
    Plan,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """call: what is the same in all layers.  kept: the tensors it points to."""

    call: Attention
    kept: tuple[torch.Tensor, ...]


class CpuAttention(AttentionBackend):
    """Keys and values are read where they lie. Holds nothing of a step."""

    def __init__(self, kernels: ctypes.CDLL, req: AttentionRequirements, page_size: int, num_threads: int) -> None:
        self._kernels = kernels
        self._common = Attention(
            page_size=page_size,
            num_q_heads=req.num_q_heads,
            num_kv_heads=req.num_kv_heads,
            head_dim=req.head_dim,
            scale=req.head_dim**-0.5,
            is_bf16=req.q_dtype == "bfloat16",
            num_threads=num_threads,
        )

    def plan(self, meta: AttentionMetadata) -> Plan:
        if meta.chunk is not None:
            raise ValueError("the cpu backend takes no chunk; core splits chunks before")
        call = Attention.from_buffer_copy(self._common)
        rows, lens, table = meta.cu_seqlens_q.contiguous(), meta.seq_lens.contiguous(), meta.block_table
        table = table if table.stride(1) == 1 else table.contiguous()
        kept = [rows, lens, table]
        call.cu_seqlens_q, call.seq_lens, call.block_table = rows.data_ptr(), lens.data_ptr(), table.data_ptr()
        call.table_row, call.num_seqs = table.stride(0), meta.num_seqs
        if meta.tree is not None:
            ancestors, seen = meta.tree.ancestors.contiguous(), meta.tree.sees_prefix
            kept.append(ancestors)
            call.ancestors = ancestors.data_ptr()
            if seen is not None:
                kept.append(seen.contiguous())
                call.sees_prefix = kept[-1].data_ptr()
        return _Step(call=call, kept=tuple(kept))

    def attend(self, q: torch.Tensor, kv: KVView, plan: Plan, out: torch.Tensor) -> None:
        assert isinstance(plan, _Step)
        call = Attention.from_buffer_copy(plan.call)
        k, v = kv.k, kv.v
        call.q, call.k, call.v, call.out = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
        call.q_row, call.q_head, _ = q.stride()
        call.out_row, call.out_head, _ = out.stride()
        call.k_page, call.k_token, call.k_head, _ = k.stride()
        call.v_page, call.v_token, call.v_head, _ = v.stride()
        self._kernels.l4_attend(ctypes.byref(call))


def create(ctx: AttentionContext) -> AttentionBackend:
    """Raises BackendUnavailable when the library does not load."""
    return CpuAttention(load(ctx.platform.runtime), ctx.requirements, ctx.page_size, torch.get_num_threads())
