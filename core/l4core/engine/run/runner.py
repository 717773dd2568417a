"""Turns a scheduled batch into device tensors, runs the model on them, and draws tokens. Knows nothing of queues, text or HTTP.

A batch that a captured shape holds (decodes, and chains to verify) takes the short way: its few numbers are uploaded and a graph is replayed, which
ends with the drawn tokens. Any other batch is planned tensor by tensor. Both ways end in the same `Computed`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from l4core.engine.batch import PENDING, DraftRequest, Ints, ScheduledBatch, ScheduledSequence
from l4core.engine.run.block_tables import BlockTables
from l4core.engine.run.draws import PendingDraws, RowParams
from l4core.engine.run.fixed_step import Computed, FixedStep, StepOutputs, StepRequests, StepShape
from l4core.engine.run.forward import ForwardPlanner, TreeRows, lay_out_step
from l4core.engine.run.graphs import Graphs
from l4core.engine.run.padding import AuxRows, find_padded, places_in
from l4core.engine.run.row_law import RowLaw
from l4core.engine.run.verify_rows import Verified
from l4core.engine.run.verify_rows import draw_rows as rows_of
from l4core.kv.blocks import KVGroup
from l4core.kv.memory import KVMemory
from l4core.model.batch import ForwardBatch
from l4core.model.llama4 import Llama4
from l4core.platform import has_triton
from l4core.plugin_api import AttentionBackend
from l4core.plugin_ops.upload import Download, upload_many
from l4core.request import Request, TokenLogprobs
from l4core.sampling.logprobs import prompt_logprobs
from l4core.sampling.pipeline import Drawing, SamplingPipeline
from l4core.sampling.verify import ancestors, depths

Forward: TypeAlias = ForwardBatch | FixedStep
"""A planned batch, or a captured step whose inputs are filled in."""

LOGPROB_ROWS = 256
"""Prompt rows whose logits are held at once: 256 × 202,048 float32 = 207 MB."""


class Runner:
    """One model on one device. `build` → `execute` → `draw` is a step, and none of the three waits for the device; what outlives a step are the
    block tables, the requests of the rows, and `pending`, by row: the token drawn last in line 0, in line i guess number i of what follows, where a
    drafter leaves its guesses on the device. Work of later steps is queued behind that of earlier ones."""

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
        max_drafts: int = 0,
    ) -> None:
        """native_chunk: the backend cuts chunks itself and is given rings as they are.  empty_rows: it takes virtual batches without queries.
        max_drafts: guesses that a drafter on the device may leave in `pending` for a sequence."""
        self.model = model
        self.memory = memory
        self.backend = backend
        self.pipeline = pipeline
        self.graphs: Graphs[FixedStep] | None = None
        self._groups = groups
        self._device = device
        self._max_context = max_context
        self._has_kernels = has_triton(device.type)
        self._tables = BlockTables(
            groups, page_size=page_size, max_running=max_running, max_context=max_context, device=device
        )
        self.max_running = max_running
        self._planner = ForwardPlanner(
            self._tables,
            backend,
            memory,
            groups=groups,
            page_size=page_size,
            native_chunk=native_chunk,
            empty_rows=empty_rows,
        )
        self._params = RowParams(max_running + 1, masks=self._has_kernels)
        self.pending = torch.zeros(1 + max_drafts, max_running + 1, dtype=torch.int64, device=device)
        self._last_tokens = self.pending[0]

    def capture(self, shapes: Iterable[StepShape], *, progress: bool) -> Graphs[FixedStep]:
        """Capture graphs of steps of these shapes; from then on batches that fit one are replayed."""
        wanted = list(shapes)
        outputs = StepOutputs(max(s.num_seqs * s.num_tokens for s in wanted), self.model, self._device)
        self.graphs = Graphs(lambda shape: self.fixed_step(shape, outputs), wanted, progress=progress)
        return self.graphs

    def fixed_step(self, shape: StepShape, outputs: StepOutputs | None = None) -> FixedStep:
        """A step of this shape on this runner's tables and memory."""
        outputs = outputs or StepOutputs(shape.num_seqs * shape.num_tokens, self.model, self._device)
        return FixedStep(shape, self.model, self._planner, outputs, self.pending, self._max_context)

    def planner_of(self, group: str) -> ForwardPlanner:
        """Plans attention of one group only, on this runner's tables and memory: for a draft."""
        return self._planner.of_groups([g for g in self._groups if g.name == group])

    def enter(self, requests: Sequence[DraftRequest]) -> None:
        """Block-table entries of slots taken for drafts."""
        self._tables.write(requests)

    def build(self, batch: ScheduledBatch) -> Forward:
        """Host lists → device tensors, slots of the new tokens, and one attention plan per phase and KV group."""
        self._tables.write(batch.with_new_pages)
        self._params.enter(batch.others)  # whoever decodes has a row since its first piece
        step = self._find_graph(batch)
        if step is None:
            return self._plan(batch)
        columns, rows = batch.columns, batch.columns.rows
        step.fill(
            StepRequests(
                rows=rows,
                starts=columns.starts,
                lengths=columns.lengths,
                token_ids=columns.token_ids,
                temperature=self._params.temperature[rows],
                log_min_p=self._params.log_min_p[rows],
                seed=self._params.seed[rows],
                top_p=self._params.top_p[rows],
            )
        )
        return step

    @torch.inference_mode()
    def execute(self, forward: Forward) -> Computed:
        """The forward pass; of a captured step, the draw too."""
        if isinstance(forward, FixedStep):
            assert self.graphs is not None
            computed: Computed = self.graphs.replay(forward)
            return computed
        aux = self.model.new_aux(len(forward.token_ids))
        hidden = self.model(forward, self.memory, self.backend, aux)
        return Computed(hidden=hidden, aux=None if aux is None else AuxRows(values=aux))

    @torch.inference_mode()
    def draw(
        self, batch: ScheduledBatch, forward: Forward, computed: Computed, parsed: Mapping[str, object]
    ) -> PendingDraws:
        """Draw for every sequence whose piece ended its known tokens: one token, or as many as its draft earns. parsed: request id → what its
        sampler parsed. Only queued; `PendingDraws.wait` brings the tokens."""
        drawing = _Drawing.of(batch, forward)
        plain = np.zeros(len(drawing.rows), dtype=bool)
        drawn = others = None
        if len(drawing.rows):
            logits = computed.logits if computed.logits is not None else self._head(forward, computed)
            drawn = computed.drawn if computed.drawn is not None else self._draw_by_law(forward, drawing, logits)
            if drawn is not None:
                plain = self._params.are_plain(drawing.request, drawing.rows, drawing.positions, parsed)
                drawn = self._draw_masked(forward, drawing, plain, logits, drawn)
            if not plain.all():
                others = self._draw_by_pipeline(drawing, ~plain, logits, parsed)
        return PendingDraws(
            batch,
            plain=plain,
            positions=drawing.positions,
            drawn=None if drawn is None else Download(drawn),
            places=drawing.places,
            others=others,
            prompt_logprobs=self._prompt_logprobs(batch, computed.hidden),
        )

    def verify(
        self, batch: ScheduledBatch, forward: Forward, computed: Computed, parsed: Mapping[str, object]
    ) -> list[Verified]:
        """`draw`, waited for, with the rows the tokens came from."""
        return self.draw(batch, forward, computed, parsed).verified()

    # --- build -------------------------------------------------------------------------------------------------------------------------

    def _find_graph(self, batch: ScheduledBatch) -> FixedStep | None:
        """A captured step for a batch of decodes and chains; the shorter ones are padded there."""
        columns = batch.columns
        _, _, prompts, num = columns.borders
        if self.graphs is None or prompts < num or any(s.parents for s in batch.others):
            return None
        return find_padded(self.graphs, columns.starts, columns.lengths)

    def _plan(self, batch: ScheduledBatch) -> ForwardBatch:
        columns = batch.columns
        lengths, starts = columns.lengths, columns.starts
        cu = np.concatenate(([0], np.cumsum(lengths)))
        seq_lens = starts + lengths
        owner = np.repeat(np.arange(len(lengths)), lengths)
        last = np.repeat(cu[1:], columns.num_draws)
        behind = np.repeat(np.cumsum(columns.num_draws), columns.num_draws) - np.arange(len(last))
        token_ids, positions, logits_rows = upload_many(
            [columns.token_ids, np.arange(cu[-1]) + (starts - cu[:-1])[owner], last - behind],
            torch.int64,
            self._device,
        )
        step, phases = lay_out_step(columns.rows, starts, lengths, columns.borders, positions)
        if (columns.token_ids == PENDING).any():
            number = (positions - step.starts[step.owner]).clamp(max=len(self.pending) - 1)
            token_ids = torch.where(token_ids < 0, self.pending[number, step.rows[step.owner]], token_ids)
        return self._planner.plan(token_ids, step, phases, logits_rows, int(seq_lens.max()), self._trees(batch))

    def _trees(self, batch: ScheduledBatch) -> TreeRows | None:
        """None when every draft is a chain."""
        if not any(s.parents for s in batch.others):
            return None
        places, seen = [], []
        for seq in batch.sequences:
            first, count = len(seq.token_ids) - seq.num_drafts, seq.num_drafts
            places.append(seq.start + np.arange(first - 1))
            places.append(seq.start + first - 1 + np.array(depths(count, seq.parents)))
            seen.append(np.zeros(first - 1, dtype=np.int64))
            seen.append(np.array([bits - (bits >> 63 << 64) for bits in ancestors(count, seq.parents)], dtype=np.int64))
        positions, bitmaps = upload_many([np.concatenate(places), np.concatenate(seen)], torch.int64, self._device)
        return TreeRows(positions=positions, ancestors=bitmaps)

    @torch.inference_mode()
    def settle(self, batch: ScheduledBatch, verified: Sequence[Verified]) -> None:
        """Keys and values of accepted guesses move to the slots behind the sequence's last token: those of a tree lie apart."""
        owner, sources, targets = [], [], []
        for index, (seq, one) in enumerate(zip(batch.sequences, verified, strict=True)):
            for place, row in enumerate(one.path):
                if seq.parents and row != place:
                    owner.append(index)
                    sources.append(seq.start + row)
                    targets.append(seq.start + place)
        if not owner:
            return
        rows = np.array([batch.sequences[i].row for i in owner], dtype=np.int64)
        where = [np.array(positions, dtype=np.int64) for positions in (sources, targets)]
        rows_, sources_, targets_ = upload_many([rows, *where], torch.int64, self._device)
        for group in self._groups:
            source, target = (self._tables.slots(group.name, rows_, positions) for positions in (sources_, targets_))
            self.memory.move(group.layer_ids, source, target)

    # --- draw --------------------------------------------------------------------------------------------------------------------------

    def _head(self, forward: Forward, computed: Computed) -> torch.Tensor:
        assert isinstance(forward, ForwardBatch)
        return self.model.head(computed.hidden.index_select(0, forward.logits_rows))

    def _draw_by_law(self, forward: Forward, drawing: _Drawing, logits: torch.Tensor) -> torch.Tensor | None:
        """Every row by its temperature alone, and top-p and min-p where this rank has whole rows. None where one rank has no kernels: the pipeline
        draws all rows then."""
        ranks = self.model.ranks
        if ranks.size == 1 and not self._has_kernels:
            return None
        law = self._law(forward, drawing)
        drawn = law.draw(logits) if ranks.size == 1 else law.draw_over(logits, self.model.first_id, ranks)
        self._remember(drawing, np.ones(len(drawing.rows), dtype=bool), drawn[0])
        return drawn

    def _draw_masked(
        self,
        forward: Forward,
        drawing: _Drawing,
        plain: npt.NDArray[np.bool_],
        logits: torch.Tensor,
        drawn: torch.Tensor,
    ) -> torch.Tensor:
        """Over several ranks: plain rows with top-p or min-p are drawn from all their logits. → drawn, with those exchanged."""
        masked = plain & self._params.are_masked(drawing.rows)
        if self.model.ranks.size == 1 or not masked.any():
            return drawn
        draws = drawing.draws_of(masked)
        draws_, places = upload_many([draws, drawing.places_of(draws)], torch.int64, self._device)
        whole = self.model.whole_rows(logits.index_select(0, places))
        again = self._law(forward, drawing).of_rows(draws_).draw(whole)
        self._remember(drawing, masked, again[0])
        return drawn.index_copy(1, places, again)

    def _law(self, forward: Forward, drawing: _Drawing) -> RowLaw:
        """How each draw is made, on the device."""
        rows, params = np.repeat(drawing.rows, drawing.counts), self._params
        integers = [params.seed[rows], params.top_p[rows]]
        if isinstance(forward, FixedStep):  # chains only
            first = np.repeat(np.cumsum(drawing.counts) - drawing.counts, drawing.counts)
            integers.append(np.repeat(drawing.positions, drawing.counts) + np.arange(len(rows)) - first)
            seeds, top_p, positions = upload_many(integers, torch.int64, self._device)
        else:
            seeds, top_p = upload_many(integers, torch.int64, self._device)
            positions = forward.positions[forward.logits_rows] + 1
        floats = [params.temperature[rows], params.log_min_p[rows]]
        temperature, log_min_p = upload_many([x.astype(np.float32) for x in floats], torch.float32, self._device)
        return RowLaw(temperature=temperature, seeds=seeds, positions=positions, top_p=top_p, log_min_p=log_min_p)

    def _draw_by_pipeline(
        self, drawing: _Drawing, which: npt.NDArray[np.bool_], logits: torch.Tensor, parsed: Mapping[str, object]
    ) -> Drawing:
        chosen = [drawing.sequence(i) for i in np.flatnonzero(which).tolist()]
        rows = [row for seq in chosen for row in rows_of(seq, parsed[seq.request.request_id])]
        if which.all() and drawing.places is None:
            logits = logits[: len(rows)]
        else:
            places = drawing.places_of(drawing.draws_of(which))
            logits = logits.index_select(0, *upload_many([places], torch.int64, self._device))
        others = self.pipeline.start(self.model.whole_rows(logits).float().contiguous(), rows)
        self._remember(drawing, which, others.tokens)
        return others

    def _remember(self, drawing: _Drawing, which: npt.NDArray[np.bool_], tokens: torch.Tensor) -> None:
        """What rows drew last, for PENDING tokens of the next step. Where drafts are verified the host sends the tokens it accepted."""
        if (drawing.counts == 1).all():
            (rows,) = upload_many([drawing.rows[which]], torch.int64, self._device)
            self._last_tokens.index_copy_(0, rows, tokens)

    def _prompt_logprobs(self, batch: ScheduledBatch, hidden: torch.Tensor) -> dict[str, list[TokenLogprobs | None]]:
        """Of the requests that ask for them. These wait for the device."""
        found, begin = {}, len(batch.decodes.states)
        for seq in batch.others:
            end = begin + len(seq.token_ids)
            top, prompt = seq.request.params.prompt_logprobs, seq.request.prompt_token_ids
            if top is not None and seq.start < len(prompt):
                found[seq.request.request_id] = self._logprobs_of_piece(seq, top, hidden[begin:end])
            begin = end
        return found

    def _logprobs_of_piece(self, seq: ScheduledSequence, top: int, hidden: torch.Tensor) -> list[TokenLogprobs | None]:
        """Entry for prompt token i comes from row i − 1; the first token has none."""
        targets = list(seq.request.prompt_token_ids[seq.start + 1 : seq.start + len(seq.token_ids) + 1])
        entries: list[TokenLogprobs | None] = [None] if seq.start == 0 else []
        for a in range(0, len(targets), LOGPROB_ROWS):
            wanted = torch.tensor(targets[a : a + LOGPROB_ROWS], device=hidden.device)
            logits = self.model.logits(hidden[a : a + len(wanted)]).float()
            entries += prompt_logprobs(logits, wanted, top)
        return entries


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drawing:
    """The sequences of a batch that draw, [N]. where: in the batch.  rows: of the block tables.  positions: of each one's first draw.
    counts: draws of each.  places: rows of logits of all draws, None = one after another."""

    batch: ScheduledBatch
    where: Ints
    rows: Ints
    positions: Ints
    counts: Ints
    places: Ints | None

    @classmethod
    def of(cls, batch: ScheduledBatch, forward: Forward) -> _Drawing:
        columns = batch.columns
        where = np.flatnonzero(columns.num_draws)
        counts = columns.num_draws[where]
        positions = (columns.starts + columns.lengths)[where] - counts + 1
        places = None
        if isinstance(forward, FixedStep) and forward.shape.num_tokens > 1:
            places = places_in(forward.shape.num_tokens, counts)
        return cls(
            batch=batch, where=where, rows=columns.rows[where], positions=positions, counts=counts, places=places
        )

    def draws_of(self, which: npt.NDArray[np.bool_]) -> Ints:
        """Of some of the sequences: which of all draws are theirs."""
        return np.flatnonzero(np.repeat(which, self.counts))

    def places_of(self, draws: Ints) -> Ints:
        return draws if self.places is None else self.places[draws]

    def sequence(self, index: int) -> ScheduledSequence:
        return self.batch.sequences[int(self.where[index])]

    def request(self, index: int) -> Request:
        return self.sequence(index).request
