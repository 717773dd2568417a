"""EAGLE3 in the engine: after each step of the target the draft reads what it computed, before the next one it guesses on.

    observe    the step's rows, each with the token that follows it and the target's hidden states of its own position: one pass of the draft, which
               writes its keys and values and leaves, for every sequence that drew a token, the hidden state that its next guesses start from
    propose    k guesses: the first from that hidden state, each further one from a pass of one row at the next position

Draft keys and values lie in the sequence's own pages (layer `num_layers` of the global group), so preemption and release need nothing of their own.
The entry at a page's last position was computed with the token behind the page: only a sequence that goes on with it finds the page (kv.prefix).
On a device with graphs both are replayed for batches of decodes and chains; a step with prefill pieces is planned tensor by tensor, as the target's
is.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch

from l4core.engine.batch import PENDING, Draft, DraftRequest, ScheduledBatch, ScheduledSequence
from l4core.engine.run.fixed_step import StepShape
from l4core.engine.run.forward import lay_out_step
from l4core.engine.run.graphs import Graphs
from l4core.engine.run.padding import AuxRows, find_padded
from l4core.engine.speculation.draft_steps import DraftState, FixedExtend, FixedGuess, Ints
from l4core.engine.speculation.draft_tree import TreeShape, grow
from l4core.engine.speculation.late import LateGuesses
from l4core.model.eagle3 import GROUP, Eagle3
from l4core.model.eagle3_config import Target
from l4core.model.eagle3_weights import load_draft
from l4core.model.layers import Linear
from l4core.model.weights import fill_dummy
from l4core.plugin_ops.upload import upload_many

if TYPE_CHECKING:
    from l4core.engine.run.runner import Runner
    from l4core.engine.run.verify_rows import Verified
    from l4core.engine.speculation.draft_model import DraftModel
    from l4core.model.batch import ForwardBatch

logger = logging.getLogger(__name__)


class Eagle3Speculation:
    """One draft on one device."""

    def __init__(self, state: DraftState, *, num_drafts: int, tree: TreeShape | None = None) -> None:
        """tree: None = chains."""
        self.num_drafts = self.max_drafts = num_drafts if tree is None else tree.num_steps
        self.num_slots = 0 if tree is None else tree.num_slots
        self._tree = tree
        self._state = state
        self._extends: Graphs[FixedExtend] | None = None
        self._guesses: Mapping[bool, Graphs[FixedGuess]] = {}
        self._ready: dict[str, tuple[int, int]] = {}
        self._late: LateGuesses | None = None
        self._reads = True
        self._longest_context, self._told = state.draft.config.longest_context, False

    def want(self, num_drafts: int, *, reads: bool) -> None:
        """Sequences that decode while it does not read have a hole in the draft's keys and get no guesses later; new ones do."""
        self.num_drafts, self._reads = min(num_drafts, self.max_drafts), reads
        if not self.reads_target:
            self._ready.clear()

    @property
    def reads_target(self) -> bool:
        return self.num_drafts > 0 or self._reads

    @property
    def _grows(self) -> bool:
        """Fewer levels than the tree has are guessed as a chain."""
        return self._tree is not None and self.num_drafts == self.max_drafts

    @property
    def num_guesses(self) -> int:
        return self._tree.num_guesses if self._tree is not None and self._grows else self.num_drafts

    def capture(self, shapes: Sequence[StepShape], *, progress: bool) -> None:
        """shapes: those of the target's steps, (sequences, rows)."""
        state, aux = self._state, self._new_aux(shapes)
        self._extends = Graphs(lambda shape: FixedExtend(shape, state, aux), shapes, progress=progress)
        self._guesses = {
            sampled: Graphs(partial(FixedGuess, state=state, sampled=sampled), _guess_shapes(shapes), progress=progress)
            for sampled in (False, True)
        }

    def rehearse(self, shapes: Sequence[StepShape]) -> None:
        """Runs once, largest first, what `capture` with these shapes would capture."""
        aux = self._new_aux(shapes)
        for shape in reversed(shapes):
            FixedExtend(shape, self._state, aux).run()
        for shape in reversed(_guess_shapes(shapes)):
            for sampled in (False, True):
                FixedGuess(shape, self._state, sampled=sampled).run()

    def _new_aux(self, shapes: Sequence[StepShape]) -> torch.Tensor:
        """Memory for the rows of the largest shape."""
        config, weight = self._state.draft.config, self._state.draft.norm.weight
        width = len(config.aux_layers) * config.target_hidden_size
        num_rows = max(s.num_seqs * s.num_tokens for s in shapes)
        return torch.zeros(num_rows, width, dtype=weight.dtype, device=self._state.device)

    @torch.inference_mode()
    def observe(self, batch: ScheduledBatch, aux: AuxRows, verified: Sequence[Verified]) -> None:
        """aux: of the batch's rows."""
        if not any(self._is_whole(seq) for seq in batch.sequences):
            self.forget([seq.request.request_id for seq in batch.sequences])
            return
        borders = (batch.num_decodes, batch.num_decodes + batch.num_verified)
        sequences, num = batch.sequences, len(batch.sequences)
        if any(seq.parents for seq in sequences):
            sequences, aux = _paths_only(sequences, aux.values, verified)
        rows = np.fromiter((seq.row for seq in sequences), dtype=np.int64, count=num)
        starts = np.fromiter((seq.start for seq in sequences), dtype=np.int64, count=num)
        lengths = np.fromiter((len(seq.token_ids) for seq in sequences), dtype=np.int64, count=num)
        counts = np.fromiter((len(one.tokens.token_ids) for one in verified), dtype=np.int64, count=num)
        firsts = lengths - np.fromiter((seq.num_drafts for seq in sequences), dtype=np.int64, count=num)
        last = firsts + counts - 2  # of each sequence's rows, the one that drew its last token
        following = np.concatenate([_following(seq, one) for seq, one in zip(sequences, verified, strict=True)])
        for seq, count, first in zip(sequences, counts.tolist(), firsts.tolist(), strict=True):
            if count and self._is_whole(seq):
                self._ready[seq.request.request_id] = (seq.row, seq.start + first + count)
        step = self._find_extend(starts, lengths, counts)
        if step is not None and self._extends is not None:
            step.fill(rows, starts, lengths, last, following, aux)
            self._extends.replay(step)
            return
        self._extend(borders, rows, starts, lengths, last, counts > 0, following, aux.packed(lengths))

    @torch.inference_mode()
    def propose(self, requests: Sequence[DraftRequest], *, late: bool = False) -> Mapping[str, Draft]:
        """A chain can be late, a tree's shape is the host's to choose."""
        self._late = None
        ready = [
            r
            for r in requests
            if self._ready.get(r.request.request_id) == (r.row, r.num_tokens) and not self._is_long(r.num_tokens)
        ]
        if not ready:
            return {}
        if (
            self._tree is not None
            and self.num_drafts == self.max_drafts
            and all(r.room >= self.num_slots for r in ready)
        ):
            return self._grow(ready, self._tree)
        num = len(ready)
        rows = np.fromiter((r.row for r in ready), dtype=np.int64, count=num)
        lengths = np.fromiter((r.num_tokens for r in ready), dtype=np.int64, count=num)
        params = [r.request.params for r in ready]
        seeds = np.fromiter((((p.seed or 0) + 2**63) % 2**64 - 2**63 for p in params), dtype=np.int64, count=num)
        temperature = np.fromiter((p.temperature for p in params), dtype=np.float64, count=num)
        most = np.fromiter((min(r.max_drafts, self.max_drafts) for r in ready), dtype=np.int64, count=num)
        slots, sampled = lengths + most - 1, bool(temperature.any())
        step = self._find_guess(num, int(most.max()), sampled=sampled)
        if step is not None:
            step.fill(rows, lengths, slots, seeds, temperature)
            where, table = step.rows, self._guesses[sampled].replay(step)
        else:
            where, table = self._guess(rows, lengths, slots, seeds, temperature, int(most.max()))
        names, counts = [r.request.request_id for r in ready], most.tolist()
        if late:
            columns = {name: i for i, name in enumerate(names)}
            self._late = LateGuesses(table, where, columns, self._state.pending)
            return {name: Draft(token_ids=(PENDING,) * count) for name, count in zip(names, counts, strict=True)}
        chains = table[:, :num].t().tolist()
        return {name: Draft(token_ids=own[:n]) for name, own, n in zip(names, chains, counts, strict=True)}

    def known(self, batch: ScheduledBatch) -> ScheduledBatch:
        return batch if self._late is None else self._late.told(batch)

    def _grow(self, ready: Sequence[DraftRequest], shape: TreeShape) -> Mapping[str, Draft]:
        rows = np.fromiter((r.row for r in ready), dtype=np.int64, count=len(ready))
        lengths = np.fromiter((r.num_tokens for r in ready), dtype=np.int64, count=len(ready))
        drafts = grow(self._state, rows, lengths, shape)
        return {r.request.request_id: _cut(draft, r.max_drafts) for r, draft in zip(ready, drafts, strict=True)}

    def forget(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._ready.pop(request_id, None)

    def _is_whole(self, seq: ScheduledSequence) -> bool:
        """Whether the draft has read all that came before this piece, as far as is known, and will be asked about what follows."""
        if len(seq.request.prompt_token_ids) >= self._longest_context:
            return False
        return not seq.is_decode or self._ready.get(seq.request.request_id) == (seq.row, seq.start + 1)

    def _is_long(self, num_tokens: int) -> bool:
        """Says so once."""
        is_long = num_tokens > self._longest_context
        if is_long and not self._told:
            self._told = True
            logger.info(
                "speculation (EAGLE3): sequences of more than %d tokens go on without guesses; --speculative-option longest_context=N changes that",
                self._longest_context,
            )
        return is_long

    # --- as graphs ---------------------------------------------------------------------------------------------------------------------

    def _find_extend(self, starts: Ints, lengths: Ints, counts: Ints) -> FixedExtend | None:
        """Where every sequence draws."""
        if self._extends is None or not counts.all():
            return None
        return find_padded(self._extends, starts, lengths)

    def _find_guess(self, num: int, count: int, *, sampled: bool) -> FixedGuess | None:
        """One that makes enough."""
        graphs = self._guesses.get(sampled)
        return None if graphs is None else graphs.find(num, count)

    # --- tensor by tensor --------------------------------------------------------------------------------------------------------------

    def _extend(
        self,
        borders: tuple[int, int],
        rows: Ints,
        starts: Ints,
        lengths: Ints,
        last: Ints,
        drew: np.ndarray,
        following: Ints,
        aux: torch.Tensor,
    ) -> None:
        state = self._state
        forward = self._plan(rows, starts, lengths, following, borders)
        hidden = state.draft(forward, state.draft.combine(aux), state.planner.memory, state.planner.backend)
        if drew.any():
            begins = np.cumsum(lengths) - lengths
            where, which = upload_many([rows[drew], (begins + last)[drew]], torch.int64, state.device)
            state.hidden.index_copy_(0, where, hidden.index_select(0, which))

    def _guess(
        self, rows: Ints, lengths: Ints, slots: Ints, seeds: Ints, temperature: np.ndarray, most: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """→ rows on the device, and int64 [most, B]. slots: as FixedGuess takes them."""
        state = self._state
        where, seeds_, lengths_ = upload_many([rows, seeds, lengths], torch.int64, state.device)
        heat = None
        if temperature.any():
            (heat,) = upload_many([temperature.astype(np.float32)], torch.float32, state.device)
        hidden = state.hidden.index_select(0, where)
        guesses = [state.guess(hidden, heat, seeds_, lengths_)]
        for step in range(most - 1):
            forward = self._plan(rows, np.minimum(lengths - 1 + step, slots), np.ones_like(rows), guesses[-1])
            hidden = state.draft(forward, hidden, state.planner.memory, state.planner.backend)
            guesses.append(state.guess(hidden, heat, seeds_, lengths_ + step + 1))
        return where, torch.stack(guesses)

    def _plan(
        self,
        rows: Ints,
        starts: Ints,
        lengths: Ints,
        token_ids: Ints | torch.Tensor,
        borders: tuple[int, int] | None = None,
    ) -> ForwardBatch:
        """The draft's own batch: sequence b computes `lengths[b]` rows from position `starts[b]`. borders: where verified sequences
        begin, and prefill pieces; None = all decode."""
        num = len(lengths)
        before, owner = np.cumsum(lengths) - lengths, np.repeat(np.arange(num), lengths)
        wide = [np.arange(len(owner)) + (starts - before)[owner]]
        if isinstance(token_ids, np.ndarray):
            wide.append(token_ids)
        positions, *ids = upload_many(wide, torch.int64, self._state.device)
        step, phases = lay_out_step(rows, starts, lengths, (0, *(borders or (num, num)), num), positions)
        tokens = ids[0] if ids else token_ids
        assert isinstance(tokens, torch.Tensor)
        return self._state.planner.plan(tokens, step, phases, positions[:0], longest=int((starts + lengths).max()))


def _guess_shapes(shapes: Sequence[StepShape]) -> list[StepShape]:
    """(sequences, guesses) for the target's steps with guesses."""
    return sorted({StepShape(s.num_seqs, s.num_tokens - 1) for s in shapes if s.num_tokens > 1})


def _paths_only(
    sequences: Sequence[ScheduledSequence], aux: torch.Tensor, verified: Sequence[Verified]
) -> tuple[Sequence[ScheduledSequence], AuxRows]:
    """The same step as if the accepted path of each tree had been its whole draft: that is how its keys and values lie now."""
    found, kept, begin = [], list[int](), 0
    for seq, one in zip(sequences, verified, strict=True):
        end = begin + len(seq.token_ids)
        if seq.parents:
            tokens = [seq.token_ids[row] for row in one.path]
            kept += [begin + row for row in one.path]
            found.append(msgspec.structs.replace(seq, token_ids=tokens, num_drafts=len(tokens) - 1, parents=()))
        else:
            kept += range(begin, end)
            found.append(seq)
        begin = end
    (rows,) = upload_many([np.array(kept, dtype=np.int64)], torch.int64, aux.device)
    return found, AuxRows(values=aux.index_select(0, rows))


def _cut(draft: Draft, count: int) -> Draft:
    return Draft(token_ids=draft.token_ids[:count], parents=draft.parents[:count])


def _following(seq: ScheduledSequence, one: Verified) -> Ints:
    """int64 [rows of the piece]: the token after each. Rows of refused guesses get token 0: what they compute is overwritten before it is read."""
    first = len(seq.token_ids) - seq.num_drafts  # the last of these is the row that draws, if the piece draws
    end = seq.start + first
    known = [*seq.token_ids[1:first], *one.tokens.token_ids]
    if not seq.draws:
        known += _known(seq, end, end + 1)
    found = np.zeros(len(seq.token_ids), dtype=np.int64)
    found[: len(known)] = known
    return found


def _known(seq: ScheduledSequence, begin: int, end: int) -> Sequence[int]:
    prompt = seq.request.prompt_token_ids
    outputs = seq.output_token_ids[max(0, begin - len(prompt)) : max(0, end - len(prompt))]
    return [*prompt[begin:end], *outputs]


def create_eagle3(
    model: DraftModel,
    runner: Runner,
    *,
    num_drafts: int,
    tree: TreeShape | None,
    max_context: int,
    dummy_seed: int | None,
) -> Eagle3Speculation:
    """The draft on the runner's device, in its dtype, with its weights (random ones of `dummy_seed`, if that is given)."""
    target, config = runner.model, model.config
    shapes = Target(
        num_layers=target.config.num_layers, hidden_size=target.config.hidden_size, vocab_size=target.config.vocab_size
    )
    draft = _new_draft(model, runner, max_context)
    if dummy_seed is None:
        load_draft(model.folder, config, shapes, draft, model.plan)
    else:
        fill_dummy(dict(draft.named_parameters()), dummy_seed, target.ranks.rank)
    for module in list(draft.modules()):
        if isinstance(module, Linear):
            module.pack()
    return _speculation(draft, runner, num_drafts, tree, max_context)


def eagle3_without_weights(
    model: DraftModel, runner: Runner, *, num_drafts: int, tree: TreeShape | None, max_context: int
) -> Eagle3Speculation:
    """The same before its weights are read, for a rehearsal."""
    return _speculation(_new_draft(model, runner, max_context), runner, num_drafts, tree, max_context)


def _new_draft(model: DraftModel, runner: Runner, max_context: int) -> Eagle3:
    target = runner.model
    weight = target.embed.weight
    head = target.embed if target.config.tie_word_embeddings else target.lm_head
    with torch.device("meta"):
        draft = Eagle3(
            model.config,
            layer_id=target.config.num_layers,
            max_positions=max_context,
            embed=None if model.plan.own_embed else target.embed,
            lm_head=None if model.plan.own_head else head,
            ranks=target.ranks,
        )
    draft = draft.to(weight.dtype).to_empty(device=weight.device).requires_grad_(False).eval()
    draft.d2t.zero_()  # type: ignore[operator]
    return draft


def _speculation(
    draft: Eagle3, runner: Runner, num_drafts: int, tree: TreeShape | None, max_context: int
) -> Eagle3Speculation:
    state = DraftState(draft, runner.planner_of(GROUP), runner.pending, max_context=max_context)
    return Eagle3Speculation(state, num_drafts=num_drafts, tree=tree)
