"""A conformance case as tensors on a device: memory as core lays it out, tables as core makes them, everything nobody owns poisoned with NaN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch

from l4core.attention.chunked import ring_width, single_chunk_metadata, tree_chunk_metadata, virtual_batches
from l4core.attention.smoke import on_device
from l4core.plugin_api import AttentionMetadata, ChunkInfo, KVView, TreeMask, Usable
from l4core.testing.conformance.cases import Case, Heads, Parents
from l4core.testing.conformance.expected import attention, depths, visible_keys

__all__ = ["K_SCALE", "V_SCALE", "Layout", "Problem", "build"]

NULL_PAGE = 0
SPARE_PAGES = 3
SPARE_COLUMNS = 2
LAYERS, OUR_LAYER = 2, 1
K_SCALE, V_SCALE = 0.5, 0.25
"""Of fp8 KV: different, so that a swap or an omission shows."""
FINITE_TAIL = 400.0
"""What stands past a sequence's end for a backend that needs something finite there: far off if it counted."""

Table: TypeAlias = Literal["ring", "full"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a case is laid out. page_stride: "free" = the pages of one layer lie apart, between those of others; "dense" = back to back, the layer
    being a base offset and the table counting units.  table: what a native_chunk backend gets.  columns: of the table, at least.
    num_pages: of the memory, at least; the pages used are then the last ones.  max_seqlen_k: the host bound, None = from the lengths.
    fill: False leaves memory that no one owns uninitialised (memory larger than what can be written in a test)."""

    page_size: int
    q_dtype: torch.dtype
    kv_dtype: torch.dtype
    page_stride: Literal["free", "dense"] = "free"
    table: Table = "ring"
    columns: int = 0
    num_pages: int = 0
    max_seqlen_k: int | None = None
    fill: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A case as tensors on the device. expected: float64 [T, num_q_heads, head_dim] on the CPU.  owned: bool [T], rows that have keys.
    memory: what `kv` is a view of."""

    meta: AttentionMetadata
    q: torch.Tensor
    kv: KVView
    expected: torch.Tensor
    owned: torch.Tensor
    memory: torch.Tensor


def build(
    case: Case, heads: Heads, layout: Layout, verdict: Usable, device: str, *, oracle: str = "cpu", seed: int = 0
) -> Problem:
    """Pages are dealt in random order, every slot no sequence owns holds NaN, only the null page is zero; tables are wider than needed and point
    at the null page there; queries are a slice of a packed q|k|v tensor. With `finite_tail` the rest of a sequence's last page is finite, and large.

    verdict: says whether the backend wants chunks natively and takes empty rows.  oracle: the device that computes what is expected.
    """
    draw = torch.Generator().manual_seed(seed)
    dense = [_stored(length, heads, layout.kv_dtype, draw) for length in case.seq_lens]
    num_tokens = sum(case.q_lens) + case.null_rows
    packed = torch.randn(num_tokens, heads.num_q_heads + 2 * heads.num_kv_heads, heads.head_dim, generator=draw)
    packed = (1.5 * packed).to(layout.q_dtype)
    memory, kv, table = _deal(
        case, heads, dense, layout, draw, device, tail=_tail(layout.kv_dtype) if verdict.finite_tail else math.nan
    )
    q = packed.to(device)[:, : heads.num_q_heads]
    owned = [length > 0 for length, n in zip(case.seq_lens, case.q_lens, strict=True) for _ in range(n)]
    return Problem(
        meta=on_device(_metadata(case, table, layout, verdict), device),
        q=q,
        kv=kv,
        expected=_expected(case, packed[:, : heads.num_q_heads].double(), dense, oracle),
        owned=torch.tensor(owned + [False] * case.null_rows),
        memory=memory,
    )


# ---------------------------------------------------------------- keys and values

Stored: TypeAlias = tuple[torch.Tensor, torch.Tensor]


def _scales(dtype: torch.dtype) -> tuple[float, float]:
    return (K_SCALE, V_SCALE) if dtype.itemsize == 1 else (1.0, 1.0)


def _stored(length: int, heads: Heads, dtype: torch.dtype, draw: torch.Generator) -> Stored:
    """k, v [length, num_kv_heads, head_dim] as stored: divided by their scale and rounded."""
    x = torch.randn(2, length, heads.num_kv_heads, heads.head_dim, generator=draw)
    k_scale, v_scale = _scales(dtype)
    return (x[0] / k_scale).to(dtype), (x[1] / v_scale).to(dtype)


def _expected(case: Case, q: torch.Tensor, dense: Sequence[Stored], oracle: str) -> torch.Tensor:
    out = torch.zeros_like(q)
    first = 0
    for b, (k, v) in enumerate(dense):
        rows = slice(first, first + case.q_lens[b])
        first = rows.stop
        if case.seq_lens[b]:
            k_scale, v_scale = _scales(k.dtype)
            out[rows] = attention(q[rows], k.double() * k_scale, v.double() * v_scale, visible_keys(case, b), oracle)
    return out


def _tail(dtype: torch.dtype) -> float:
    """As stored; float8_e4m3fnuz ends at 240 and makes NaN of more."""
    return min(FINITE_TAIL, torch.finfo(dtype).max)


def _deal(
    case: Case,
    heads: Heads,
    dense: Sequence[Stored],
    layout: Layout,
    draw: torch.Generator,
    device: str,
    *,
    tail: float,
) -> tuple[torch.Tensor, KVView, torch.Tensor]:
    """→ memory [num_pages, layers, 2, page_size, num_kv_heads, head_dim], our layer's view, and the full table [B, W] in the view's own pages. Of a
    chunked case only pages from the first query's chunk on exist, as core keeps them; entries of dropped pages point at the null page."""
    page_size, dtype = layout.page_size, layout.kv_dtype
    exact = (
        torch.float64 if dtype == torch.float64 else torch.float32
    )  # holds every stored value; not every dtype can be indexed
    counts = [-(-length // page_size) for length in case.seq_lens]
    used = sum(counts) + SPARE_PAGES
    num_pages = max(1 + used, layout.num_pages)
    shape = (num_pages, LAYERS, 2, page_size, heads.num_kv_heads, heads.head_dim)
    written = torch.full((used, *shape[1:]), torch.nan, dtype=exact)
    table = torch.full((len(counts) + case.null_rows, max(*counts, layout.columns) + SPARE_COLUMNS), NULL_PAGE)
    free = torch.randperm(used, generator=draw).tolist()
    for b, (length, queries) in enumerate(zip(case.seq_lens, case.q_lens, strict=True)):
        first = (length - queries) // case.chunk * case.chunk // page_size if case.chunk else 0
        pages, free = free[: counts[b] - first], free[counts[b] - first :]
        table[b, first : counts[b]] = torch.tensor(pages, dtype=torch.int64) + (num_pages - used)
        for which in (0, 1):
            own = torch.full((len(pages) * page_size, *shape[4:]), tail, dtype=exact)
            own[: length - first * page_size] = dense[b][which][first * page_size :].to(exact)
            written[pages, OUR_LAYER, which] = own.view(len(pages), *shape[3:])
    memory = torch.empty(shape, dtype=dtype, device=device)
    if layout.fill:
        memory[1 : num_pages - used] = torch.full(shape[1:], torch.nan).to(dtype).to(device)
    memory[NULL_PAGE] = torch.zeros(shape[1:]).to(dtype).to(device)
    memory[num_pages - used :] = written.to(dtype).to(device)
    return memory, *_view(memory, table, layout, device)


def _view(memory: torch.Tensor, table: torch.Tensor, layout: Layout, device: str) -> tuple[KVView, torch.Tensor]:
    """Our layer of the memory, and the table in that view's pages."""
    values = _scales(memory.dtype)
    k_scale, v_scale = (
        None if values == (1.0, 1.0) else torch.tensor(x, dtype=torch.float32, device=device) for x in values
    )
    if layout.page_stride == "free":
        k, v = memory[:, OUR_LAYER, 0], memory[:, OUR_LAYER, 1]
        return KVView(k=k, v=v, k_scale=k_scale, v_scale=v_scale), table.int()
    units = memory.flatten(0, 2)
    first, per_page = 2 * OUR_LAYER, 2 * LAYERS
    count = len(units) - first - 1
    k, v = units[first : first + count], units[first + 1 : first + 1 + count]
    return KVView(k=k, v=v, k_scale=k_scale, v_scale=v_scale), (table * per_page).int()


# ---------------------------------------------------------------- metadata


def _metadata(case: Case, table: torch.Tensor, layout: Layout, verdict: Usable) -> AttentionMetadata:
    lens = [*case.seq_lens, *[1] * case.null_rows]
    queries = [*case.q_lens, *[1] * case.null_rows]
    bound = layout.max_seqlen_k or (table.shape[1] * layout.page_size if case.loose else max(lens))
    meta = AttentionMetadata(
        cu_seqlens_q=torch.tensor([0, *queries]).cumsum(0).int(),
        seq_lens=torch.tensor(lens, dtype=torch.int32),
        block_table=table,
        max_seqlen_q=max(queries),
        max_seqlen_k=bound,
        num_seqs=len(lens),
        phase=case.phase,
        tree=None if case.trees is None else TreeMask(ancestors=_ancestors(case.trees)),
    )
    if case.chunk is None:
        return meta
    if case.trees is not None:
        shown = table if layout.table == "full" else _ring(table, case, layout.page_size)
        return tree_chunk_metadata(meta, shown, _positions(case), case.chunk, layout.page_size)
    if verdict.native_chunk:
        shown = table if layout.table == "full" or case.virtual > 2 else _ring(table, case, layout.page_size)
        return replace(meta, block_table=shown, chunk=ChunkInfo(size=case.chunk))
    return _split(case, meta, layout, verdict)


def _split(case: Case, meta: AttentionMetadata, layout: Layout, verdict: Usable) -> AttentionMetadata:
    """As core does for a backend that knows nothing of chunks. One that takes no empty rows gets one-row decodes where queries lie on both sides
    of a border."""
    assert case.chunk is not None
    page_size = layout.page_size
    table = meta.block_table if case.virtual > 2 else _ring(meta.block_table, case, page_size)
    if not case.virtual:
        return single_chunk_metadata(meta, table, case.chunk, page_size)
    if verdict.empty_rows:
        return virtual_batches(meta, table, case.chunk, page_size, case.virtual)
    queries = meta.cu_seqlens_q.diff()
    total = int(meta.cu_seqlens_q[-1])
    owner = torch.repeat_interleave(queries)
    row = torch.arange(total) - meta.cu_seqlens_q[owner]
    rows = replace(
        meta,
        cu_seqlens_q=torch.arange(total + 1, dtype=torch.int32),
        seq_lens=((meta.seq_lens - queries)[owner] + row + 1).int(),
        max_seqlen_q=1,
        num_seqs=total,
        phase="decode",
    )
    return single_chunk_metadata(rows, table[owner], case.chunk, page_size)


def _ring(table: torch.Tensor, case: Case, page_size: int) -> torch.Tensor:
    """The local group's table as core keeps it: page index p in column p % (2 · chunk / page)."""
    assert case.chunk is not None
    columns = ring_width(case.chunk, page_size)
    ring = torch.full((len(table), columns), NULL_PAGE, dtype=torch.int32)
    for row, entries in zip(ring, table.tolist(), strict=True):
        for index, page in enumerate(entries):
            if page != NULL_PAGE:
                row[index % columns] = page
    return ring


def _ancestors(trees: Sequence[Parents]) -> torch.Tensor:
    """int64 [T]; bit 63 makes a negative number."""
    words = []
    for parents in trees:
        own: list[int] = []
        for node, parent in enumerate(parents):
            own.append((1 << node) | (own[parent] if parent >= 0 else 0))
        words += [word - (1 << 64) if word >> 63 else word for word in own]
    return torch.tensor(words, dtype=torch.int64)


def _positions(case: Case) -> torch.Tensor:
    assert case.trees is not None
    prefixes = [length - n for length, n in zip(case.seq_lens, case.q_lens, strict=True)]
    return torch.tensor([p + d for p, tree in zip(prefixes, case.trees, strict=True) for d in depths(tree)])
