"""Block tables that outlive a step: on the device, one row per running request and KV group. A step uploads the entries that are new, nothing else.

A local group's row is a ring of two chunks: page index p stands in column p % (2·C/P), so a 10M-token request needs no more columns than a short one.
What a row held for an earlier request stays in it; attention.step_tables hands on only columns that a sequence owns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from l4core.attention.chunked import ring_width
from l4core.attention.step_rows import StepRows
from l4core.attention.step_tables import step_tables
from l4core.engine.batch import DraftRequest, ScheduledSequence
from l4core.kv.blocks import KVGroup
from l4core.platform import has_triton
from l4core.plugin_ops.upload import upload_many

UNIT = 16
"""Where Triton runs, columns of a step's table are a multiple of this: it compiles a kernel apart for numbers that are, and for rows that begin at a
multiple of 16 bytes."""


class BlockTables:
    """int32 [max_running + 1, W] per group; W = pages of the largest context, or of two chunks. The last row, `padding_row`, has null pages only."""

    def __init__(
        self, groups: Sequence[KVGroup], *, page_size: int, max_running: int, max_context: int, device: torch.device
    ) -> None:
        self._groups = groups
        self._page_size = page_size
        self._unit = UNIT if has_triton(device.type) else 1
        self.padding_row = max_running
        self.width: Mapping[str, int] = {g.name: _width(g, page_size, max_context, self._unit) for g in groups}
        self.tables: Mapping[str, torch.Tensor] = {
            name: torch.zeros(max_running + 1, width, dtype=torch.int32, device=device)
            for name, width in self.width.items()
        }

    def write(self, sequences: Sequence[ScheduledSequence | DraftRequest]) -> None:
        """Enter the pages that are new since each sequence was last scheduled. Only queued on the device, before the step that reads them."""
        new = [(seq.row, seq.new_pages) for seq in sequences if seq.new_pages]
        for name, table in self.tables.items() if new else ():
            width = self.width[name]
            entries = [(row, pages[name]) for row, pages in new if name in pages]
            places = [
                row * width + np.arange(e.first_index, e.first_index + len(e.pages), dtype=np.int64) % width
                for row, e in entries
            ]
            if places:
                pages = np.concatenate([np.asarray(e.pages, dtype=np.int64) for _, e in entries])
                where, what = upload_many([np.concatenate(places), pages], torch.int64, table.device)
                table.view(-1).index_copy_(0, where, what.int())

    def slots(self, name: str, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Slots of these positions of these rows' sequences; all int64 of one length, on the device."""
        page = self.tables[name][rows, positions // self._page_size % self.width[name]].long()
        return page * self._page_size + positions % self._page_size

    def step(
        self, rows: StepRows, longest: int | None = None
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Block tables of a step's sequences (int32 [B, columns]) and slots of its new tokens (int64 [T]), by group.
        longest: tokens of the longest sequence, so that hardly more columns than it needs are handed on; None = the whole width."""
        tables, slots = {}, {}
        for group in self._groups:
            columns = self.width[group.name]
            if longest is not None and group.chunk_size is None:
                columns = min(columns, _columns(longest, self._page_size, self._unit))
            tables[group.name], slots[group.name] = step_tables(
                self.tables[group.name],
                rows,
                num_columns=columns,
                page_size=self._page_size,
                chunk_size=group.chunk_size,
            )
        return tables, slots


def _width(group: KVGroup, page_size: int, max_context: int, unit: int) -> int:
    if group.chunk_size is not None:
        return ring_width(group.chunk_size, page_size)
    return _columns(max_context, page_size, unit)


def _columns(tokens: int, page_size: int, unit: int) -> int:
    """Pages of so many tokens, rounded up to a multiple of `unit`."""
    return -(-tokens // (page_size * unit)) * unit
