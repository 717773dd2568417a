"""Guesses that the device makes and verifies while the host does not know them yet: it is told with the draws of the step that verifies them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import msgspec
import torch

from l4core.engine.batch import PENDING, DecodesFirst, ScheduledBatch, ScheduledSequence
from l4core.plugin_ops.upload import Download


class LateGuesses:
    """What one `propose` left on the device, on its way to the host. columns: request id → its column of the table."""

    def __init__(
        self, table: torch.Tensor, rows: torch.Tensor, columns: Mapping[str, int], pending: torch.Tensor
    ) -> None:
        """table: int64 [k, B], which the next steps may overwrite.  rows: int64 [B], of the block tables.  pending: the runner's, written here."""
        pending[1 : len(table) + 1].index_copy_(1, rows, table)
        self._ids, self._columns = Download(table), columns

    def told(self, batch: ScheduledBatch) -> ScheduledBatch:
        """The batch with these guesses in place of PENDING ones."""
        return replace(batch, sequences=DecodesFirst(batch.decodes, [self._told(seq) for seq in batch.others]))

    def _told(self, seq: ScheduledSequence) -> ScheduledSequence:
        if seq.token_ids[-1] != PENDING or not seq.num_drafts:
            return seq
        own = self._ids.wait()[: seq.num_drafts, self._columns[seq.request.request_id]].tolist()
        return msgspec.structs.replace(seq, token_ids=(seq.token_ids[0], *own))
