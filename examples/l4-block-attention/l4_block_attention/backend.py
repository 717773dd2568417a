"""The backend. Imported only when it was chosen."""

import torch

from l4core.plugin_api import AttentionBackend, AttentionContext, AttentionMetadata, BackendUnavailable, KVView, Plan
from l4core.plugin_ops import gather_kv, merge_lse


def create(context: AttentionContext) -> AttentionBackend:
    text = context.options.get("block_tokens", "256")
    if not text.isdecimal() or int(text) < 1:
        raise BackendUnavailable(
            f"block_tokens is {text!r}; wanted a positive number", fix="--attention-option block_tokens=256"
        )
    return BlockAttention(max(1, int(text) // context.page_size))


class BlockAttention(AttentionBackend):
    def __init__(self, pages_per_block: int) -> None:
        self.pages_per_block = pages_per_block

    def plan(self, meta: AttentionMetadata) -> Plan:
        """Per sequence: (first query row, row after the last, number of keys, row of the block table). The CPU needs no sync for that."""
        bounds = meta.cu_seqlens_q.tolist()
        return list(zip(bounds[:-1], bounds[1:], meta.seq_lens.tolist(), meta.block_table, strict=True))

    def attend(self, q: torch.Tensor, kv: KVView, plan: Plan, out: torch.Tensor) -> None:
        assert isinstance(plan, list)
        for begin, end, num_keys, pages in plan:
            out[begin:end] = self.sequence(q[begin:end].float(), kv, pages, num_keys)

    def sequence(self, q: torch.Tensor, kv: KVView, pages: torch.Tensor, num_keys: int) -> torch.Tensor:
        """q: float32 [n, num_q_heads, head_dim], the last n positions of a sequence of num_keys."""
        out, lse = torch.zeros_like(q), torch.full(q.shape[:2], -torch.inf)
        block, group = self.pages_per_block * kv.k.shape[1], q.shape[1] // kv.k.shape[2]
        for first in range(0, num_keys, block):
            mine = pages[first // kv.k.shape[1] :][: self.pages_per_block]
            k, v = (x[: num_keys - first].repeat_interleave(group, dim=1) for x in gather_kv(kv, mine, torch.float32))
            visible = (
                torch.arange(first, first + len(k)) <= torch.arange(num_keys - len(q), num_keys)[:, None]
            )  # [n, keys]
            scores = torch.einsum("nhd,khd->nhk", q, k) * q.shape[2] ** -0.5
            scores = scores.masked_fill(~visible[:, None], -torch.inf)
            part_lse = scores.logsumexp(-1)
            weights = (scores - part_lse[..., None]).exp().nan_to_num(0.0)  # a row that sees nothing here: −inf − −inf
            out, lse = merge_lse(out, lse, torch.einsum("nhk,khd->nhd", weights, v), part_lse)
        return out
