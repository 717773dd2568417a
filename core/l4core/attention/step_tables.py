"""From persistent block tables to those of one step, and to the slots of its new tokens: on the device, in fixed shapes, nothing read back.

A full table has the page of page index p (= position // page size) in column p, a local one is a ring of two chunks: column p mod W. What is handed
on holds the null page wherever a sequence has none, so a persistent row need not be cleared when its owner changes.
"""

from __future__ import annotations

import torch

from l4core.attention.step_rows import StepRows
from l4core.platform import has_triton

__all__ = ["step_tables"]


def step_tables(
    table: torch.Tensor, step: StepRows, *, num_columns: int, page_size: int, chunk_size: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """table: int32 [R, W], persistent; a ring when chunk_size is given, and then num_columns is W.

    → block table int32 [B, num_columns] and slots int64 [T], page · page_size + offset; padding's lie in the null page. Columns without a page of the
    sequence hold it too; where Triton runs, those from the first multiple of 128 behind the sequence's end on hold some page or other, which no
    kernel looks at.
    """
    if has_triton(table.device.type):
        from l4core.attention.step_tables_triton import launch

        return launch(table, step, num_columns=num_columns, page_size=page_size, chunk_size=chunk_size)
    return _by_definition(table, step, num_columns, page_size, chunk_size)


def _by_definition(
    table: torch.Tensor, step: StepRows, num_columns: int, page_size: int, chunk_size: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    width, rows = table.shape[1], step.rows.long()
    column = torch.arange(num_columns, device=table.device, dtype=torch.int32)
    end = ((step.seq_lens + page_size - 1) // page_size).unsqueeze(1)
    if chunk_size is None:
        has_page = column < end
    else:
        index = end - 1 - (end - 1 - column) % width  # the last page index below the end that stands in this column
        first = (step.starts // chunk_size * (chunk_size // page_size)).unsqueeze(1)
        has_page = index >= first
    block_table = torch.where(has_page, table[rows, :num_columns], 0)
    page = table[rows[step.owner], step.positions // page_size % width].long()
    page = torch.where(step.positions >= step.starts[step.owner], page, 0)
    return block_table, page * page_size + step.positions % page_size
