"""Attention through torch's scaled_dot_product_attention: the portable backend, and the fast one on a CPU.

On a CPU lengths are plain numbers: keys and values of exactly the tokens a sequence owns are gathered once and no padding is computed beyond
a bounded share. On an accelerator shapes come from host bounds only and masks do the rest: slower, right everywhere, no host sync.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from l4core.attention.gather import Gather, Scratch
from l4core.attention.sdpa_device import DevicePlan, attend_padded, plan_padded
from l4core.plugin_api import AttentionBackend, AttentionContext, AttentionMetadata, KVView, Plan

MAX_MASK_ELEMENTS = 1 << 22
"""Elements of the one causal mask a plan may hold (16 MB in float32); long contexts take fewer query rows at a time."""
MAX_QUERY_BLOCK = 512
MIN_FILL = 0.75
"""Decodes share a bucket when the shortest has at least this share of the longest's keys."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decodes:
    """Sequences with one query each and about equally many keys. rows: int64 [B] of q, None = all of q in order.  num_keys: of the longest.
    mask: [B, 1, 1, num_keys], 0 or −inf, None when all are equally long."""

    gather: Gather
    rows: torch.Tensor | None
    num_keys: int
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prefill:
    """One sequence: query rows [begin, end), the last num_queries of its num_keys tokens."""

    gather: Gather
    begin: int
    end: int
    num_keys: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _HostPlan:
    """mask: [query block, widest keys], its lower right corner causal; any smaller block's mask is a slice of it."""

    decodes: tuple[_Decodes, ...]
    prefills: tuple[_Prefill, ...]
    mask: torch.Tensor | None


class SdpaBackend(AttentionBackend):
    """Keeps scratch memory for gathered keys and values, used within a single `attend`."""

    def __init__(self, page_size: int, q_dtype: torch.dtype, *, host_lengths: bool) -> None:
        """host_lengths: lengths may be read on the host (a CPU)."""
        self._page_size, self._q_dtype = page_size, q_dtype
        self.host_lengths = host_lengths
        self._scratch = Scratch()

    def plan(self, meta: AttentionMetadata) -> Plan:
        if meta.tree is not None or meta.chunk is not None:
            raise ValueError("the sdpa backend takes neither a tree nor a chunk; core splits chunks before")
        if not self.host_lengths:
            return plan_padded(meta, self._page_size)
        return self._plan_on_host(meta)

    def attend(self, q: torch.Tensor, kv: KVView, plan: Plan, out: torch.Tensor) -> None:
        if isinstance(plan, DevicePlan):
            attend_padded(q, kv, plan, out)
            return
        assert isinstance(plan, _HostPlan)
        for decodes in plan.decodes:
            self._decode(q, kv, decodes, out)
        for prefill in plan.prefills:
            self._prefill(q, kv, prefill, plan.mask, out)

    # ------------------------------------------------------------ planning on the host

    def _plan_on_host(self, meta: AttentionMetadata) -> _HostPlan:
        rows, lens = meta.cu_seqlens_q.tolist(), meta.seq_lens.tolist()
        counts = [end - begin for begin, end in itertools.pairwise(rows)]
        live = [b for b in range(meta.num_seqs) if counts[b] > 0 and lens[b] > 0]
        buckets = _bucket([b for b in live if counts[b] == 1], lens)
        prefills = tuple(
            _Prefill(
                gather=self._gather(meta.block_table[b : b + 1], [lens[b]]),
                begin=rows[b],
                end=rows[b + 1],
                num_keys=lens[b],
            )
            for b in live
            if counts[b] > 1
        )
        return _HostPlan(
            decodes=tuple(self._plan_decodes(bucket, rows, lens, meta.block_table) for bucket in buckets),
            prefills=prefills,
            mask=self._corner_mask(prefills),
        )

    def _plan_decodes(self, bucket: list[int], rows: list[int], lens: list[int], table: torch.Tensor) -> _Decodes:
        own = [lens[b] for b in bucket]
        is_all = len(bucket) == len(lens) == rows[-1]
        mask = None
        if min(own) != max(own):
            hidden = torch.arange(max(own)) >= torch.tensor(own).unsqueeze(1)  # [B, num_keys]
            mask = torch.zeros(hidden.shape, dtype=self._q_dtype).masked_fill_(hidden, -torch.inf)[:, None, None]
        return _Decodes(
            gather=self._gather(table if is_all else table[torch.tensor(bucket)], own),
            rows=None if is_all else torch.tensor([rows[b] for b in bucket]),
            num_keys=max(own),
            mask=mask,
        )

    def _gather(self, table: torch.Tensor, lens: list[int]) -> Gather:
        """table [B, W], lens [B] → B · max(lens) keys, each sequence padded to the longest with the null page. numpy: a third of torch's time."""
        token = np.arange(max(lens))
        pages = table.numpy()[:, token // self._page_size].astype(np.int64)  # [B, num_keys]
        offsets = np.tile(token % self._page_size, (len(lens), 1))
        if min(lens) != max(lens):
            owned = token < np.array(lens)[:, None]
            pages, offsets = pages * owned, offsets * owned
        return Gather(torch.from_numpy(pages.ravel()), torch.from_numpy(offsets.ravel()), self._scratch)

    def _corner_mask(self, prefills: tuple[_Prefill, ...]) -> torch.Tensor | None:
        behind_prefix = [p for p in prefills if p.num_keys > p.end - p.begin]
        if not behind_prefix:
            return None
        num_keys = max(p.num_keys for p in behind_prefix)
        rows = min(MAX_QUERY_BLOCK, max(1, MAX_MASK_ELEMENTS // num_keys), max(p.end - p.begin for p in behind_prefix))
        full = torch.full((rows, num_keys), -torch.inf, dtype=self._q_dtype)
        return full.triu_(num_keys - rows + 1)

    # ------------------------------------------------------------ one layer

    def _decode(self, q: torch.Tensor, kv: KVView, plan: _Decodes, out: torch.Tensor) -> None:
        """Query heads of one KV head are the query rows of one attention: [B, Hkv, G, D] against [B, Hkv, S, D]."""
        k, v = plan.gather(kv, self._q_dtype)  # [B·S, Hkv, D]
        num_kv_heads, head_dim = k.shape[1:]
        rows = q if plan.rows is None else q.index_select(0, plan.rows)
        batch = rows.shape[0]
        result = F.scaled_dot_product_attention(
            rows.view(batch, num_kv_heads, -1, head_dim),
            k.view(batch, plan.num_keys, num_kv_heads, head_dim).transpose(1, 2),
            v.view(batch, plan.num_keys, num_kv_heads, head_dim).transpose(1, 2),
            attn_mask=plan.mask,
        )
        if plan.rows is None:
            out.view(result.shape).copy_(result)
        else:
            out.index_copy_(0, plan.rows, result.reshape(batch, -1, head_dim))

    def _prefill(
        self, q: torch.Tensor, kv: KVView, plan: _Prefill, mask: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        """KV heads are the batch, their query heads share keys of stride 0: [Hkv, G, n, D] against [Hkv, G, S, D]."""
        k, v = plan.gather(kv, self._q_dtype)  # [S, Hkv, D]
        num_kv_heads = k.shape[1]
        num_queries, prefix = plan.end - plan.begin, plan.num_keys - (plan.end - plan.begin)
        grouped = (num_queries, num_kv_heads, -1, k.shape[2])
        queries, result = (x[plan.begin : plan.end].view(grouped).permute(1, 2, 0, 3) for x in (q, out))
        keys, values = (x.permute(1, 0, 2).unsqueeze(1).expand(-1, queries.shape[1], -1, -1) for x in (k, v))
        if prefix == 0:
            result.copy_(F.scaled_dot_product_attention(queries, keys, values, is_causal=True))
            return
        assert mask is not None
        for begin in range(0, num_queries, mask.shape[0]):
            end = min(begin + mask.shape[0], num_queries)
            visible = prefix + end
            block = mask[mask.shape[0] - (end - begin) :, mask.shape[1] - visible :]
            result[:, :, begin:end] = F.scaled_dot_product_attention(
                queries[:, :, begin:end], keys[:, :, :visible], values[:, :, :visible], attn_mask=block
            )


def create(ctx: AttentionContext) -> AttentionBackend:
    host_lengths = torch.device(ctx.device).type == "cpu"
    return SdpaBackend(ctx.page_size, getattr(torch, ctx.requirements.q_dtype), host_lengths=host_lengths)


def _bucket(sequences: list[int], lens: list[int]) -> list[list[int]]:
    """Splits `sequences` so that none is padded by more than a third of its keys (or 64 of them, whichever is more); keeps their order."""
    buckets: list[list[int]] = []
    for b in sorted(sequences, key=lambda b: -lens[b]):
        longest = lens[buckets[-1][0]] if buckets else 0
        if buckets and (lens[b] >= MIN_FILL * longest or longest - lens[b] <= 64):
            buckets[-1].append(b)
        else:
            buckets.append([b])
    return [sorted(bucket) for bucket in buckets]
