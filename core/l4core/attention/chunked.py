"""Chunked local attention as ordinary causal paged attention: device arithmetic on lengths and block tables, fixed shapes, no host sync.

A token at absolute position p sees keys ⌊p/C⌋·C … p. A local block table is a ring of two chunks: the page of page index p (= position // P)
stands in column p mod (2·C/P). Every function also takes a full table (column = page index), since p mod width = p there.
"""

from __future__ import annotations

import dataclasses

import torch

from l4core.platform import has_triton
from l4core.plugin_api import AttentionMetadata, TreeMask


def ring_width(chunk_size: int, page_size: int) -> int:
    """Columns of a local block table: the pages of the current chunk and of the one being entered."""
    if chunk_size % page_size:
        raise ValueError(f"page size {page_size} does not divide the chunk of {chunk_size} tokens")
    return 2 * (chunk_size // page_size)


def single_chunk_metadata(
    meta: AttentionMetadata, ring_table: torch.Tensor, chunk_size: int, page_size: int
) -> AttentionMetadata:
    """The local view of a batch whose sequences each have all their queries in one chunk (decode; prefill pieces cut at chunk borders).

    meta: the global one (seq_lens count every token).  ring_table: int32 [B, W].  → keys from the chunk's first token on, a table of at most
    C/P columns, cu_seqlens_q unchanged. An empty row (seq_len 0) stays empty.
    """
    _refuse_tree(meta)
    max_len = min(meta.max_seqlen_k, chunk_size)
    if has_triton(ring_table.device.type):
        _, lens, table = _fused(meta, ring_table, chunk_size, page_size, 1, max_len)
        return dataclasses.replace(meta, seq_lens=lens, block_table=table, max_seqlen_k=max_len)
    last = meta.seq_lens - 1  # position of the last token; −1 for an empty row
    chunk = last // chunk_size
    lens = torch.where(last >= 0, last - chunk * chunk_size + 1, 0)
    table = _chunk_columns(ring_table, chunk.clamp(min=0), chunk_size, page_size, max_len)
    return dataclasses.replace(meta, seq_lens=lens.int(), block_table=table, max_seqlen_k=max_len)


def virtual_batches(
    meta: AttentionMetadata, table: torch.Tensor, chunk_size: int, page_size: int, num_virtual: int
) -> AttentionMetadata:
    """The general case: each sequence becomes `num_virtual` rows, one a chunk it touches; rows without queries are empty (0 queries, 0 keys).

    table: int32 [B, W], a ring or a full table that still holds every page of the chunks touched.  num_virtual: host constant, at least
    ⌈(max_seqlen_q − 1) / C⌉ + 1 (two for a verify step or any piece of at most C + 1 tokens).
    Query rows keep their order, so q and out are used as they are. Raises ValueError when num_virtual is too small.
    """
    _refuse_tree(meta)
    needed = -(-(meta.max_seqlen_q - 1) // chunk_size) + 1
    if num_virtual < needed:
        raise ValueError(
            f"{num_virtual} virtual batches given; {meta.max_seqlen_q} queries may touch {needed} chunks of {chunk_size}"
        )
    max_len = min(meta.max_seqlen_k, chunk_size)
    split = _fused if has_triton(table.device.type) else _split
    cu_seqlens_q, lens, columns = split(meta, table, chunk_size, page_size, num_virtual, max_len)
    return dataclasses.replace(
        meta,
        cu_seqlens_q=cu_seqlens_q,
        seq_lens=lens,
        block_table=columns,
        max_seqlen_q=min(meta.max_seqlen_q, chunk_size),
        max_seqlen_k=max_len,
        num_seqs=meta.num_seqs * num_virtual,
        phase="decode" if meta.max_seqlen_q == 1 else meta.phase,
    )


def chain_as_decodes(
    meta: AttentionMetadata, table: torch.Tensor, num_rows: int, chunk_size: int, page_size: int
) -> AttentionMetadata:
    """A chain verify step for a backend without empty rows: each query row becomes a decode of its own, with the tail of its own chunk.

    table: int32 [B, W], a ring or a full table.  num_rows: query rows in all, a host constant.
    """
    _refuse_tree(meta)
    q_lens = meta.cu_seqlens_q.diff()
    owner = torch.repeat_interleave(q_lens, output_size=num_rows)
    row = torch.arange(num_rows, device=table.device, dtype=torch.int32)
    behind = (meta.cu_seqlens_q[1:])[owner] - row - 1  # later rows of the same sequence
    single = dataclasses.replace(
        meta,
        cu_seqlens_q=torch.arange(num_rows + 1, device=table.device, dtype=torch.int32),
        seq_lens=(meta.seq_lens[owner] - behind).int(),
        max_seqlen_q=1,
        num_seqs=num_rows,
        phase="decode",
    )
    return single_chunk_metadata(single, table[owner], chunk_size, page_size)


Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""int32: cu_seqlens_q [R+1], seq_lens [R], block_table [R, columns]."""


def _split(
    meta: AttentionMetadata, table: torch.Tensor, chunk_size: int, page_size: int, num_virtual: int, max_len: int
) -> Rows:
    q_lens = meta.cu_seqlens_q.diff()
    prefix = (meta.seq_lens - q_lens).clamp(min=0).unsqueeze(1)  # [B, 1] tokens before the first query
    chunk = prefix // chunk_size + torch.arange(num_virtual, device=table.device, dtype=torch.int32)  # [B, N]
    first = chunk * chunk_size
    high = torch.minimum(meta.seq_lens.unsqueeze(1), first + chunk_size)
    lens = torch.where(high > torch.maximum(prefix, first), high - first, 0).flatten().int()
    before = torch.minimum((first - prefix).clamp(min=0), q_lens.unsqueeze(1))  # queries in earlier chunks
    begins = (meta.cu_seqlens_q[:-1].unsqueeze(1) + before).flatten()
    columns = _chunk_columns(
        table.repeat_interleave(num_virtual, dim=0), chunk.flatten(), chunk_size, page_size, max_len
    )
    return torch.cat([begins, meta.cu_seqlens_q[-1:]]).int(), lens, columns


def _fused(
    meta: AttentionMetadata, table: torch.Tensor, chunk_size: int, page_size: int, num_virtual: int, max_len: int
) -> Rows:
    """The same in one launch."""
    from l4core.attention.chunked_triton import chunk_rows

    ring_width(chunk_size, page_size)  # refuses a page size that does not divide the chunk
    return chunk_rows(
        meta.cu_seqlens_q,
        meta.seq_lens,
        table,
        chunk_size=chunk_size,
        page_size=page_size,
        num_virtual=num_virtual,
        width=-(-max_len // page_size),
    )


def _chunk_columns(
    table: torch.Tensor, chunk: torch.Tensor, chunk_size: int, page_size: int, max_len: int
) -> torch.Tensor:
    """table [R, W], chunk [R] → int32 [R, ⌈max_len / P⌉]: the pages of each row's chunk. Columns past what a row owns repeat others and lie
    beyond its seq_len."""
    pages_per_chunk = ring_width(chunk_size, page_size) // 2
    width = -(-max_len // page_size)
    page_index = chunk.unsqueeze(1) * pages_per_chunk + torch.arange(width, device=table.device)
    return table.gather(1, (page_index % table.shape[1]).long())


def tree_chunk_metadata(
    meta: AttentionMetadata, table: torch.Tensor, positions: torch.Tensor, chunk_size: int, page_size: int
) -> AttentionMetadata:
    """The local view of a tree verify step. Node i stands in slot prefix + i but at position prefix + depth(i), and chunks go by position.

    table: int32 [B, W], a ring or a full one that holds the chunk of the last committed token's successor and the nodes' slots.
    positions: int64 [T], of every node.  → keys from the first chunk touched on; a node past the border sees no prefix and only the ancestors
    past the border, a node before it sees the prefix since the chunk's start. A tree is shallower than a chunk, so it meets one border at most.
    """
    if meta.tree is None:
        raise ValueError("a tree verify step carries a TreeMask; without one use virtual_batches")
    q_lens = meta.cu_seqlens_q.diff()
    prefix = meta.seq_lens - q_lens
    chunk = prefix // chunk_size
    owner = torch.repeat_interleave(q_lens, output_size=positions.shape[0])
    past = positions >= ((chunk + 1) * chunk_size)[owner]  # [T] nodes in the second chunk
    node = torch.arange(positions.shape[0], device=table.device) - meta.cu_seqlens_q[owner]
    bits = torch.where(past, torch.ones_like(node) << node, 0)
    second = torch.zeros_like(prefix, dtype=torch.int64).index_add_(0, owner, bits)  # [B] bitmap of those nodes
    tree = meta.tree
    sees_prefix = ~past if tree.sees_prefix is None else ~past & tree.sees_prefix
    max_len = min(meta.max_seqlen_k, chunk_size + meta.max_seqlen_q)
    return dataclasses.replace(
        meta,
        seq_lens=torch.where(meta.seq_lens > 0, meta.seq_lens - chunk * chunk_size, 0).int(),
        block_table=_chunk_columns(table, chunk.clamp(min=0), chunk_size, page_size, max_len),
        max_seqlen_k=max_len,
        tree=TreeMask(
            ancestors=torch.where(past, tree.ancestors & second[owner], tree.ancestors), sees_prefix=sees_prefix
        ),
    )


def _refuse_tree(meta: AttentionMetadata) -> None:
    if meta.tree is not None:
        raise ValueError("a tree's nodes belong to chunks by position, not by slot: use tree_chunk_metadata")
