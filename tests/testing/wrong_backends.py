"""A plugin whose backend `right` is right (chunks, trees, fp8 taken natively), and others that each have one mistake backends really make."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from l4core.attention.sdpa import SdpaBackend
from l4core.plugin_api import (
    PLUGIN_API,
    AttentionBackend,
    AttentionBackendEntry,
    AttentionContext,
    AttentionMetadata,
    AttentionRequirements,
    KVView,
    Plan,
    Platform,
    Tier,
    Unusable,
    Usable,
    hookimpl,
)
from l4core.plugin_ops import merge_lse


@dataclass(frozen=True, kw_only=True)
class Rows:
    """One sequence of a plan: its query rows, its table row, key slots and what each row sees of them."""

    begin: int
    end: int
    table: torch.Tensor
    slots: torch.Tensor  # int64 [S], from the first slot that is looked at
    visible: torch.Tensor  # bool [n, S]
    prefix: int  # of `slots`, those before the first tree node (all without a tree)


class Right(AttentionBackend):
    """Reads lengths on the host, gathers keys token by token, masks explicitly."""

    def __init__(self, context: AttentionContext) -> None:
        self.page_size = context.page_size
        self.chunk_size = context.requirements.chunk_size

    def plan(self, meta: AttentionMetadata) -> Plan:
        bounds, lens = meta.cu_seqlens_q.tolist(), meta.seq_lens.tolist()
        return [
            self.rows(meta, b, bounds[b], bounds[b + 1], lens[b])
            for b in range(meta.num_seqs)
            if bounds[b + 1] > bounds[b] and lens[b]
        ]

    def rows(self, meta: AttentionMetadata, b: int, begin: int, end: int, num_keys: int) -> Rows:
        n = end - begin
        position = torch.arange(num_keys - n, num_keys)[:, None]
        chunk = meta.chunk.size if meta.chunk else None
        first = self.first(num_keys - n, chunk) if chunk else 0
        slots = torch.arange(first, num_keys)
        visible = self.causal(slots, position, chunk)
        if meta.tree is not None:
            visible = self.tree(meta, begin, n, num_keys)
        return Rows(
            begin=begin,
            end=end,
            table=self.table(meta, b),
            slots=slots,
            visible=visible,
            prefix=num_keys - n if meta.tree is not None else len(slots),
        )

    def table(self, meta: AttentionMetadata, b: int) -> torch.Tensor:
        return meta.block_table[b]

    def first(self, position: int, chunk: int) -> int:
        return position // chunk * chunk

    def causal(self, slot: torch.Tensor, position: torch.Tensor, chunk: int | None) -> torch.Tensor:
        """slot [S], position [n, 1] → bool [n, S]."""
        seen = slot <= position
        return seen & (slot >= position // chunk * chunk) if chunk else seen

    def tree(self, meta: AttentionMetadata, begin: int, n: int, num_keys: int) -> torch.Tensor:
        assert meta.tree is not None
        words = meta.tree.ancestors[begin : begin + n, None]
        nodes = (words >> torch.arange(n)) & 1 == 1
        seen = meta.tree.sees_prefix
        prefix = torch.ones(n, dtype=torch.bool) if seen is None else seen[begin : begin + n]
        return torch.cat([prefix[:, None].expand(n, num_keys - n), nodes], 1)

    def page_index(self, slot: torch.Tensor) -> torch.Tensor:
        return slot // self.page_size

    def read(self, kv: KVView, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        pages = rows.table[self.page_index(rows.slots) % len(rows.table)].long()
        k, v = (_tokens(x, pages, rows.slots % self.page_size) for x in (kv.k, kv.v))
        return self.scaled(k, kv.k_scale), v if kv.v_scale is None else v * kv.v_scale

    def scaled(self, k: torch.Tensor, k_scale: torch.Tensor | None) -> torch.Tensor:
        return k if k_scale is None else k * k_scale

    def attend(self, q: torch.Tensor, kv: KVView, plan: Plan, out: torch.Tensor) -> None:
        assert isinstance(plan, list)
        for rows in plan:
            k, v = self.read(kv, rows)
            group = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            mine = q[rows.begin : rows.end].float()
            parts = [
                part(mine, k[where], v[where], rows.visible[:, where])
                for where in (slice(0, rows.prefix), slice(rows.prefix, None))
            ]
            (a, lse_a), (b, lse_b) = parts
            out[rows.begin : rows.end] = merge_lse(a, self.lse(lse_a), b, self.lse(lse_b))[0].to(out.dtype)

    def lse(self, natural: torch.Tensor) -> torch.Tensor:
        return natural


def _tokens(x: torch.Tensor, pages: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Through bytes, since not every dtype can be indexed."""
    return x.view(torch.uint8)[pages, offsets].view(x.dtype).float()


def part(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q [n, H, D] over k, v [S, H, D] → normalised output and natural LSE [n, H]."""
    scores = torch.einsum("nhd,khd->nhk", q, k) * q.shape[2] ** -0.5
    lse = (
        scores.masked_fill(~visible[:, None], -torch.inf).logsumexp(-1)
        if len(k)
        else scores.new_full(q.shape[:2], -torch.inf)
    )
    weights = (scores - lse[..., None]).exp().masked_fill(~visible[:, None], 0.0)
    return torch.einsum("nhk,khd->nhd", weights, v), lse


class WindowInsteadOfChunk(Right):
    def rows(self, meta: AttentionMetadata, b: int, begin: int, end: int, num_keys: int) -> Rows:
        rows = super().rows(meta, b, begin, end, num_keys)
        if meta.chunk is None:
            return rows
        slots = torch.arange(max(0, num_keys - (end - begin) - meta.chunk.size + 1), num_keys)
        position = torch.arange(num_keys - (end - begin), num_keys)[:, None]
        seen = (slots <= position) & (slots > position - meta.chunk.size)
        return Rows(begin=begin, end=end, table=rows.table, slots=slots, visible=seen, prefix=len(slots))


class ChunkBySlot(Right):
    """Sees the border where the nodes' slots cross it, not their positions."""

    def tree(self, meta: AttentionMetadata, begin: int, n: int, num_keys: int) -> torch.Tensor:
        visible = super().tree(meta, begin, n, num_keys)
        if meta.tree is None or meta.tree.sees_prefix is None or self.chunk_size is None:
            return visible
        past = torch.arange(num_keys - n, num_keys) >= self.chunk_size
        visible[:, : num_keys - n] = ~past[:, None]
        return visible


class BorderOffByOne(Right):
    def first(self, position: int, chunk: int) -> int:
        return max(0, position - 1) // chunk * chunk

    def causal(self, slot: torch.Tensor, position: torch.Tensor, chunk: int | None) -> torch.Tensor:
        if chunk is None:
            return super().causal(slot, position, chunk)
        return (slot <= position) & (slot >= (position - 1).clamp(min=0) // chunk * chunk)


class ReadsTheNextPage(Right):
    def page_index(self, slot: torch.Tensor) -> torch.Tensor:
        return (slot + 1) // self.page_size


class FullAttention(Right):
    def rows(self, meta: AttentionMetadata, b: int, begin: int, end: int, num_keys: int) -> Rows:
        slots = torch.arange(num_keys)
        if meta.tree is not None:
            return super().rows(meta, b, begin, end, num_keys)
        position = torch.arange(num_keys - (end - begin), num_keys)[:, None]
        return Rows(
            begin=begin, end=end, table=self.table(meta, b), slots=slots, visible=slots <= position, prefix=num_keys
        )


class BatchZeroTable(Right):
    def table(self, meta: AttentionMetadata, b: int) -> torch.Tensor:
        return meta.block_table[0]


class MissingKScale(Right):
    def scaled(self, k: torch.Tensor, k_scale: torch.Tensor | None) -> torch.Tensor:
        return k


class BaseTwoLse(Right):
    def lse(self, natural: torch.Tensor) -> torch.Tensor:
        return natural / math.log(2)


class StalePlan(Right):
    def plan(self, meta: AttentionMetadata) -> Plan:
        self.last = super().plan(meta)
        return self.last

    def attend(self, q: torch.Tensor, kv: KVView, plan: Plan, out: torch.Tensor) -> None:
        super().attend(q, kv, self.last, out)


class HostSync(SdpaBackend):
    """Device arithmetic only, but for one look at the longest sequence."""

    def __init__(self, context: AttentionContext) -> None:
        super().__init__(context.page_size, getattr(torch, context.requirements.q_dtype), host_lengths=False)

    def plan(self, meta: AttentionMetadata) -> Plan:
        assert int(meta.seq_lens.max()) >= 0
        return super().plan(meta)


BACKENDS = {
    "right": Right,
    "window instead of chunk": WindowInsteadOfChunk,
    "chunk by slot": ChunkBySlot,
    "border off by one": BorderOffByOne,
    "reads the next page": ReadsTheNextPage,
    "full attention": FullAttention,
    "batch-0 table": BatchZeroTable,
    "missing k_scale": MissingKScale,
    "base-2 LSE": BaseTwoLse,
    "stale plan": StalePlan,
    "host sync": HostSync,
}


def probe(platform: Platform, requirements: AttentionRequirements) -> Usable | Unusable:
    if requirements.kv_dtype not in ("float32", "bfloat16", "float8_e4m3fn") or requirements.needs_graph:
        return Unusable(reason=f"KV {requirements.kv_dtype}, graph {requirements.needs_graph}; wanted neither")
    return Usable(tier=Tier.PORTABLE, native_chunk=True, tree_mask=True, provider="torch")


def probe_host_sync(platform: Platform, requirements: AttentionRequirements) -> Usable | Unusable:
    if requirements.q_dtype != "float32" or requirements.needs_tree or requirements.needs_graph:
        return Unusable(reason="float32 without trees or graphs only")
    return Usable(tier=Tier.PORTABLE, provider="torch")


@hookimpl
def l4_attention_backends() -> list[AttentionBackendEntry]:
    return [
        AttentionBackendEntry(
            name=name,
            api=PLUGIN_API,
            probe=probe_host_sync if name == "host sync" else probe,
            create=f"testing.wrong_backends:{made.__name__}",
        )
        for name, made in BACKENDS.items()
    ]
