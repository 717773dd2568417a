"""The measurements of the model card. Each takes a model as (weights, arch) and text or dialogs as token arrays."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from l4core.demo.arch import BASE_VOCAB, BOT, END_OF_TEXT, EXPERTS, LAYERS, TEACHER, Arch
from l4core.demo.merge import Weights
from training.arrays import Tokens
from training.decoder import Decoder
from training.dialogs import ANSWER, END, Pairs
from training.forward import forward
from training.heal import aligned_kl

SLICE = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """weights run under arch; teacher: it reads ChatML and starts text with <|endoftext|>."""

    weights: Weights
    arch: Arch
    teacher: bool = False

    @property
    def first_token(self) -> int:
        return END_OF_TEXT if self.teacher else BOT

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        return forward(self.weights, ids, [len(ids)], self.arch).hidden

    def read(self, text: torch.Tensor) -> torch.Tensor:
        """Hidden states that predict each token of a text."""
        return self.hidden(F.pad(text[:-1], (1, 0), value=self.first_token))

    def log_probabilities(self, hidden: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """In slices, so that the logits of a long text never exist at once."""
        for start in range(0, len(hidden), SLICE):
            at = slice(start, start + SLICE)
            yield at, (hidden[at] @ self.weights.head.T).float().log_softmax(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFigures:
    """kl: KL(teacher ‖ model), nats.  same: agreement of the arg max.  perplexity: of the text."""

    kl: float
    same: float
    perplexity: float


def to_ids(tokens: Sequence[int] | Tokens, device: torch.device) -> torch.Tensor:
    return torch.tensor([int(t) for t in tokens], device=device)


@torch.no_grad()
def text_figures(model: Model, teacher: Model, texts: Sequence[Tokens], border: int) -> list[TextFigures]:
    """Figures at positions below the border and from it on. texts: equally long."""
    device, length = model.weights.head.device, len(texts[0])
    sums = torch.zeros(2, 3, dtype=torch.float64)
    for text in texts:
        ids = to_ids(text, device)
        pairs = zip(model.log_probabilities(model.read(ids)), teacher.log_probabilities(teacher.read(ids)), strict=True)
        for (at, log_q), (_, log_p) in pairs:
            first = torch.arange(length, device=device)[at] < border
            values = _compare(log_p, log_q, ids[at])
            for row, mask in enumerate((first, ~first)):
                sums[row] += torch.stack([(v.double() * mask).sum() for v in values]).cpu()
    counts = [min(border, length) * len(texts), max(0, length - border) * len(texts)]
    return [_figures(row, count) for row, count in zip(sums, counts, strict=True) if count]


def _compare(log_p: torch.Tensor, log_q: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    kl = (log_p.exp() * (log_p - log_q[:, :BASE_VOCAB])).sum(-1)
    return kl, log_q.argmax(-1) == log_p.argmax(-1), -log_q.gather(1, ids[:, None])[:, 0]


def _figures(sums: torch.Tensor, count: int) -> TextFigures:
    kl, same, nll = (sums / count).tolist()
    return TextFigures(kl=kl, same=same, perplexity=float(np.exp(nll)))


@torch.no_grad()
def dialog_figures(
    model: Model, teacher: Model, pairs: Pairs, dialogs: Sequence[Tokens]
) -> dict[str, dict[str, float]]:
    """KL and agreement on the tokens of answers, and at ends of turn."""
    device = model.weights.head.device
    total = torch.zeros(2, 3, dtype=torch.float64)
    for dialog in dialogs:
        pair = pairs.dialog(dialog)
        if not pair.kind:
            continue
        wanted = teacher.hidden(to_ids(pair.teacher, device))[pair.at_teacher]
        found = model.hidden(to_ids(pair.student, device))[pair.at_student]
        kind, weight = to_ids(pair.kind, device), torch.ones(len(pair.kind), device=device)
        _, kl, same = aligned_kl(found, wanted, model.weights.head, teacher.weights.head, weight, kind, 0.0)
        for row, mask in enumerate((kind == ANSWER, kind == END)):
            total[row] += torch.stack([kl.double()[mask].sum(), same.double()[mask].sum(), mask.double().sum()]).cpu()
    names = ("answers", "ends of turn")
    return {n: {"kl": float(t[0] / t[2]), "same": float(t[1] / t[2])} for n, t in zip(names, total, strict=True)}


@torch.no_grad()
def loss_by_position(model: Model, texts: Sequence[Tokens], edges: Sequence[int]) -> dict[str, float]:
    """Mean loss, nats a token, between the edges."""
    device = model.weights.head.device
    loss = torch.zeros(len(texts[0]), dtype=torch.float64)
    for text in texts:
        ids = to_ids(text, device)
        parts = [-log.gather(1, ids[at][:, None])[:, 0] for at, log in model.log_probabilities(model.read(ids))]
        loss += torch.cat(parts).double().cpu() / len(texts)
    return {f"{a}-{b}": float(loss[a:b].mean()) for a, b in itertools.pairwise(edges)}


@torch.no_grad()
def copy_loss(model: Model, text: Tokens, gap: int, cases: int, *, size: int = 200, seed: int = 0) -> float:
    """Mean loss on a passage's second occurrence (its first 20 tokens left out), `gap` tokens after the first."""
    rng, total = random.Random(seed), 0.0
    for _ in range(cases):
        a, b = (rng.randrange(len(text) - 4096) for _ in range(2))
        passage = text[a : a + size]
        ids = to_ids(np.concatenate([passage, text[b : b + gap], passage]), model.weights.head.device)
        logits = (model.read(ids)[20 - size :] @ model.weights.head.T).float()
        total += float(F.cross_entropy(logits, ids[20 - size :])) / cases
    return total


@torch.no_grad()
def recall_share(model: Model, pairs: Pairs, cases: Sequence[tuple[Sequence[int], list[int]]]) -> float:
    """Share of (dialog, ids of the word) whose word is right under greedy decoding of the given beginning of the answer."""
    good = 0
    for dialog, word in cases:
        pair = pairs.dialog(dialog)
        ids = pair.teacher if model.teacher else pair.student
        end = len(ids) - (3 if model.teacher else 2)  # before ".", the end of turn (and the teacher's newline)
        assert ids[end - len(word) : end] == word
        hidden = model.hidden(to_ids(ids, model.weights.head.device))
        guess = (hidden[end - len(word) - 1 : end - 1] @ model.weights.head.T).argmax(-1).tolist()
        good += guess == word
    return good / len(cases)


@torch.no_grad()
def expert_usage(model: Model, streams: Sequence[Sequence[int]]) -> list[list[float]]:
    """Share of tokens that each expert of each layer gets."""
    use = torch.zeros(LAYERS, EXPERTS)
    for stream in streams:
        ids = to_ids(stream, model.weights.head.device)
        routers = forward(model.weights, ids, [len(ids)], model.arch).routers
        chosen = [F.one_hot(r.argmax(-1), EXPERTS).float().sum(0) for r in routers if r is not None]
        use += torch.stack(chosen).cpu()
    shares: list[list[float]] = (use / use.sum(1, keepdim=True)).round(decimals=3).tolist()
    return shares


@torch.no_grad()
def greedy_answers(
    model: Model, prompts: Sequence[Sequence[int]], end: int, length: int, dtype: torch.dtype
) -> list[list[int]]:
    """Greedy answers to tokenised prompts, all rows at once."""
    device = model.weights.head.device
    decoder = Decoder(model.weights, model.arch, rows=len(prompts), length=length, device=device, dtype=dtype)
    rows, done = [list(p) for p in prompts], [False] * len(prompts)
    for position in range(length - 1):
        ids = to_ids([r[position] if position < len(r) else 0 for r in rows], device)
        guess = decoder.logits(ids, torch.full_like(ids, position)).argmax(-1).tolist()
        for index, row in enumerate(rows):
            if position == len(row) - 1 and not done[index]:
                row.append(guess[index])
                done[index] = guess[index] == end
        if all(done):
            break
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


def teacher_model(weights: Weights) -> Model:
    return Model(weights=weights, arch=TEACHER, teacher=True)
