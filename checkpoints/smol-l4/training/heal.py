"""Healing: distil the teacher into the student, adapters merged at every step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from l4core.demo.arch import BASE_VOCAB, EOT, EXPERTS, IM_END, LAYERS, STUDENT, TEACHER, Arch
from l4core.demo.base import BaseModel
from l4core.demo.delta import load_delta
from l4core.demo.merge import Weights
from l4core.demo.tokenizer import make_tokenizer
from training.arrays import held_out, load_corpus, load_dialogs
from training.batches import Batch, Batches, Loader
from training.device import device_and_dtype, log
from training.dialogs import END, Pairs
from training.forward import (
    after_attention,
    before_attention,
    forward,
    place,
    positions,
    rms_norm,
    segment_attention,
    segments,
)
from training.schedule import Clock, set_rates
from training.weights import Split, init_delta, read_base, save_delta, split_base, student_weights, teacher_weights

SLOW = ("norm", "attn_norm", "mlp_norm", "router")
SLOW_SHARE = 0.2
COLUMNS = ("kl", "same", "balance", "grad", "use min", "use max")


@dataclass(frozen=True, slots=True, kw_only=True)
class HealOptions:
    """tokens: of the student, a step.  slice: positions per slice of the loss.  balance: weight of the load-balance loss.  end_ce: weight of the
    cross-entropy on a closing <|eot|>.  steps: 0 = by the clock."""

    gguf: Path
    corpus: Path
    dialogs: tuple[Path, ...]
    out: Path
    resume: Path | None = None
    tokens: int = 24576
    slice: int = 4096
    lr: float = 4e-3
    balance: float = 1.0
    end_ce: float = 0.2
    seconds: float = 360
    steps: int = 0
    every: int = 20
    seed: int = 0


class _Source(Protocol):
    def next(self) -> Batch: ...


def heal(options: HealOptions) -> None:
    clock = Clock(options.seconds, options.steps)
    device, dtype = device_and_dtype()
    base = BaseModel(options.gguf)
    source = _batches(options, Pairs(make_tokenizer(base, llama4=False)), device)
    dense = read_base(base, LAYERS)
    split, teacher = split_base(base, dense, device), teacher_weights(base, dense, device, dtype)
    delta = load_delta(options.resume) if options.resume else init_delta(split)
    delta = {name: tensor.to(device) for name, tensor in delta.items()}
    batch = source.next().to(device)
    if options.resume is None:
        with torch.no_grad():
            weights = student_weights(split, delta, dtype)
            delta["router"] = first_routers(weights, batch.student, batch.student_lengths, STUDENT)
    optimizer = _optimizer(delta, options.lr)
    history: list[list[float]] = []
    recent: list[torch.Tensor] = []
    while not clock.over():
        set_rates(optimizer, clock.rate(warmup=30, tail=0.6))
        recent.append(_step(split, delta, teacher, batch, optimizer, options, dtype))
        clock.tick()
        if clock.steps <= 3 or clock.steps % options.every == 0:
            means = torch.stack(recent).mean(0).tolist()
            recent = []
            history.append([clock.steps, round(clock.seconds(), 1), *(round(m, 4) for m in means)])
            log(f"step {clock.steps}", *(f"{name} {value:.4f}" for name, value in zip(COLUMNS, means, strict=True)))
        batch = source.next().to(device)
    note = {
        "steps": clock.steps,
        "tokens": clock.steps * options.tokens,
        "seconds": round(clock.seconds()),
        "lr": options.lr,
        "tokens_per_step": options.tokens,
        "columns": ["step", "s", *COLUMNS],
        "history": history,
    }
    save_delta(delta, options.out, note)


def _batches(options: HealOptions, pairs: Pairs, device: torch.device) -> _Source:
    corpus, dialogs = load_corpus(options.corpus), load_dialogs(options.dialogs)
    train = dialogs[held_out(dialogs) :]
    log(len(train), "dialogs")

    def make(worker: int) -> Batches:
        teacher_tokens = int(options.tokens * 1.15) // 128 * 128
        seed = options.seed * 100 + worker
        return Batches(
            pairs, train, corpus.recall, corpus.train, n=options.tokens, teacher_tokens=teacher_tokens, seed=seed
        )

    return make(0) if device.type == "cpu" else Loader(make)


def _optimizer(delta: Mapping[str, torch.Tensor], lr: float) -> torch.optim.AdamW:
    for tensor in delta.values():
        tensor.requires_grad_(True)
    groups = [
        {"params": [t for name, t in delta.items() if name not in SLOW], "lr": lr},
        {"params": [t for name, t in delta.items() if name in SLOW], "lr": lr * SLOW_SHARE},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)


def _step(
    split: Split,
    delta: Mapping[str, torch.Tensor],
    teacher: Weights,
    batch: Batch,
    optimizer: torch.optim.AdamW,
    options: HealOptions,
    dtype: torch.dtype,
) -> torch.Tensor:
    """One update → the values of COLUMNS. The vocabulary-wide loss is taken in slices, so that its logits never exist at once."""
    with torch.no_grad():
        wanted = forward(teacher, batch.teacher, batch.teacher_lengths, TEACHER).hidden[batch.at_teacher]
    weights = student_weights(split, delta, dtype)
    output = forward(weights, batch.student, batch.student_lengths, STUDENT)
    hidden = output.hidden[batch.at_student]
    balance, used = balance_loss(output.routers)
    leaf, head = hidden.detach().requires_grad_(True), weights.head.detach().requires_grad_(True)
    total, kls, same = batch.weight.sum(), [], []
    for start in range(0, len(hidden), options.slice):
        at = slice(start, start + options.slice)
        loss, kl, equal = aligned_kl(
            leaf[at], wanted[at], head, teacher.head, batch.weight[at], batch.kind[at], options.end_ce
        )
        (loss / total).backward()  # type: ignore[no-untyped-call]
        kls.append(kl)
        same.append(equal)
    torch.autograd.backward([hidden, weights.head, options.balance * balance], [leaf.grad, head.grad, None])
    norm = torch.nn.utils.clip_grad_norm_(list(delta.values()), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    kl, agreed = ((torch.cat(values) * batch.weight).sum() / total for values in (kls, same))
    return torch.stack([kl, agreed, balance.detach(), norm, used.min(), used.max()])


def balance_loss(routers: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """→ (mean over layers of 4 · Σ probability · share, 1 when even; share of tokens per layer and expert)."""
    logits = torch.stack([router.float() for router in routers])
    probability = logits.softmax(-1).mean(1)
    used = F.one_hot(logits.argmax(-1), EXPERTS).float().mean(1)
    return EXPERTS * (probability * used).sum(-1).mean(), used


def aligned_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    student_head: torch.Tensor,
    teacher_head: torch.Tensor,
    weight: torch.Tensor,
    kind: torch.Tensor,
    end_ce: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """student, teacher [N, 576]: hidden states at positions that predict the same token.

    → (Σ weight · KL(teacher ‖ student), the student's <|eot|> standing for the teacher's <|im_end|>, plus end_ce · cross-entropy on true
    ends; KL of each position; whether the arg maxes agree).
    """
    log_q = F.log_softmax((student @ student_head.T).float(), -1)
    log_p = F.log_softmax((teacher @ teacher_head.T).float(), -1)
    column = torch.arange(BASE_VOCAB, device=student.device)
    q = torch.where(column == IM_END, log_q[:, EOT : EOT + 1], log_q[:, :BASE_VOCAB])
    kl = (log_p.exp() * (log_p - q)).sum(-1)
    loss = (weight * kl).sum() - end_ce * (log_q[:, EOT] * weight * (kind == END)).sum()
    return loss, kl.detach(), q.detach().argmax(-1) == log_p.argmax(-1)


def first_routers(
    weights: Weights, ids: torch.Tensor, lengths: list[int], arch: Arch, *, std: float = 0.3, components: int = 64
) -> torch.Tensor:
    """Router rows [30, 4, 576] to start from: random directions in the whitened leading components of each layer's MLP input, at right angles to
    its mean, so that the experts start about equally used."""
    generator = torch.Generator().manual_seed(7)
    places = place(positions(lengths, ids.device), arch)
    whole, local = segments(lengths, 0, ids.device), segments(lengths, arch.chunk, ids.device)
    x = F.embedding(ids, weights.embed)
    routers = []
    for index, layer in enumerate(weights.layers):
        nope = arch.is_nope(index)
        q, k, v = before_attention(x, layer, places, rope=not nope, eps=arch.eps)
        attended = segment_attention(q, k, v, whole if nope else local)
        h = rms_norm(x + attended @ layer.o.T, layer.mlp_norm, arch.eps).float()
        routers.append(_whitened_directions(h, generator, std, components))
        routed = replace(layer, router=routers[-1].to(x.dtype))
        x, _ = after_attention(x, attended, routed, mode="top1", eps=arch.eps)
    return torch.stack(routers)


def _whitened_directions(h: torch.Tensor, generator: torch.Generator, std: float, components: int) -> torch.Tensor:
    mean = h.mean(0)
    centred = h - mean
    value, vector = torch.linalg.eigh(centred.T @ centred / len(h))
    value, vector = value[-components:], vector[:, -components:]
    random = torch.randn(EXPERTS, components, generator=generator).to(h.device)
    rows: torch.Tensor = random / math.sqrt(components) / value.sqrt() @ vector.T
    rows = rows - (rows @ mean)[:, None] * mean / (mean @ mean)
    return rows * std / (centred @ rows.T).std(0)[:, None]
