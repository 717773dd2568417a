"""What the model is given in one step: device tensors, and plans made once per step for all layers of a KV group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from l4core.plugin_api import Plan

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSegment:
    """Token rows [begin, end) of one phase; plans: KV group name → what the backend's `plan` returned for them."""

    begin: int
    end: int
    plans: Mapping[str, Plan]


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """token_ids, positions: int64 [T] (positions absolute).  slot_mapping: KV group name → int64 [T], page * page_size + offset of each new
    token.  segments cover [0, T) in order.  logits_rows: int64 [R], the rows whose logits are wanted."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: Mapping[str, torch.Tensor]
    segments: Sequence[AttentionSegment]
    logits_rows: torch.Tensor
