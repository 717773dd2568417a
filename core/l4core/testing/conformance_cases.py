"""Attention cases and their answers in float64, computed from the definition: dense keys and a mask by position, no pages, no formulas of core's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from l4core.attention.chunked import single_chunk_metadata, virtual_batches
from l4core.plugin_api import AttentionMetadata, ChunkInfo, KVView, Usable

__all__ = ["Case", "Heads", "Problem", "build"]

NULL_PAGE = 0
SPARE_PAGES = 3
SPARE_COLUMNS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Sequences of `seq_lens` keys whose last `q_lens` positions are queried. chunk: tokens; position p then sees keys p // chunk * chunk … p.
    virtual: core splits sequences at chunk borders into that many virtual batches each; 0 = each sequence's queries lie in one chunk."""

    name: str
    seq_lens: Sequence[int]
    q_lens: Sequence[int]
    phase: Literal["decode", "prefill", "verify"]
    chunk: int | None = None
    virtual: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    num_q_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A case as tensors on the device. expected: float64 [T, num_q_heads, head_dim] on the CPU.  owned: bool [T], rows that have keys."""

    meta: AttentionMetadata
    q: torch.Tensor
    kv: KVView
    expected: torch.Tensor
    owned: torch.Tensor


def build(
    case: Case,
    heads: Heads,
    *,
    page_size: int,
    q_dtype: torch.dtype,
    kv_dtype: torch.dtype,
    verdict: Usable,
    device: str,
    seed: int = 0,
) -> Problem:
    """Pages are dealt in random order, every slot no sequence owns holds NaN, only the null page is zero; tables are wider than needed; queries
    are a slice of a packed q|k|v tensor; pages lie apart unless the backend wants them dense."""
    draw = torch.Generator().manual_seed(seed)
    scale = 0.5 if kv_dtype.itemsize == 1 else 1.0
    dense = [_dense(length, heads, kv_dtype, scale, draw) for length in case.seq_lens]
    num_tokens = sum(case.q_lens)
    packed = torch.randn(num_tokens, heads.num_q_heads + 2 * heads.num_kv_heads, heads.head_dim, generator=draw)
    packed = (1.5 * packed).to(q_dtype)
    q = packed[:, : heads.num_q_heads]
    kv, table = _deal(case, heads, dense, page_size, kv_dtype, verdict.page_stride, draw)
    meta = _metadata(case, table, page_size, native=verdict.native_chunk)
    scales = torch.tensor(scale, device=device) if scale != 1.0 else None
    return Problem(
        meta=_on(meta, device),
        q=packed.to(device)[:, : heads.num_q_heads],
        kv=KVView(k=kv[0].to(device)[:, 0], v=kv[1].to(device)[:, 0], k_scale=scales, v_scale=scales),
        expected=_expected(case, q.double(), [(k.double() * scale, v.double() * scale) for k, v in dense]),
        owned=torch.tensor(
            [length > 0 for length, n in zip(case.seq_lens, case.q_lens, strict=True) for _ in range(n)]
        ),
    )


def _dense(
    length: int, heads: Heads, dtype: torch.dtype, scale: float, draw: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """k, v [length, num_kv_heads, head_dim] as stored (already divided by the scale and rounded)."""
    shape = (2, length, heads.num_kv_heads, heads.head_dim)
    k, v = (torch.randn(shape, generator=draw) / scale).to(dtype)
    return k, v


def _expected(case: Case, q: torch.Tensor, dense: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """The definition: a query at position p sees the keys at positions p // chunk * chunk … p of its own sequence."""
    out = torch.zeros_like(q)
    first = 0
    for length, queries, (k, v) in zip(case.seq_lens, case.q_lens, dense, strict=True):
        rows = slice(first, first + queries)
        first += queries
        if not length:
            continue
        position, key = torch.arange(length - queries, length)[:, None], torch.arange(length)
        visible = key <= position
        if case.chunk is not None:
            visible = visible & (key // case.chunk == position // case.chunk)
        group = q.shape[1] // k.shape[1]
        scores = torch.einsum("nhd,khd->hnk", q[rows], k.repeat_interleave(group, dim=1)) * q.shape[2] ** -0.5
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        out[rows] = torch.einsum("hnk,khd->nhd", weights, v.repeat_interleave(group, dim=1))
    return out


def _deal(
    case: Case,
    heads: Heads,
    dense: Sequence[tuple[torch.Tensor, torch.Tensor]],
    page_size: int,
    dtype: torch.dtype,
    page_stride: str,
    draw: torch.Generator,
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """→ k and v memory [num_pages, layers, page_size, num_kv_heads, head_dim] (our layer is 0) and the full table [B, W]. Of a chunked case only
    pages from the first query's chunk on are kept, as core keeps them; table entries of dropped pages point at the null page."""
    counts = [-(-length // page_size) for length in case.seq_lens]
    num_pages = 1 + sum(counts) + SPARE_PAGES
    layers = 2 if page_stride == "free" else 1
    shape = (num_pages, layers, page_size, heads.num_kv_heads, heads.head_dim)
    memory = (torch.full(shape, torch.nan).to(dtype), torch.full(shape, torch.nan).to(dtype))
    for x in memory:
        x[NULL_PAGE] = 0
    table = torch.full((len(counts), max(counts) + SPARE_COLUMNS), NULL_PAGE, dtype=torch.int32)
    free = (torch.randperm(num_pages - 1, generator=draw) + 1).tolist()
    for b, (length, queries) in enumerate(zip(case.seq_lens, case.q_lens, strict=True)):
        first = (length - queries) // case.chunk * case.chunk // page_size if case.chunk else 0
        pages, free = free[: counts[b] - first], free[counts[b] - first :]
        table[b, first : counts[b]] = torch.tensor(pages, dtype=torch.int32)
        padding = counts[b] * page_size - length
        for x, stored in zip(memory, dense[b], strict=True):
            padded = torch.cat(
                [stored[first * page_size :], torch.full((padding, *stored.shape[1:]), torch.nan).to(dtype)]
            )
            x[pages, 0] = padded.view(len(pages), page_size, *stored.shape[1:])
    return memory, table


def _metadata(case: Case, table: torch.Tensor, page_size: int, *, native: bool) -> AttentionMetadata:
    meta = AttentionMetadata(
        cu_seqlens_q=torch.tensor([0, *case.q_lens]).cumsum(0).int(),
        seq_lens=torch.tensor(case.seq_lens, dtype=torch.int32),
        block_table=table,
        max_seqlen_q=max(case.q_lens),
        max_seqlen_k=max(case.seq_lens),
        num_seqs=len(case.seq_lens),
        phase=case.phase,
    )
    if case.chunk is None:
        return meta
    if native:
        return replace(meta, chunk=ChunkInfo(size=case.chunk))
    ring = _ring(table, case, page_size)
    if case.virtual:
        return virtual_batches(meta, ring, case.chunk, page_size, case.virtual)
    return single_chunk_metadata(meta, ring, case.chunk, page_size)


def _ring(table: torch.Tensor, case: Case, page_size: int) -> torch.Tensor:
    """The local group's table as core keeps it: page index p in column p % (2 · chunk / page)."""
    assert case.chunk is not None
    columns = 2 * case.chunk // page_size
    ring = torch.full((len(table), columns), NULL_PAGE, dtype=torch.int32)
    for row, entries in zip(ring, table.tolist(), strict=True):
        for index, page in enumerate(entries):
            if page != NULL_PAGE:
                row[index % columns] = page
    return ring


def _on(meta: AttentionMetadata, device: str) -> AttentionMetadata:
    return replace(
        meta,
        cu_seqlens_q=meta.cu_seqlens_q.to(device),
        seq_lens=meta.seq_lens.to(device),
        block_table=meta.block_table.to(device),
    )
