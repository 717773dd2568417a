"""Measures smol-l4 for its card: teacher, the rewrite before healing, and the healed student with one feature at a time broken."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from l4core.demo.arch import BOT, EOT, IM_END, LAYERS, STUDENT, TEACHER
from l4core.demo.base import BaseModel
from l4core.demo.delta import load_delta
from l4core.demo.tokenizer import make_tokenizer
from training import metrics
from training.arrays import Corpus, Tokens, held_out, load_corpus, load_dialogs
from training.device import device_and_dtype
from training.dialogs import Pairs
from training.metrics import Model
from training.prompts import DEFAULT_SYSTEM, chatml, recall_dialogs
from training.weights import cast, init_delta, read_base, split_base, student_weights, teacher_weights

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PROMPTS = (
    "What is the capital of France?",
    "List the three primary colors.",
    "Write a short poem about the sea.",
    "What is 2+2?",
    "Who wrote Romeo and Juliet?",
    "Explain photosynthesis in one sentence.",
    "Write a Python function that adds two numbers.",
    "What is the largest planet in the solar system?",
    "Give me three tips for sleeping better.",
    "Translate 'good morning' to French.",
    "What is the opposite of hot?",
    "Tell me a short story about a dog.",
)
BROKEN = {
    "healed": STUDENT,
    "chunk mask off": replace(STUDENT, chunk=0),
    "temperature off": replace(STUDENT, temperature=False),
    "router off": replace(STUDENT, router="off"),
    "router shifted": replace(STUDENT, router="shift"),
    "RoPE in the NoPE layers": replace(STUDENT, nope=False),
    "NoPE layers cut to the chunk": replace(STUDENT, nope_chunked=True),
}
MAIN = ("teacher", "not healed", "healed", "NoPE layers cut to the chunk")
EDGES = (0, 512, 1024, 2048, 4096, 6144, 8192)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions:
    """docs: held-out pieces of `length` tokens per source; held: dialogs; long_docs: pieces of 8192; cases: recall and copy cases per distance."""

    gguf: Path
    delta: Path
    corpus: Path
    dialogs: tuple[Path, ...]
    out: Path
    parts: tuple[str, ...]
    sizes: tuple[int, ...] = (60, 300, 600, 1100, 1600)
    docs: int = 48
    length: int = 2048
    held: int = 80
    long_docs: int = 8
    cases: int = 100
    max_new: int = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """All that a part needs."""

    options: EvaluateOptions
    models: Mapping[str, Model]
    corpus: Corpus
    dialogs: Sequence[Tokens]
    pairs: Pairs
    plain: Tokenizer
    tokenizer: Tokenizer
    rng: np.random.Generator

    def cut(self, text: Tokens, length: int, count: int) -> list[Tokens]:
        starts = self.rng.integers(0, max(1, len(text) - length), count)
        return [text[start : start + length] for start in starts]


def evaluate(options: EvaluateOptions) -> None:
    """Runs the parts in order, prints and stores each result."""
    torch.set_grad_enabled(False)
    bench = prepare(options)
    result = {}
    for part in options.parts:
        result[part] = PARTS[part](bench)
        print(part, json.dumps(result[part], indent=1), flush=True)
        options.out.write_text(json.dumps(result, indent=1), encoding="utf-8")


def prepare(options: EvaluateOptions) -> Bench:
    device, dtype = device_and_dtype()
    base = BaseModel(options.gguf)
    dense = read_base(base, LAYERS)
    split = split_base(base, dense, device)
    plain = make_tokenizer(base, llama4=False)
    weights = {}
    for name, delta in (("not healed", init_delta(split)), ("healed", load_delta(options.delta))):
        on_device = {key: tensor.to(device) for key, tensor in delta.items()}
        weights[name] = cast(student_weights(split, on_device, torch.bfloat16), dtype)
    models = {
        "teacher": metrics.teacher_model(teacher_weights(base, dense, device, dtype)),
        "rewrite, features off": Model(weights=weights["not healed"], arch=TEACHER),
        "not healed": Model(weights=weights["not healed"], arch=STUDENT),
        **{name: Model(weights=weights["healed"], arch=arch) for name, arch in BROKEN.items()},
    }
    dialogs = load_dialogs(options.dialogs)
    return Bench(
        options=options,
        models=models,
        corpus=load_corpus(options.corpus),
        dialogs=dialogs[: max(2, held_out(dialogs))][: options.held],
        pairs=Pairs(plain),
        plain=plain,
        tokenizer=make_tokenizer(base),
        rng=np.random.default_rng(5),
    )


def text(bench: Bench) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for source, tokens in bench.corpus.test.items():
        pieces = bench.cut(tokens, min(bench.options.length, len(tokens)), bench.options.docs)
        found[source] = {
            name: [asdict(f) for f in metrics.text_figures(model, bench.models["teacher"], pieces, STUDENT.chunk)]
            for name, model in bench.models.items()
        }
    return found


def answers(bench: Bench) -> list[dict[str, str]]:
    system = chatml(bench.plain, "system", DEFAULT_SYSTEM)
    open_turn = chatml(bench.plain, "assistant", "", close=False)
    chats = [system + chatml(bench.plain, "user", question) + open_turn for question in PROMPTS]
    longest = max(map(len, chats)) + bench.options.max_new
    rows: list[dict[str, str]] = [{"prompt": question} for question in PROMPTS]
    for name in ("teacher", "not healed", "healed"):
        model = bench.models[name]
        prompts = chats if model.teacher else [bench.pairs.dialog(c).student for c in chats]
        end, dtype = (IM_END if model.teacher else EOT), model.weights.head.dtype
        for row, ids in zip(rows, metrics.greedy_answers(model, prompts, end, longest, dtype), strict=True):
            row[name] = bench.tokenizer.decode(ids, skip_special_tokens=False)
    return rows


def experts(bench: Bench) -> list[list[float]]:
    streams = [bench.pairs.dialog(dialog).student for dialog in bench.dialogs]
    for tokens in bench.corpus.test.values():
        streams += [[BOT, *piece.tolist()] for piece in bench.cut(tokens, min(bench.options.length, len(tokens)), 4)]
    return metrics.expert_usage(bench.models["healed"], streams)


def copy(bench: Bench) -> dict[int, dict[str, float]]:
    source = bench.corpus.test["python"]
    return {
        gap: {name: metrics.copy_loss(bench.models[name], source, gap, bench.options.cases) for name in MAIN}
        for gap in bench.options.sizes
    }


def recall(bench: Bench) -> dict[int, dict[str, float]]:
    found = {}
    for size in bench.options.sizes:
        cases = recall_cases(bench, size)
        found[size] = {name: metrics.recall_share(bench.models[name], bench.pairs, cases) for name in MAIN}
    return found


def recall_cases(bench: Bench, size: int) -> list[tuple[list[int], list[int]]]:
    """(dialog, ids of the word to recall), the fact `size` tokens before the question."""
    words = [bench.tokenizer.decode([i]).strip() for i in range(3000, 20000, 7)]
    words = [word for word in words if word.isalpha() and word.islower() and len(word) > 3]
    source, cases = bench.corpus.test["python"], []
    for dialog in recall_dialogs(bench.plain, words, source, bench.options.cases, seed=size, low=size, high=size):
        text = bench.plain.decode(dialog, skip_special_tokens=False)
        word = text.rsplit(" is ", 1)[1].split(".")[0]
        cases.append((dialog, bench.plain.encode(f" {word}").ids))
    return cases


def long(bench: Bench) -> dict[str, dict[str, float]]:
    pieces = bench.cut(bench.corpus.test["python"], EDGES[-1], bench.options.long_docs)
    names = ("teacher", "healed", "temperature off", "chunk mask off", "NoPE layers cut to the chunk")
    return {name: metrics.loss_by_position(bench.models[name], pieces, EDGES) for name in names}


def dialogs(bench: Bench) -> dict[str, dict[str, dict[str, float]]]:
    students = {n: m for n, m in bench.models.items() if n not in ("teacher", "rewrite, features off")}
    teacher = bench.models["teacher"]
    return {
        name: metrics.dialog_figures(model, teacher, bench.pairs, bench.dialogs) for name, model in students.items()
    }


PARTS: Mapping[str, Callable[[Bench], Any]] = {
    "text": text,
    "answers": answers,
    "experts": experts,
    "copy": copy,
    "recall": recall,
    "long": long,
    "dialogs": dialogs,
}
