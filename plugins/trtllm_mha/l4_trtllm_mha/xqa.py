"""The sibling on Hopper: the same decode call, which FlashInfer serves there through XQA.

XQA takes one query row a sequence, contiguous queries in bf16 or fp16 (also beside fp8 KV), and returns no log-sum-exp. So a batch of more rows is
cut into rows: row i of n becomes a sequence of its own with seq_len - n + i + 1 keys and the same table. Exact, and slow for a long prefill, where
each row reads its keys again: this is for trying the plugin out where no Blackwell device is at hand.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from l4_trtllm_mha.calls import Calls, check_strides
from l4core.plugin_api import AttentionBackend, AttentionMetadata, AttentionRequirements, KVView, Plan


@dataclass(slots=True, kw_only=True)
class Rows:
    """What the kernel is given. lengths: int32 [rows], at least 1 (an empty row reads the null page).  table: int32 [rows, W]."""

    lengths: torch.Tensor
    table: torch.Tensor


@dataclass(slots=True, kw_only=True)
class XqaPlan:
    """rows: of one layer's call; made by the first layer where the number of query rows is not known before."""

    meta: AttentionMetadata
    rows: Rows | None = field(default=None)


class XqaBackend(AttentionBackend):
    """Holds the scratch memory that the kernels of all layers use one after another, nothing of a step."""

    def __init__(self, calls: Calls, req: AttentionRequirements, device: str, workspace_bytes: int) -> None:
        self._calls = calls
        self._scale = req.head_dim**-0.5
        self._workspace = torch.zeros(
            workspace_bytes, dtype=torch.uint8, device=device
        )  # semaphores stand in its first 8 MiB

    def plan(self, meta: AttentionMetadata) -> Plan:
        if meta.tree is not None:
            raise ValueError("the XQA kernels take no tree; this backend declares none on Hopper")
        if meta.phase == "decode":
            return XqaPlan(meta=meta, rows=Rows(lengths=meta.seq_lens.clamp(min=1), table=meta.block_table))
        return XqaPlan(meta=meta)

    def attend(self, q: torch.Tensor, kv: KVView, plan: Plan, out: torch.Tensor) -> None:
        assert isinstance(plan, XqaPlan)
        check_strides(kv)
        if plan.rows is None:
            plan.rows = one_row_each(plan.meta, q.shape[0])
        target = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
        self._calls.decode(
            query=q.contiguous(),  # the kernel ignores strides of queries
            kv_cache=(kv.k, kv.v),
            workspace_buffer=self._workspace,
            block_tables=plan.rows.table,
            seq_lens=plan.rows.lengths,
            max_seq_len=plan.meta.max_seqlen_k,
            bmm1_scale=self._scale if kv.k_scale is None else kv.k_scale * self._scale,
            bmm2_scale=1.0 if kv.v_scale is None else kv.v_scale,
            out=target,
            kv_layout="NHD",
            backend="xqa",
            q_len_per_req=1,
        )
        if target is not out:
            out.copy_(target)


def one_row_each(meta: AttentionMetadata, num_tokens: int) -> Rows:
    """Each of num_tokens query rows as a sequence of its own; device work of fixed shape. Rows past the last sequence read the null page."""
    row = torch.arange(num_tokens, device=meta.cu_seqlens_q.device, dtype=torch.int32)
    owner = torch.searchsorted(meta.cu_seqlens_q, row, right=True, out_int32=True) - 1
    owned = row < meta.cu_seqlens_q[-1]
    owner = owner.clamp(max=meta.num_seqs - 1).long()
    lengths = meta.seq_lens[owner] - (meta.cu_seqlens_q[owner + 1] - row) + 1
    table = meta.block_table[owner]
    return Rows(
        lengths=torch.where(owned, lengths, 1).clamp(min=1).int(),
        table=torch.where(owned.unsqueeze(1), table, 0),
    )
