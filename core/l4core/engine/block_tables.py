"""Block tables that outlive a step: one row per running request and KV group, kept on the host, sent to the device for the rows of a step.

A local group's row is a ring of two chunks: page index p stands in column p % (2·C/P), so a 10M-token request needs no more columns than a short one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from l4core.attention.chunked import ring_width
from l4core.engine.batch import DraftRequest, ScheduledSequence
from l4core.kv.blocks import NULL_PAGE, KVGroup


class BlockTables:
    """int32 [max_running, W] per group; W = pages of the largest context, or of two chunks."""

    def __init__(
        self, groups: Sequence[KVGroup], *, page_size: int, max_running: int, max_context: int, device: torch.device
    ) -> None:
        self._device = device
        self._chunk = {g.name: g.chunk_size and g.chunk_size // page_size for g in groups}  # in pages, None = no chunks
        self.width: Mapping[str, int] = {g.name: _width(g, page_size, max_context) for g in groups}
        self._host = {name: np.zeros((max_running, width), dtype=np.int32) for name, width in self.width.items()}

    def write(self, sequences: Sequence[ScheduledSequence | DraftRequest]) -> None:
        """Enter the pages that are new since each sequence was last scheduled.

        What follows them becomes the null page: a kernel may fetch a column behind a sequence's end, and it shall not find another's page there.
        """
        for seq in sequences:
            for name, new in seq.new_pages.items():
                if not new.pages:
                    continue
                row, width, chunk = self._host[name][seq.row], self.width[name], self._chunk[name]
                begin, end = new.first_index, new.first_index + len(new.pages)
                if chunk is None:
                    row[begin:end] = new.pages
                    if begin == 0:  # the row's first pages since it was another's
                        row[end:] = NULL_PAGE
                else:
                    row[np.arange(begin, end) % width] = new.pages
                    row[np.arange(end, -(-end // chunk) * chunk) % width] = NULL_PAGE

    def rows(self, name: str, rows: np.ndarray, num_columns: int) -> torch.Tensor:
        """→ int32 [len(rows), min(num_columns, W)] on the device."""
        columns = min(num_columns, self.width[name])
        return torch.from_numpy(self._host[name][rows, :columns]).to(self._device, non_blocking=True)


def _width(group: KVGroup, page_size: int, max_context: int) -> int:
    return -(-max_context // page_size) if group.chunk_size is None else ring_width(group.chunk_size, page_size)
