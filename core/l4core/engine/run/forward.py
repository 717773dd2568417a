"""From device tensors of a step to what the model is given: block tables, slots, one attention plan per phase and KV group.

Made of device work alone, so the same function serves a batch of any shape and a step that is captured in a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from l4core.attention.chunked import (
    chain_as_decodes,
    single_chunk_metadata,
    tree_chunk_metadata,
    virtual_batches,
)
from l4core.attention.step_rows import StepRows
from l4core.engine.run.block_tables import BlockTables
from l4core.kv.blocks import KVGroup
from l4core.kv.memory import KVMemory
from l4core.model.batch import AttentionSegment, ForwardBatch
from l4core.plugin_api import AttentionBackend, AttentionMetadata, ChunkInfo, TreeMask
from l4core.plugin_ops.upload import upload_many

Ints: TypeAlias = npt.NDArray[np.int64]
PHASES: tuple[Literal["decode", "verify", "prefill"], ...] = ("decode", "verify", "prefill")
"""In the order of a batch's sequences."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """What one attention call serves: sequences [first, last) and their token rows [begin, end). cu_seqlens_q: int32 [last − first + 1] on the
    device, from 0.  max_seqlen_q, max_seqlen_k: host bounds.  seq_lens: int32 [last − first], those of the
    step, in memory that begins at a multiple of 16 bytes; None = the step's own, where the phase is all of it."""

    name: Literal["decode", "prefill", "verify"]
    first: int
    last: int
    begin: int
    end: int
    cu_seqlens_q: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    seq_lens: torch.Tensor | None = None


def lay_out_step(
    rows: Ints, starts: Ints, lengths: Ints, borders: Sequence[int], positions: torch.Tensor
) -> tuple[StepRows, list[Phase]]:
    """A step of any shape, on the device of `positions` (int64 [T]): sequence b has row `rows[b]` and computes `lengths[b]` tokens from position
    `starts[b]`; sequences [borders[i], borders[i + 1]) are PHASES[i]'s, and a phase without any is left out."""
    cu, seq_lens = np.concatenate(([0], np.cumsum(lengths))), starts + lengths
    owner = np.repeat(np.arange(len(lengths)), lengths)
    spans = [(name, a, b) for name, (a, b) in zip(PHASES, pairwise(borders), strict=True) if b > a]
    own = [array for _, a, b in spans for array in (cu[a : b + 1] - cu[a], seq_lens[a:b])]
    rows_, starts_, seq_lens_, owner_, *own_ = upload_many(
        [rows, starts, seq_lens, owner, *own], torch.int32, positions.device
    )
    phases = [
        Phase(
            name=name,
            first=a,
            last=b,
            begin=int(cu[a]),
            end=int(cu[b]),
            cu_seqlens_q=cu_seqlens,
            max_seqlen_q=int(lengths[a:b].max()),
            max_seqlen_k=int(seq_lens[a:b].max()),
            seq_lens=lens,
        )
        for (name, a, b), cu_seqlens, lens in zip(spans, own_[::2], own_[1::2], strict=True)
    ]
    return StepRows(rows=rows_, starts=starts_, seq_lens=seq_lens_, positions=positions, owner=owner_), phases


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeRows:
    """A step in which some drafts are trees. positions: int64 [T], where a token stands in its path (its slot comes from StepRows.positions).
    ancestors: int64 [T], as in TreeMask; read for verified sequences only."""

    positions: torch.Tensor
    ancestors: torch.Tensor


class ForwardPlanner:
    """Everything `plan` needs that no step changes."""

    def __init__(
        self,
        tables: BlockTables,
        backend: AttentionBackend,
        memory: KVMemory,
        *,
        groups: Sequence[KVGroup],
        page_size: int,
        native_chunk: bool,
        empty_rows: bool,
    ) -> None:
        """native_chunk: the backend cuts chunks itself and is given rings as they are.  empty_rows: it takes virtual batches without queries."""
        self.tables = tables
        self.backend = backend
        self.memory = memory
        self._groups = groups
        self._page_size = page_size
        self._native_chunk, self._empty_rows = native_chunk, empty_rows

    def of_groups(self, groups: Sequence[KVGroup]) -> ForwardPlanner:
        """The same for some groups only."""
        return ForwardPlanner(
            self.tables,
            self.backend,
            self.memory,
            groups=groups,
            page_size=self._page_size,
            native_chunk=self._native_chunk,
            empty_rows=self._empty_rows,
        )

    def plan(
        self,
        token_ids: torch.Tensor,
        rows: StepRows,
        phases: Sequence[Phase],
        logits_rows: torch.Tensor,
        longest: int | None,
        trees: TreeRows | None = None,
    ) -> ForwardBatch:
        """phases: cover all sequences, in order.  longest: as in BlockTables.step."""
        tables, slots = self.tables.step(rows, longest)
        positions = rows.positions if trees is None else trees.positions
        segments = []
        for phase in phases:
            mine = slice(phase.first, phase.last)
            meta = AttentionMetadata(
                cu_seqlens_q=phase.cu_seqlens_q,
                seq_lens=rows.seq_lens[mine] if phase.seq_lens is None else phase.seq_lens,
                block_table=tables[self._groups[0].name][mine],
                max_seqlen_q=phase.max_seqlen_q,
                max_seqlen_k=phase.max_seqlen_k,
                num_seqs=phase.last - phase.first,
                phase=phase.name,
                tree=None
                if trees is None or phase.name != "verify"
                else TreeMask(ancestors=trees.ancestors[phase.begin : phase.end]),
            )
            own = positions[phase.begin : phase.end]
            plans = {
                g.name: self.backend.plan(self._of_group(meta, g, tables[g.name][mine], own)) for g in self._groups
            }
            segments.append(AttentionSegment(begin=phase.begin, end=phase.end, plans=plans))
        return ForwardBatch(
            token_ids=token_ids,
            positions=positions,
            slot_mapping=slots,
            segments=segments,
            logits_rows=logits_rows,
        )

    def _of_group(
        self, meta: AttentionMetadata, group: KVGroup, table: torch.Tensor, positions: torch.Tensor
    ) -> AttentionMetadata:
        scale = self.memory.table_scale[group.name]
        table = table if scale == 1 else table * scale
        if group.chunk_size is None:
            return replace(meta, block_table=table)
        if meta.tree is not None:
            return tree_chunk_metadata(meta, table, positions, group.chunk_size, self._page_size)
        if self._native_chunk:
            return replace(meta, block_table=table, chunk=ChunkInfo(size=group.chunk_size))
        if meta.phase == "verify":  # the only one that may stand on both sides of a chunk border
            if self._empty_rows:
                return virtual_batches(meta, table, group.chunk_size, self._page_size, 2)
            return chain_as_decodes(meta, table, len(positions), group.chunk_size, self._page_size)
        return single_chunk_metadata(meta, table, group.chunk_size, self._page_size)
