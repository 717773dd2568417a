"""A tree of guesses, grown as EAGLE-2 does: each level the draft's likeliest continuations of its best nodes; in the end, of all seen, the likeliest.

A level runs the draft over all nodes grown so far, each seeing the prefix and its own ancestors: its weights are read once whatever their number.
Their keys take the slots behind the sequence's last computed token, in the order of the nodes; what the target verifies overwrites them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from l4core.attention.step_rows import StepRows
from l4core.engine.batch import Draft
from l4core.engine.run.forward import Phase, TreeRows
from l4core.engine.speculation.draft_steps import DraftState, Ints
from l4core.plugin_ops.upload import upload_many


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeShape:
    """num_steps: levels.  topk: nodes of a level that are grown on, and continuations seen of each.  num_guesses: verified in the end."""

    num_steps: int
    topk: int
    num_guesses: int

    @property
    def num_slots(self) -> int:
        """Slots that growing takes, from the sequence's last token on."""
        return self.topk * (self.num_steps - 1)


@dataclass(slots=True)
class _Grown:
    """Nodes the draft has run, or is about to: [B, m] each, level after level. ids: their places among all that were seen.  inputs: [B, m, H].
    ancestors: bitmaps of nodes.  levels: of each column."""

    tokens: torch.Tensor
    ids: torch.Tensor
    scores: torch.Tensor
    inputs: torch.Tensor
    ancestors: torch.Tensor
    levels: list[int]


def grow(state: DraftState, rows: Ints, lengths: Ints, shape: TreeShape) -> list[Draft]:
    """One tree a sequence. rows: of the block tables.  lengths: tokens known, all but the last computed."""
    topk = shape.topk
    where, starts = upload_many([rows, lengths - 1], torch.int64, state.device)
    root = state.hidden.index_select(0, where)  # [B, H]
    scores, tokens = (x[:, 0] for x in _likeliest(state, root.unsqueeze(1), topk))
    column = torch.arange(topk, device=state.device).expand_as(tokens)
    grown = _Grown(tokens, column, scores, root.unsqueeze(1).expand(-1, topk, -1), 1 << column, [0] * topk)
    seen = [(tokens, torch.full_like(tokens, -1), scores)]  # tokens, parents among all seen, scores
    for level in range(1, shape.num_steps):
        hidden = _run(state, where, starts, grown, int(lengths.max()))  # [B, m, H]
        num, found = grown.tokens.shape[1], sum(tokens.shape[1] for tokens, _, _ in seen)
        chances, tokens = _likeliest(state, hidden[:, num - topk :], topk)  # [B, topk, topk]
        scores = (grown.scores[:, num - topk :, None] + chances).flatten(1)
        parents = torch.arange(num - topk, num, device=state.device).repeat_interleave(topk).expand_as(scores)
        seen.append((tokens.flatten(1), grown.ids.gather(1, parents), scores))
        if level < shape.num_steps - 1:
            _append(grown, hidden, tokens.flatten(1), parents, scores, found, level, topk)
    tokens, parents, scores = (torch.cat([part[i] for part in seen], dim=1) for i in range(3))
    table = zip(tokens.tolist(), parents.tolist(), scores.cpu().numpy(), strict=True)
    return [_chosen(own, before, likely, shape.num_guesses) for own, before, likely in table]


def _likeliest(state: DraftState, hidden: torch.Tensor, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden [B, n, H] → log-probabilities and target ids of the best continuations, [B, n, topk]."""
    values, tokens = state.draft.likeliest(hidden.reshape(-1, hidden.shape[-1]), topk, normalised=True)
    shape = (*hidden.shape[:2], topk)
    return values.view(shape), tokens.view(shape)


def _append(
    grown: _Grown,
    hidden: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    scores: torch.Tensor,
    found: int,
    level: int,
    topk: int,
) -> None:
    """The best of a level are grown on. parents: among the grown.  found: how many were seen before this level."""
    best = scores.topk(topk, dim=1).indices
    parent, num = parents.gather(1, best), grown.tokens.shape[1]
    own = 1 << torch.arange(num, num + topk, device=tokens.device).expand_as(best)
    size = hidden.shape[-1]
    grown.tokens = torch.cat((grown.tokens, tokens.gather(1, best)), dim=1)
    grown.ids = torch.cat((grown.ids, best + found), dim=1)
    grown.scores = torch.cat((grown.scores, scores.gather(1, best)), dim=1)
    grown.inputs = torch.cat((grown.inputs, hidden.gather(1, parent.unsqueeze(-1).expand(-1, -1, size))), dim=1)
    grown.ancestors = torch.cat((grown.ancestors, grown.ancestors.gather(1, parent) | own), dim=1)
    grown.levels += [level] * topk


def _run(state: DraftState, rows: torch.Tensor, starts: torch.Tensor, grown: _Grown, longest: int) -> torch.Tensor:
    """[B, m, H]: the draft over all nodes."""
    num_seqs, num = grown.tokens.shape
    device = state.device
    owner = torch.arange(num_seqs, device=device).repeat_interleave(num)
    levels = torch.tensor(grown.levels, device=device)
    step = StepRows(
        rows=rows.int(),
        starts=starts.int(),
        seq_lens=(starts + num).int(),
        positions=(starts.unsqueeze(1) + torch.arange(num, device=device)).flatten(),
        owner=owner.int(),
    )
    phase = Phase(
        name="verify",
        first=0,
        last=num_seqs,
        begin=0,
        end=num_seqs * num,
        cu_seqlens_q=torch.arange(0, (num_seqs + 1) * num, num, device=device, dtype=torch.int32),
        max_seqlen_q=num,
        max_seqlen_k=longest + num,
    )
    trees = TreeRows(positions=(starts.unsqueeze(1) + levels).flatten(), ancestors=grown.ancestors.flatten())
    planner = state.planner
    forward = planner.plan(grown.tokens.flatten(), step, [phase], owner[:0], longest + num, trees)
    hidden: torch.Tensor = state.draft(forward, grown.inputs.flatten(0, 1).clone(), planner.memory, planner.backend)
    return hidden.view(num_seqs, num, -1)


def _chosen(tokens: list[int], parents: list[int], scores: np.ndarray, num_guesses: int) -> Draft:
    """The likeliest of all seen. A node is never likelier than its parent, and comes later, so the parent is among them."""
    kept = sorted(np.argsort(-scores, kind="stable")[:num_guesses].tolist())
    place = {node: index for index, node in enumerate(kept)}
    return Draft(
        token_ids=[tokens[node] for node in kept],
        parents=[-1 if parents[node] < 0 else place[parents[node]] for node in kept],
    )
