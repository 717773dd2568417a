"""Where the sequences and tokens of a step stand, as tensors: what block tables and slots are made from."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["StepRows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRows:
    """Where a step's sequences and tokens stand. rows, starts, seq_lens: int32 [B], the persistent row, the position of the first new token, the
    length with the new tokens.  positions: int64 [T] of the new tokens; one before its sequence's start is padding's.  owner: int32 [T], which of the
    B sequences each belongs to."""

    rows: torch.Tensor
    starts: torch.Tensor
    seq_lens: torch.Tensor
    positions: torch.Tensor
    owner: torch.Tensor
