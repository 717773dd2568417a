"""EAGLE3 in the engine: after each step of the target the draft reads what it computed, before the next one it guesses on.

    observe    the step's rows, each with the token that follows it and the target's hidden states of its own position: one pass of the draft, which
               writes its keys and values and leaves, for every sequence that drew a token, the hidden state that its next guesses start from
    propose    k guesses: the first from that hidden state, each further one from a pass of one row at the next position

Draft keys and values lie in the sequence's own pages (layer `num_layers` of the global group), so prefix hits, preemption and release need nothing of
their own. A shared page may hold the entry of another continuation at its last position: that can cost acceptance, never a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from l4core.attention.step_tables import StepRows
from l4core.engine.batch import Draft, DraftRequest, ScheduledBatch, ScheduledSequence
from l4core.engine.forward import ForwardPlanner, Phase
from l4core.model.eagle3 import GROUP, Eagle3
from l4core.model.eagle3_config import Target
from l4core.model.eagle3_weights import load_draft
from l4core.model.layers import Linear
from l4core.model.weights import fill_dummy
from l4core.plugin_ops.philox import seed_tensor
from l4core.plugin_ops.upload import upload_many
from l4core.sampling.noise import gumbel_noise_at

if TYPE_CHECKING:
    from l4core.engine.runner import Runner
    from l4core.engine.speculation import DraftModel
    from l4core.engine.verify_rows import Verified
    from l4core.model.batch import ForwardBatch

CANDIDATES = 64
"""Of a sampled row so many likely tokens get the target's noise; what the target draws is nearly always among them."""


class Eagle3Speculation:
    """One draft on one device. Remembers a hidden state for each block-table row."""

    reads_target = True

    def __init__(
        self, draft: Eagle3, planner: ForwardPlanner, *, num_drafts: int, max_running: int, device: torch.device
    ) -> None:
        """planner: of the global group."""
        self.num_drafts = num_drafts
        self._draft, self._planner, self._device = draft, planner, device
        weight = draft.norm.weight
        self._hidden = torch.zeros(max_running, draft.config.hidden_size, dtype=weight.dtype, device=device)
        self._ready: dict[str, tuple[int, int]] = {}

    @torch.inference_mode()
    def observe(self, batch: ScheduledBatch, aux: torch.Tensor, verified: Sequence[Verified]) -> None:
        """aux: [T, num_aux · Ht] of the batch's rows."""
        following = np.concatenate([_following(seq, one) for seq, one in zip(batch.sequences, verified, strict=True)])
        starts = np.array([seq.start for seq in batch.sequences], dtype=np.int64)
        lengths = np.array([len(seq.token_ids) for seq in batch.sequences], dtype=np.int64)
        forward = self._plan([seq.row for seq in batch.sequences], starts, lengths, following, batch)
        hidden = self._draft(forward, self._draft.combine(aux), self._planner.memory, self._planner.backend)
        rows, last, begin = [], [], 0
        for seq, one in zip(batch.sequences, verified, strict=True):
            count = len(one.tokens.token_ids)
            if count:
                first = len(seq.token_ids) - seq.num_drafts
                rows.append(seq.row)
                last.append(begin + first - 1 + count - 1)
                self._ready[seq.request.request_id] = (seq.row, seq.start + first + count)
            begin += len(seq.token_ids)
        if rows:
            where, which = upload_many(
                [np.array(rows, dtype=np.int64), np.array(last, dtype=np.int64)], torch.int64, self._device
            )
            self._hidden.index_copy_(0, where, hidden.index_select(0, which))

    @torch.inference_mode()
    def propose(self, requests: Sequence[DraftRequest]) -> Mapping[str, Draft]:
        ready = [r for r in requests if self._ready.get(r.request.request_id) == (r.row, r.num_tokens)]
        if not ready:
            return {}
        rows = np.array([r.row for r in ready], dtype=np.int64)
        positions = np.array([r.num_tokens for r in ready], dtype=np.int64)
        (where,) = upload_many([rows], torch.int64, self._device)
        hidden = self._hidden.index_select(0, where)
        most = max(r.max_drafts for r in ready)
        guesses = [self._guess(hidden, ready, positions)]
        for step in range(most - 1):
            forward = self._plan(rows, positions - 1 + step, np.ones(len(rows), dtype=np.int64), guesses[-1])
            hidden = self._draft(forward, hidden, self._planner.memory, self._planner.backend)
            guesses.append(self._guess(hidden, ready, positions + step + 1))
        table = torch.stack(guesses, dim=1).tolist()
        return {r.request.request_id: Draft(token_ids=own[: r.max_drafts]) for r, own in zip(ready, table, strict=True)}

    def forget(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._ready.pop(request_id, None)

    def _guess(self, hidden: torch.Tensor, requests: Sequence[DraftRequest], positions: np.ndarray) -> torch.Tensor:
        """int64 [B] target ids: what the law would draw from the draft's logits at these positions, masks and penalties apart."""
        logits = self._draft.logits(hidden)  # [B, draft vocabulary]
        best = logits.argmax(dim=1)
        sampled = [i for i, r in enumerate(requests) if r.request.params.temperature > 0]
        if not sampled:
            return self._draft.target_ids(best)
        params = [requests[i].request.params for i in sampled]
        index, at = upload_many([np.array(sampled, dtype=np.int64), positions[sampled]], torch.int64, self._device)
        temperature = torch.tensor([p.temperature for p in params], dtype=torch.float32, device=self._device)
        top = logits.index_select(0, index).topk(min(CANDIDATES, logits.shape[1]), dim=1)
        tokens = self._draft.target_ids(top.indices)
        noise = gumbel_noise_at(seed_tensor([p.seed or 0 for p in params], self._device), at, tokens)
        scores = (top.values - top.values[:, :1]) / temperature[:, None] + noise
        drawn = tokens.gather(1, scores.argmax(dim=1, keepdim=True))[:, 0]
        return self._draft.target_ids(best).index_copy_(0, index, drawn)

    def _plan(
        self,
        rows: Sequence[int] | np.ndarray,
        starts: np.ndarray,
        lengths: np.ndarray,
        token_ids: np.ndarray | torch.Tensor,
        batch: ScheduledBatch | None = None,
    ) -> ForwardBatch:
        """The draft's own batch: sequence b computes `lengths[b]` rows from position `starts[b]`. batch: whose phases they are, None = decodes."""
        num = len(lengths)
        cu = np.concatenate(([0], np.cumsum(lengths)))
        owner = np.repeat(np.arange(num), lengths)
        seq_lens = starts + lengths
        decodes, verifies = (num, 0) if batch is None else (batch.num_decodes, batch.num_verified)
        borders = (0, decodes, decodes + verifies, num)
        spans = [(name, a, b) for name, (a, b) in zip(PHASES, pairwise(borders), strict=True) if b > a]
        wide = [np.arange(cu[-1]) + (starts - cu[:-1])[owner]]
        if isinstance(token_ids, np.ndarray):
            wide.append(token_ids)
        positions, *ids = upload_many(wide, torch.int64, self._device)
        small = [np.asarray(rows), starts, seq_lens, owner, *(cu[a : b + 1] - cu[a] for _, a, b in spans)]
        rows_, starts_, seq_lens_, owner_, *cus = upload_many(small, torch.int32, self._device)
        phases = [
            Phase(
                name=name,  # type: ignore[arg-type]
                first=a,
                last=b,
                begin=int(cu[a]),
                end=int(cu[b]),
                cu_seqlens_q=cu_seqlens,
                max_seqlen_q=int(lengths[a:b].max()),
                max_seqlen_k=int(seq_lens[a:b].max()),
            )
            for (name, a, b), cu_seqlens in zip(spans, cus, strict=True)
        ]
        step = StepRows(rows=rows_, starts=starts_, seq_lens=seq_lens_, positions=positions, owner=owner_)
        tokens = ids[0] if ids else token_ids
        assert isinstance(tokens, torch.Tensor)
        return self._planner.plan(tokens, step, phases, positions[:0], longest=int(seq_lens.max()))


PHASES = ("decode", "verify", "prefill")


def _following(seq: ScheduledSequence, one: Verified) -> np.ndarray:
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
    model: DraftModel, runner: Runner, *, num_drafts: int, max_positions: int, dummy_seed: int | None
) -> Eagle3Speculation:
    """The draft on the runner's device, in its dtype, with its weights (random ones of `dummy_seed`, if that is given)."""
    target, config = runner.model, model.config
    weight = target.embed.weight
    shapes = Target(
        num_layers=target.config.num_layers, hidden_size=target.config.hidden_size, vocab_size=target.config.vocab_size
    )
    head = target.embed if target.config.tie_word_embeddings else target.lm_head
    with torch.device("meta"):
        draft = Eagle3(
            config,
            layer_id=target.config.num_layers,
            max_positions=max_positions,
            embed=None if model.plan.own_embed else target.embed,
            lm_head=None if model.plan.own_head else head,
        )
    draft = draft.to(weight.dtype).to_empty(device=weight.device).requires_grad_(False).eval()
    draft.d2t.zero_()  # type: ignore[operator]
    if dummy_seed is None:
        load_draft(model.folder, config, shapes, draft, model.plan)
    else:
        fill_dummy(dict(draft.named_parameters()), dummy_seed)
    for module in list(draft.modules()):
        if isinstance(module, Linear):
            module.pack()
    return Eagle3Speculation(
        draft,
        runner.planner_of(GROUP),
        num_drafts=num_drafts,
        max_running=runner.max_running,
        device=weight.device,
    )
