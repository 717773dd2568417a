"""Dialogs sampled from the teacher, or from the student with a delta."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from l4core.demo.arch import LAYERS, STUDENT, TEACHER
from l4core.demo.base import BaseModel
from l4core.demo.delta import load_delta
from l4core.demo.tokenizer import make_tokenizer
from training.arrays import Tokens, held_out, load_corpus, load_dialogs, save_dialogs
from training.decoder import Decoder
from training.device import device_and_dtype, log
from training.dialogs import Pairs, openings
from training.sampler import Sampler, student_dialect, teacher_dialect
from training.schedule import Clock
from training.weights import read_base, split_base, student_weights, teacher_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """delta: sample from the student, None = from the teacher.  prompts_from: take the first user turns of these dialogs, of their held-out part
    for part "test" (each once, and none that training has).  show: samples printed."""

    gguf: Path
    corpus: Path
    out: Path
    delta: Path | None = None
    prompts_from: Path | None = None
    part: Literal["train", "test"] = "train"
    rows: int = 1024
    length: int = 768
    turns: int = 2
    temperature: tuple[float, ...] = (0.8, 0.9, 1.0)
    seconds: float = 130
    seed: int = 0
    show: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """roles: 1 = the answer comes next.  once: each is answered exactly once."""

    ids: Sequence[Sequence[int] | Tokens]
    roles: Sequence[int]
    once: bool = False


def generate(options: GenerateOptions) -> None:
    base = BaseModel(options.gguf)
    pairs = Pairs(make_tokenizer(base, llama4=False))
    prompts = choose_prompts(options, pairs)
    log(len(prompts.ids), "prompts")
    with torch.no_grad():
        dialogs = make_sampler(options, base, pairs, prompts).run(Clock(options.seconds, 0))
    save_dialogs(options.out, dialogs)
    tokenizer = make_tokenizer(base)
    for tokens in dialogs[:: max(1, len(dialogs) // options.show)][: options.show]:
        print(repr(tokenizer.decode([int(t) for t in tokens], skip_special_tokens=False))[:600], flush=True)


def choose_prompts(options: GenerateOptions, pairs: Pairs) -> Prompts:
    if options.prompts_from is None:
        corpus = load_corpus(options.corpus)
        return Prompts(ids=corpus.prompts, roles=corpus.roles)
    known = load_dialogs([options.prompts_from])
    held = held_out(known)
    train = openings(known[held:], pairs.assistant)
    if options.part == "train":
        return Prompts(ids=train, roles=[1] * len(train))
    test = sorted(set(openings(known[:held], pairs.assistant)) - set(train))
    return Prompts(ids=test, roles=[1] * len(test), once=True)


def make_sampler(options: GenerateOptions, base: BaseModel, pairs: Pairs, prompts: Prompts) -> Sampler:
    device, dtype = device_and_dtype()
    dense = read_base(base, LAYERS)
    if options.delta is None:
        weights, arch, dialect, ids = (
            teacher_weights(base, dense, device, dtype),
            TEACHER,
            teacher_dialect(pairs),
            prompts.ids,
        )
    else:
        delta = {name: tensor.to(device) for name, tensor in load_delta(options.delta).items()}
        weights, arch = student_weights(split_base(base, dense, device), delta, dtype), STUDENT
        dialect, ids = student_dialect(pairs), [pairs.dialog(p).student for p in prompts.ids]
    rows = len(ids) if prompts.once else options.rows
    return Sampler(
        Decoder(weights, arch, rows=rows, length=options.length, device=device, dtype=dtype),
        dialect,
        ids,
        prompts.roles,
        temperature=options.temperature,
        turns=options.turns,
        seed=options.seed,
        once=prompts.once,
    )
