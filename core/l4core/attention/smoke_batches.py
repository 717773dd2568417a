"""The tiny batches of the smoke check: decode, prefill, verify, the same inside a chunk and over its border, trees; what was asked for, no more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch

from l4core.attention.chunked import ring_width, single_chunk_metadata, tree_chunk_metadata, virtual_batches
from l4core.plugin_api import AttentionMetadata, AttentionRequirements, ChunkInfo, TreeMask, Usable

UNOWNED = float("nan")
"""What slots hold that no sequence owns. KV memory is not cleared, so it may be there in earnest; one such key read spoils the output."""

FINITE_TAIL = 100.0
"""The same for a backend that needs something finite past a sequence's end: far off if it counted."""

Phase: TypeAlias = Literal["decode", "prefill", "verify"]
NULL_PAGE = 0
MIN_CHUNK = 4
MAX_NODES = 64
SEED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One call to check. q: float64 [T, num_q_heads, head_dim].  k, v: float32 [num_pages, page_size, num_kv_heads, head_dim].
    owned: bool [T], rows of `out` that count.  meta: for the backend.  plain: the same without `chunk`, for the oracle."""

    name: str
    meta: AttentionMetadata
    plain: AttentionMetadata
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    owned: torch.Tensor


def batches(verdict: Usable, req: AttentionRequirements, page_size: int) -> Iterator[Batch]:
    """All that `req` asks for, in memory that depends on the page size and not on the model's context."""
    p = page_size
    empty = (0,) if verdict.empty_rows else ()
    lengths = (1, p, p + 1, 2 * p + 3, *empty)
    yield _batch("decode", req, p, lengths, queries=[1] * len(lengths), phase="decode")
    yield _batch("prefill", req, p, (3, p + 2, 2 * p + 6), queries=[3, 2, 6], phase="prefill")
    rows = req.num_draft_tokens + 1
    if req.num_draft_tokens:
        yield _batch("verify", req, p, (rows, p + rows, 2 * p + rows), queries=[rows] * 3, phase="verify")
    if req.needs_tree:
        yield _tree(req, p)
    if req.chunk_size is None:
        return
    yield from _local(verdict, req, p)
    if req.needs_tree:
        yield _local_tree(req, p)


def _local(verdict: Usable, req: AttentionRequirements, p: int) -> Iterator[Batch]:
    """A kernel that knows of chunks gets the model's own size, others a small one, which they never see."""
    assert req.chunk_size is not None
    chunk = req.chunk_size if verdict.native_chunk else max(2, -(-MIN_CHUNK // p)) * p
    lengths = (
        (chunk + 3,) if verdict.native_chunk else (chunk + 3, 2 * chunk + 2, chunk)
    )  # over a border, over two, up to one
    queries: tuple[tuple[str, Phase, tuple[int, ...]], ...] = (
        ("local decode", "decode", (1, 1, 1)),
        ("local prefill", "prefill", (3, 2, 1)),
    )
    for name, phase, counts in queries:
        batch = _batch(name, req, p, lengths, queries=counts[: len(lengths)], phase=phase, chunk=chunk)
        plain = single_chunk_metadata(batch.meta, _ring(batch.meta, chunk, p), chunk, p)
        yield _as_asked(batch, plain, verdict, chunk, p)
    rows = req.num_draft_tokens + 1
    if req.num_draft_tokens and rows <= chunk and (verdict.native_chunk or verdict.empty_rows):
        over = (chunk + 1, chunk + rows) if rows > 1 else (chunk + 1,)
        batch = _batch("local verify", req, p, over, queries=[rows] * len(over), phase="verify", chunk=chunk)
        plain = virtual_batches(batch.meta, _ring(batch.meta, chunk, p), chunk, p, 2)
        yield _as_asked(batch, plain, verdict, chunk, p)


def _as_asked(batch: Batch, plain: AttentionMetadata, verdict: Usable, chunk: int, page_size: int) -> Batch:
    """Core's cut of the batch, or for a native_chunk backend the ring table and the chunk's size."""
    if not verdict.native_chunk:
        return replace(batch, plain=plain, meta=plain)
    ring = _ring(batch.meta, chunk, page_size)
    return replace(batch, plain=plain, meta=replace(batch.meta, block_table=ring, chunk=ChunkInfo(size=chunk)))


def _ring(meta: AttentionMetadata, chunk: int, page_size: int) -> torch.Tensor:
    """A local table as core keeps it: the page of page index i in column i % (2 · chunk / page)."""
    columns = ring_width(chunk, page_size)
    ring = torch.full((meta.num_seqs, columns), NULL_PAGE, dtype=torch.int32)
    for b, pages in enumerate(meta.block_table.tolist()):
        for index, page in enumerate(pages):
            if page != NULL_PAGE:
                ring[b, index % columns] = page
    return ring


# ---------------------------------------------------------------- trees


def _tree(req: AttentionRequirements, page_size: int) -> Batch:
    """Two different trees of as many nodes as are verified: one where node i hangs on (i − 1) / 2, one all of whose nodes hang on the first."""
    nodes = _num_nodes(req)
    lengths = (page_size + 1 + nodes, 2 + nodes)
    batch = _batch("tree verify", req, page_size, lengths, queries=[nodes] * 2, phase="verify")
    trees = [[(i - 1) // 2 if i else -1 for i in range(nodes)], [0 if i else -1 for i in range(nodes)]]
    meta = replace(batch.meta, tree=TreeMask(ancestors=_ancestors(trees)))
    return replace(batch, meta=meta, plain=meta)


def _local_tree(req: AttentionRequirements, page_size: int) -> Batch:
    """The first node is the last of a chunk, the others are past the border in two levels."""
    nodes = _num_nodes(req)
    chunk = -(-max(MIN_CHUNK, nodes) // page_size) * page_size
    parents = [-1, *(0 if i % 2 else 1 for i in range(1, nodes))]
    depth = torch.tensor([0, *(1 if i % 2 else 2 for i in range(1, nodes))])
    batch = _batch(
        "local tree verify", req, page_size, [chunk - 1 + nodes], queries=[nodes], phase="verify", chunk=chunk
    )
    meta = replace(batch.meta, tree=TreeMask(ancestors=_ancestors([parents])))
    meta = tree_chunk_metadata(meta, _ring(meta, chunk, page_size), chunk - 1 + depth, chunk, page_size)
    return replace(batch, meta=meta, plain=meta)


def _num_nodes(req: AttentionRequirements) -> int:
    return min(max(req.num_draft_tokens, 3) + 1, MAX_NODES)


def _ancestors(trees: Sequence[Sequence[int]]) -> torch.Tensor:
    """int64 [T]: each node's own bit and those of its ancestors."""
    words: list[int] = []
    for parents in trees:
        own: list[int] = []
        for node, parent in enumerate(parents):
            own.append((1 << node) | (own[parent] if parent >= 0 else 0))
        words += [word - (1 << 64) if word >> 63 else word for word in own]
    return torch.tensor(words, dtype=torch.int64)


# ---------------------------------------------------------------- memory and tables


def _batch(
    name: str,
    req: AttentionRequirements,
    page_size: int,
    lengths: Sequence[int],
    *,
    queries: Sequence[int],
    phase: Phase,
    chunk: int | None = None,
) -> Batch:
    """Sequences of `lengths` keys with `queries` rows each: pages dealt in random order, every other slot NaN, the null page zero. With a chunk
    only pages from the first query's chunk on exist, as core keeps them; the table points at the null page for the others."""
    draw = torch.Generator().manual_seed(SEED)
    firsts = [
        (length - n) // chunk * chunk // page_size if chunk else 0 for length, n in zip(lengths, queries, strict=True)
    ]
    ends = [-(-length // page_size) for length in lengths]
    num_pages = 1 + sum(ends) - sum(firsts)
    memory = torch.randn(2, num_pages, page_size, req.num_kv_heads, req.head_dim, generator=draw)
    memory[:, NULL_PAGE] = 0.0
    table = torch.full((len(lengths), max(ends)), NULL_PAGE, dtype=torch.int32)
    dealt = iter((torch.randperm(num_pages - 1, generator=draw) + 1).tolist())
    for b, length in enumerate(lengths):
        for index in range(firsts[b], ends[b]):
            table[b, index] = page = next(dealt)
            memory[:, page, max(0, length - index * page_size) :] = UNOWNED
    meta = AttentionMetadata(
        cu_seqlens_q=torch.tensor([0, *queries]).cumsum(0).int(),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        block_table=table,
        max_seqlen_q=max(queries),
        max_seqlen_k=max(lengths),
        num_seqs=len(lengths),
        phase=phase,
    )
    q = 2 * torch.randn(sum(queries), req.num_q_heads, req.head_dim, generator=draw)
    owned = torch.tensor([length > 0 for length, n in zip(lengths, queries, strict=True) for _ in range(n)])
    return Batch(name=name, meta=meta, plain=meta, q=q.double(), k=memory[0], v=memory[1], owned=owned)
