"""The block tables of a step in one launch: programs that copy rows, and programs that find slots."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from l4core.attention.step_rows import StepRows

BLOCK = 128
"""Columns, or tokens, of one turn of a program."""
COPIERS = (4, 64)
"""Programs that share a row of a wide table, at least and at most: one of ten million tokens has 163,840 columns, of which most rows use a few."""
PROGRAMS = 4096
"""Programs of a launch, about, where there is so much to copy."""


def launch(
    table: torch.Tensor, step: StepRows, *, num_columns: int, page_size: int, chunk_size: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As step_tables.step_tables."""
    num_seqs, num_tokens = step.rows.shape[0], step.positions.shape[0]
    out = table.new_empty(num_seqs, num_columns)
    slots = step.positions.new_empty(num_tokens)
    copiers = copiers_of(num_seqs, table.shape[1])
    _step_tables_kernel[(num_seqs * copiers + triton.cdiv(num_tokens, BLOCK),)](
        table,
        step.rows,
        step.starts,
        step.seq_lens,
        step.positions,
        step.owner,
        out,
        slots,
        table.stride(0),
        table.shape[1],
        num_seqs,
        num_tokens,
        num_columns,
        PAGE=page_size,
        CHUNK=chunk_size or 0,
        COPIERS=copiers,
        BLOCK=BLOCK,
        num_warps=1,
    )
    return out, slots


def copiers_of(num_seqs: int, width: int) -> int:
    """Programs a row of a table of `width` columns. A power of two that does not hang on how long the sequences are, so that a sequence that grows
    has no kernels compiled: one takes 200 ms. H200, one sequence of 5,000,000 tokens: four took 35 µs."""
    least, most = COPIERS
    wanted = max(least, min(most, triton.next_power_of_2(PROGRAMS // max(num_seqs, 1))))
    return int(min(wanted, triton.next_power_of_2(triton.cdiv(width, BLOCK))))


@triton.jit
def _step_tables_kernel(
    table,
    rows,
    starts,
    seq_lens,
    positions,
    owner,
    out,
    slots,
    table_stride,
    table_width,
    num_seqs,
    num_tokens,
    num_columns,
    PAGE: tl.constexpr,
    CHUNK: tl.constexpr,
    COPIERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    if program < num_seqs * COPIERS:
        b = program // COPIERS
        source = table + tl.load(rows + b).to(tl.int64) * table_stride
        target = out + b.to(tl.int64) * num_columns
        end = (tl.load(seq_lens + b) + PAGE - 1) // PAGE
        bound = num_columns
        first = 0
        if CHUNK == 0:
            bound = tl.minimum(num_columns, (end // BLOCK + 1) * BLOCK)
        else:
            first = tl.load(starts + b) // CHUNK * (CHUNK // PAGE)
        for begin in range(program % COPIERS * BLOCK, bound, COPIERS * BLOCK):
            columns = begin + tl.arange(0, BLOCK)
            inside = columns < num_columns
            index = columns
            if CHUNK > 0:
                # the last page index below the end that stands in this column; the remainder is kept from being negative
                index = end - 1 - (end - 1 - columns + table_width) % table_width
            has_page = inside & (index >= first) & (index < end)
            tl.store(target + columns, tl.load(source + columns, mask=has_page, other=0), mask=inside)
    else:
        tokens = (program - num_seqs * COPIERS) * BLOCK + tl.arange(0, BLOCK)
        inside = tokens < num_tokens
        sequence = tl.load(owner + tokens, mask=inside, other=0)
        row = tl.load(rows + sequence, mask=inside, other=0)
        position = tl.load(positions + tokens, mask=inside, other=0)
        start = tl.load(starts + sequence, mask=inside, other=0)
        column = position // PAGE % table_width
        page = tl.load(table + row.to(tl.int64) * table_stride + column, mask=inside & (position >= start), other=0)
        tl.store(slots + tokens, page.to(tl.int64) * PAGE + position % PAGE, mask=inside)
