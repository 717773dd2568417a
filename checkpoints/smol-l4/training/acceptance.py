"""Acceptance length of the draft, counted offline over sequences that the target wrote greedily."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from l4core.demo.arch import PAD, Arch
from l4core.demo.merge import Weights
from training.draft_model import AUX_LAYERS, Draft, unroll
from training.forward import forward, rms_norm

BATCH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """ids [n, length] padded; lengths [n]; answer [n, length]: 1 where the token belongs to an answer, its closing <|eot|> included."""

    ids: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    answer: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, at: slice) -> Rows:
        return Rows(ids=self.ids[at], lengths=self.lengths[at], answer=self.answer[at])


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    """length: tokens a verification step yields on average, bonus counted.  reached: share of steps whose first 1, 2, … guesses hold."""

    length: float
    reached: list[float]
    steps: int


def concatenate(parts: Sequence[Rows]) -> Rows:
    return Rows(
        ids=np.concatenate([p.ids for p in parts]),
        lengths=np.concatenate([p.lengths for p in parts]),
        answer=np.concatenate([p.answer for p in parts]),
    )


def target_outputs(weights: Weights, arch: Arch, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [B, L] → normed hidden [B, L, 576], the draft's input [B, L, 3·576]."""
    rows, length = ids.shape
    output = forward(weights, ids.reshape(-1), [length] * rows, arch, keep=AUX_LAYERS)
    return output.hidden.view(rows, length, -1), torch.cat(output.kept, -1).view(rows, length, -1)


def next_embeddings(weights: Weights, ids: torch.Tensor, steps: int) -> torch.Tensor:
    """Embedding of the token after each position, continued with padding for `steps` more."""
    return F.embedding(F.pad(ids, (0, steps), value=PAD)[:, 1:], weights.embed)


@torch.no_grad()
def acceptance(
    draft: Draft, keep: torch.Tensor, weights: Weights, arch: Arch, rows: Rows, depth: int = 3
) -> Acceptance:
    """Greedy chains of `depth` drafted tokens. keep: target id of each draft id."""
    tokens, steps, reached = 0, 0, np.zeros(depth)
    for start in range(0, len(rows), BATCH):
        part = rows[slice(start, start + BATCH)]
        hits = _hits(draft, keep, weights, arch, part, depth)
        for row in range(len(part)):
            for run in answer_runs(part, row):
                for accepted, gained in walk(run, [h[row] for h in hits]):
                    reached[:accepted] += 1
                    tokens += gained
                    steps += 1
    return Acceptance(length=tokens / max(steps, 1), reached=(reached / max(steps, 1)).round(4).tolist(), steps=steps)


def _hits(
    draft: Draft, keep: torch.Tensor, weights: Weights, arch: Arch, rows: Rows, depth: int
) -> list[npt.NDArray[np.bool_]]:
    """For each depth s: whether the guess at position i equals token i + 2 + s."""
    ids = torch.from_numpy(rows.ids).to(weights.head.device)
    _, aux = target_outputs(weights, arch, ids)
    found = []
    for step, hidden in enumerate(unroll(draft, aux, next_embeddings(weights, ids, depth + 1), depth)):
        guess = keep[(rms_norm(hidden, draft["norm.weight"]) @ draft["lm_head.weight"].T).argmax(-1)]
        wanted = F.pad(ids, (0, depth + 2), value=-1)[:, 2 + step : 2 + step + ids.shape[1]]
        found.append((guess == wanted).cpu().numpy())
    return found


def answer_runs(rows: Rows, row: int) -> list[tuple[int, int]]:
    """(first, last) position of each answer of a row."""
    marks = np.flatnonzero(rows.answer[row])
    marks = marks[(marks > 0) & (marks < rows.lengths[row])]
    if not len(marks):
        return []
    runs = np.split(marks, np.flatnonzero(np.diff(marks) > 1) + 1)
    return [(int(run[0]), int(run[-1])) for run in runs]


def walk(run: tuple[int, int], hits: Sequence[npt.NDArray[np.bool_]]) -> list[tuple[int, int]]:
    """The verification steps of one answer → (guesses accepted, tokens gained) of each. The answer's first token comes from the prompt's own
    forward pass; a chain for known token p starts from hidden state p − 1."""
    at, last = run
    steps = []
    while at < last:
        accepted = 0
        while accepted < len(hits) and at + 1 + accepted <= last and hits[accepted][at - 1]:
            accepted += 1
        gained = min(accepted + 1, last - at)
        steps.append((accepted, gained))
        at += accepted + 1
    return steps
