"""Turns a scheduled batch into device tensors, runs the model on them, and draws tokens. Knows nothing of queues, text or HTTP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, pairwise
from typing import Literal, TypeAlias

import numpy as np
import torch

from l4core.attention.chunked import chain_as_decodes, single_chunk_metadata, virtual_batches
from l4core.engine.batch import DraftRequest, ScheduledBatch, ScheduledSequence, StepTokens
from l4core.engine.block_tables import BlockTables
from l4core.engine.verify_rows import Verified, draw_rows, verified
from l4core.kv.blocks import KVGroup
from l4core.kv.memory import KVMemory
from l4core.model.batch import AttentionSegment, ForwardBatch
from l4core.model.llama4 import Llama4
from l4core.plugin_api import AttentionBackend, AttentionMetadata, ChunkInfo
from l4core.request import TokenLogprobs
from l4core.sampling.logprobs import prompt_logprobs
from l4core.sampling.pipeline import Draw, SamplingPipeline

Phase: TypeAlias = Literal["decode", "verify", "prefill"]
PHASES: tuple[Phase, ...] = ("decode", "verify", "prefill")
"""In the order of a batch's sequences."""

LOGPROB_ROWS = 256
"""Prompt rows whose logits are held at once: 256 × 202,048 float32 = 207 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """Where everything of a batch lies, on the host: sequence b owns token rows [cu[b], cu[b+1]). phases: name → its sequences [begin, end).
    logits: of each sequence, how many of its last rows are drawn from."""

    rows: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    cu: np.ndarray
    logits: np.ndarray
    phases: Mapping[Phase, tuple[int, int]]


class Runner:
    """One model on one device. `build` → `execute` → `draw` is a step; nothing of a step is kept on self but the block tables."""

    def __init__(
        self,
        model: Llama4,
        memory: KVMemory,
        backend: AttentionBackend,
        pipeline: SamplingPipeline,
        *,
        groups: Sequence[KVGroup],
        page_size: int,
        max_running: int,
        max_context: int,
        device: torch.device,
        native_chunk: bool = False,
        empty_rows: bool = True,
    ) -> None:
        """native_chunk: the backend cuts chunks itself and is given rings as they are.  empty_rows: it takes virtual batches without queries."""
        self.model = model
        self.memory = memory
        self.backend = backend
        self.pipeline = pipeline
        self._groups = groups
        self._page_size = page_size
        self._device = device
        self._native_chunk, self._empty_rows = native_chunk, empty_rows
        self._tables = BlockTables(
            groups, page_size=page_size, max_running=max_running, max_context=max_context, device=device
        )

    def enter(self, requests: Sequence[DraftRequest]) -> None:
        """Block-table entries of slots taken for drafts."""
        self._tables.write(requests)

    def build(self, batch: ScheduledBatch) -> ForwardBatch:
        """Host lists → device tensors, slots of the new tokens, and one attention plan per phase and KV group."""
        self._tables.write(batch.sequences)
        layout = _lay_out(batch)
        lengths, starts, cu = layout.lengths, layout.starts, layout.cu
        owner = np.repeat(np.arange(len(lengths)), lengths)
        positions = self._send(np.arange(cu[-1]) + (starts - cu[:-1])[owner])
        token_ids = np.fromiter(
            chain.from_iterable(s.token_ids for s in batch.sequences), dtype=np.int64, count=int(cu[-1])
        )
        tables = self._step_tables(layout)
        last = np.repeat(cu[1:], layout.logits)
        behind = np.repeat(np.cumsum(layout.logits), layout.logits) - np.arange(len(last))
        return ForwardBatch(
            token_ids=self._send(token_ids),
            positions=positions,
            slot_mapping={
                g.name: _slots(tables[g.name], self._send(owner), positions, self._page_size) for g in self._groups
            },
            segments=self._segments(layout, tables),
            logits_rows=self._send(last - behind),
        )

    @torch.inference_mode()
    def execute(self, forward: ForwardBatch) -> torch.Tensor:
        """→ hidden states [T, hidden_size] after the final norm."""
        hidden: torch.Tensor = self.model(forward, self.memory, self.backend)
        return hidden

    @torch.inference_mode()
    def draw(
        self, batch: ScheduledBatch, forward: ForwardBatch, hidden: torch.Tensor, parsed: Mapping[str, object]
    ) -> StepTokens:
        """Draw for every sequence whose piece ended its known tokens: one token, or as many as its draft earns. parsed: request id → what its
        sampler parsed."""
        return StepTokens(drawn=[one.tokens for one in self.verify(batch, forward, hidden, parsed)])

    @torch.inference_mode()
    def verify(
        self, batch: ScheduledBatch, forward: ForwardBatch, hidden: torch.Tensor, parsed: Mapping[str, object]
    ) -> list[Verified]:
        """`draw`, with the rows the tokens came from."""
        rows = [row for s in batch.sequences if s.draws for row in draw_rows(s, parsed[s.request.request_id])]
        draws: Iterator[Draw] = iter(())
        if rows:
            logits = self._logits(hidden.index_select(0, forward.logits_rows))
            draws = iter(self.pipeline.sample(logits, rows))
        found, begin = [], 0
        for seq in batch.sequences:
            end = begin + len(seq.token_ids)
            own = list(islice(draws, seq.num_drafts + 1)) if seq.draws else []
            found.append(verified(seq, own, self._prompt_logprobs(seq, hidden[begin:end])))
            begin = end
        return found

    def _segments(self, layout: _Layout, tables: Mapping[str, torch.Tensor]) -> list[AttentionSegment]:
        """Phases are separate calls: backends have a kernel for each, and a decode row never waits for a mask."""
        return [self._segment(layout, tables, phase, *span) for phase, span in layout.phases.items()]

    def _segment(
        self, layout: _Layout, tables: Mapping[str, torch.Tensor], phase: Phase, first: int, last: int
    ) -> AttentionSegment:
        begin, end = int(layout.cu[first]), int(layout.cu[last])
        seq_lens = (layout.starts + layout.lengths)[first:last]
        meta = AttentionMetadata(
            cu_seqlens_q=self._send((layout.cu[first : last + 1] - begin).astype(np.int32)),
            seq_lens=self._send(seq_lens.astype(np.int32)),
            block_table=next(iter(tables.values()))[first:last],
            max_seqlen_q=int(layout.lengths[first:last].max()),
            max_seqlen_k=int(seq_lens.max()),
            num_seqs=last - first,
            phase=phase,
        )
        plans = {
            g.name: self.backend.plan(self._group_metadata(meta, g, tables[g.name][first:last], end - begin))
            for g in self._groups
        }
        return AttentionSegment(begin=begin, end=end, plans=plans)

    def _group_metadata(
        self, meta: AttentionMetadata, group: KVGroup, table: torch.Tensor, num_rows: int
    ) -> AttentionMetadata:
        scale = self.memory.table_scale[group.name]
        table = table if scale == 1 else table * scale
        if group.chunk_size is None:
            return replace(meta, block_table=table)
        if self._native_chunk:
            return replace(meta, block_table=table, chunk=ChunkInfo(size=group.chunk_size))
        if meta.phase == "verify":  # a draft may lie on both sides of a border
            if self._empty_rows:
                return virtual_batches(meta, table, group.chunk_size, self._page_size, 2)
            return chain_as_decodes(meta, table, num_rows, group.chunk_size, self._page_size)
        return single_chunk_metadata(meta, table, group.chunk_size, self._page_size)

    def _step_tables(self, layout: _Layout) -> dict[str, torch.Tensor]:
        longest = int((layout.starts + layout.lengths).max())
        pages = -(-longest // self._page_size)
        return {
            g.name: self._tables.rows(
                g.name, layout.rows, pages if g.chunk_size is None else self._tables.width[g.name]
            )
            for g in self._groups
        }

    def _prompt_logprobs(self, seq: ScheduledSequence, hidden: torch.Tensor) -> list[TokenLogprobs | None]:
        """Entry for prompt token i comes from row i − 1; the first token has none."""
        top = seq.request.params.prompt_logprobs
        prompt = seq.request.prompt_token_ids
        if top is None or seq.start >= len(prompt):
            return []
        targets = list(prompt[seq.start + 1 : seq.start + len(seq.token_ids) + 1])
        entries: list[TokenLogprobs | None] = [None] if seq.start == 0 else []
        for a in range(0, len(targets), LOGPROB_ROWS):
            wanted = torch.tensor(targets[a : a + LOGPROB_ROWS], device=hidden.device)
            entries += prompt_logprobs(self._logits(hidden[a : a + len(wanted)]), wanted, top)
        return entries

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The law of sampling is stated in float32, also for a float64 model."""
        return self.model.logits(hidden).float()

    def _send(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


def _lay_out(batch: ScheduledBatch) -> _Layout:
    sequences, num = batch.sequences, len(batch.sequences)
    lengths = np.fromiter((len(s.token_ids) for s in sequences), dtype=np.int64, count=num)
    borders = (0, batch.num_decodes, batch.num_decodes + batch.num_verified, num)
    spans = zip(PHASES, pairwise(borders), strict=True)
    return _Layout(
        rows=np.fromiter((s.row for s in sequences), dtype=np.int64, count=num),
        starts=np.fromiter((s.start for s in sequences), dtype=np.int64, count=num),
        lengths=lengths,
        cu=np.concatenate(([0], np.cumsum(lengths))),
        logits=np.fromiter((s.draws + s.num_drafts for s in sequences), dtype=np.int64, count=num),
        phases={phase: span for phase, span in spans if span[1] > span[0]},
    )


def _slots(table: torch.Tensor, owner: torch.Tensor, positions: torch.Tensor, page_size: int) -> torch.Tensor:
    """Slot of each new token: page · page_size + offset. table: int32 [B, W], a ring where W is smaller than the context."""
    page = table[owner, positions // page_size % table.shape[1]].long()
    return page * page_size + positions % page_size
