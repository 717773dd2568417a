"""The chunk formulas as one kernel: a program a row, so that a step's metadata is one launch instead of some twenty."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 128
"""Table columns copied at once: a chunk of 8,192 tokens in pages of 64."""


def chunk_rows(
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    table: torch.Tensor,
    *,
    chunk_size: int,
    page_size: int,
    num_virtual: int,
    width: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """cu_seqlens_q int32 [B+1], seq_lens int32 [B], table int32 [B, W] → cu_seqlens_q [B·N+1], seq_lens [B·N], block_table [B·N, width] of the
    rows that `chunked.virtual_batches` defines. Reads nothing back to the host."""
    rows = seq_lens.shape[0] * num_virtual
    out_cu = cu_seqlens_q.new_empty(rows + 1)
    out_lens = seq_lens.new_empty(rows)
    out_table = table.new_empty(rows, width)
    _chunk_rows_kernel[(rows,)](
        cu_seqlens_q,
        seq_lens,
        table,
        out_cu,
        out_lens,
        out_table,
        table.stride(0),
        table.shape[1],
        width,
        chunk_size,
        chunk_size // page_size,
        NUM_VIRTUAL=num_virtual,
        BLOCK=BLOCK,
        num_warps=1,
    )
    return out_cu, out_lens, out_table


@triton.jit
def _chunk_rows_kernel(
    cu_seqlens_q,
    seq_lens,
    table,
    out_cu,
    out_lens,
    out_table,
    table_stride,
    table_width,
    out_width,
    chunk_size,
    pages_per_chunk,
    NUM_VIRTUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    b = row // NUM_VIRTUAL
    begin = tl.load(cu_seqlens_q + b)
    num_queries = tl.load(cu_seqlens_q + b + 1) - begin
    end = tl.load(seq_lens + b)
    prefix = tl.maximum(end - num_queries, 0)  # an empty row has a query and no keys
    chunk = prefix // chunk_size + row % NUM_VIRTUAL
    first = chunk * chunk_size
    high = tl.minimum(end, first + chunk_size)
    tl.store(out_lens + row, tl.where(high > tl.maximum(prefix, first), high - first, 0))
    tl.store(out_cu + row, begin + tl.minimum(tl.maximum(first - prefix, 0), num_queries))
    if row == tl.num_programs(0) - 1:
        tl.store(out_cu + row + 1, begin + num_queries)
    for column in range(0, out_width, BLOCK):
        columns = column + tl.arange(0, BLOCK)
        inside = columns < out_width
        source = (chunk * pages_per_chunk + columns) % table_width
        pages = tl.load(table + b.to(tl.int64) * table_stride + source, mask=inside)
        tl.store(out_table + row.to(tl.int64) * out_width + columns, pages, mask=inside)
