"""Trains an EAGLE3 draft for any checkpoint that L4 serves, on what the checkpoint itself writes.

    python examples/eagle3_train/train.py MODEL [QUESTIONS] --out DRAFT [--ask N] [--init DRAFT] [--minutes 30 | --steps 1000]
                                          [--engine OPTION=VALUE …]

QUESTIONS: a file with one question a line, or one dialog (a JSON list of messages). --ask N: the model asks N more itself. It answers each
greedily and some at temperature 0.7; the draft is trained to say what the model says, over several steps of its own guesses. It reports how often
each guess is right, and at the end serves questions it was not trained on with the draft.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from draft import Draft
from target import Lesson, Teacher, Text

from l4core import LLM, SamplingParams

STEP_WEIGHT = 0.8
"""Of each further guess in the loss."""
WARMUP = 30
ALIKE = 16
"""Batches whose texts are sorted by length together, so that little of a batch is padding."""
Dialog = list[dict[str, str]]


def main() -> None:
    args = parse()
    options = {name: _value(text) for name, text in (option.split("=", 1) for option in args.engine)}
    layers = None if args.layers is None else [int(i) for i in args.layers.split(",")]
    train, test = read(args.questions), read(args.test)
    teacher = Teacher(args.model, layers, **options)
    if args.ask:
        train += [_dialog(line) for line in teacher.questions(args.ask, seed=args.seed)]
    train, test = part(train, test, args.held_out)
    texts = written(teacher, train, args)
    if args.init is None:
        keep = frequent(texts, args.vocab, teacher.config.vocab_size)
        draft = Draft.new(teacher, keep, width=args.width or 4 * teacher.config.hidden_size)
    else:
        draft = Draft.load(args.init)
        draft.widen(frequent(texts, args.vocab, teacher.config.vocab_size), teacher.head)
    fit(draft, teacher, texts, args)
    draft.save(args.out)
    teacher.llm.close()
    del teacher
    print(f"draft: {args.out}")
    if test:
        length = served(args, options, test)
        print(f"acceptance length on {len(test)} dialogs it was not trained on, greedy, 3 guesses: {length:.3f}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("questions", type=Path, nargs="?")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ask", type=int, default=0, help="questions that the model makes up")
    parser.add_argument("--test", type=Path, help="questions for the test alone, in a file like QUESTIONS")
    parser.add_argument("--held-out", type=int, default=16, help="without --test, questions kept for it")
    parser.add_argument("--warm", type=float, default=0.5, help="answers at temperature 0.7, for each greedy one")
    parser.add_argument("--max-tokens", type=int, help="of an answer [until the context is full]")
    parser.add_argument("--init", type=Path, help="a draft to train further")
    parser.add_argument("--layers", help="whose outputs it reads, such as 1,23,44 [1, n/2 − 1, n − 4]")
    parser.add_argument("--width", type=int, help="of its MLP [four times the hidden size]")
    parser.add_argument("--vocab", type=int, default=32000, help="tokens it can guess: the most frequent in answers")
    parser.add_argument("--unroll", type=int, default=5, help="guesses in a row that are trained")
    parser.add_argument("--batch", type=int, default=16, help="texts a step")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--minutes", type=float, default=30.0, help="of training, without what is written before")
    parser.add_argument("--steps", type=int, default=1 << 30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--engine", action="append", default=[], metavar="OPTION=VALUE", help="as LLM takes it; may be repeated"
    )
    args = parser.parse_args()
    if args.questions is None and not args.ask:
        parser.error("nothing to answer: give QUESTIONS, or --ask N")
    return args


# --- what is learnt from ---------------------------------------------------------------------------------------------------------------


def read(path: Path | None) -> list[Dialog]:
    lines = [] if path is None else path.read_text(encoding="utf-8").splitlines()
    return [_dialog(line) for line in lines if line.strip()]


def _dialog(line: str) -> Dialog:
    return json.loads(line) if line.startswith("[{") else [{"role": "user", "content": line.strip()}]


def part(train: list[Dialog], test: list[Dialog], held_out: int) -> tuple[list[Dialog], list[Dialog]]:
    """Each dialog once, shuffled, and none of the test's."""
    unique = list({json.dumps(dialog): dialog for dialog in train}.values())
    random.Random(0).shuffle(unique)
    if not test:
        return unique[held_out:], unique[:held_out]
    seen = [dialog[-1]["content"] for dialog in test]
    return [dialog for dialog in unique if dialog[-1]["content"] not in seen], test


def written(teacher: Teacher, dialogs: Sequence[Dialog], args: argparse.Namespace) -> list[Text]:
    began = time.monotonic()
    texts = teacher.answers(dialogs, temperature=0.0, max_tokens=args.max_tokens, seed=1)
    warm = dialogs[: round(args.warm * len(dialogs))]
    texts += teacher.answers(warm, temperature=0.7, max_tokens=args.max_tokens, seed=2)
    tokens = sum(len(ids) - begin for ids, begin in texts)
    print(f"{len(texts)} answers, {tokens:,} tokens, in {time.monotonic() - began:.0f} s", flush=True)
    return texts


def frequent(texts: Sequence[Text], count: int, vocab_size: int) -> torch.Tensor:
    """The tokens that answers are made of, ascending."""
    answers = torch.tensor([token for ids, begin in texts for token in ids[begin:]])
    counts = torch.bincount(answers, minlength=vocab_size)
    return counts.argsort(descending=True, stable=True)[:count].sort().values


# --- training --------------------------------------------------------------------------------------------------------------------------


def fit(draft: Draft, teacher: Teacher, texts: Sequence[Text], args: argparse.Namespace) -> None:
    device = teacher.device
    draft.to(device)
    draft.keep = draft.keep.to(device)
    said = teacher.head[draft.keep].detach().clone()
    began = time.monotonic()
    lessons = list(teacher.lessons(texts))
    print(
        f"{sum(len(one.ids) for one in lessons):,} positions computed in {time.monotonic() - began:.0f} s", flush=True
    )
    optimizers = made_optimizers(draft, args.lr)
    order = batches(lessons, args.batch, random.Random(args.seed))
    began = told = time.monotonic()
    recent: list[torch.Tensor] = []
    for step in range(args.steps):
        done = max((time.monotonic() - began) / (60 * args.minutes), step / args.steps)
        if done >= 1:
            break
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1.0, (step + 1) / WARMUP) * (1.0 - done)
        loss, right = unrolled(draft, said, teacher.model.embed.weight, next(order), args.unroll)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        recent.append(torch.stack([loss.detach(), *right]))
        if time.monotonic() - told > min(60, 6 * args.minutes) or step in (0, args.steps - 1):
            means = torch.stack(recent).mean(0).tolist()
            shares = " ".join(f"{100 * share:.1f} %" for share in means[1:])
            print(
                f"step {step + 1}, {time.monotonic() - began:.0f} s: loss {means[0]:.3f}, right by depth {shares}",
                flush=True,
            )
            told, recent = time.monotonic(), []


def made_optimizers(draft: Draft, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the layer's matrices, AdamW for head and norms."""
    named = dict(draft.named_parameters())
    matrices = [p for name, p in named.items() if p.dim() == 2 and "lm_head" not in name]
    others = [p for name, p in named.items() if p.dim() != 2 or "lm_head" in name]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def batches(lessons: Sequence[Lesson], size: int, rng: random.Random) -> Iterator[list[Lesson]]:
    """Endless; each epoch has each lesson once, but for the last few."""
    while True:
        order = rng.sample(range(len(lessons)), len(lessons))
        found = []
        for start in range(0, len(order), size * ALIKE):
            alike = sorted(order[start : start + size * ALIKE], key=lambda i: len(lessons[i].ids))
            found += [alike[i : i + size] for i in range(0, len(alike), size)]
        rng.shuffle(found)
        for chosen in found:
            yield [lessons[i] for i in chosen]


def unrolled(
    draft: Draft, head: torch.Tensor, embed: torch.Tensor, lessons: Sequence[Lesson], steps: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """→ (Σ 0.8^s · soft cross-entropy of guess s, how often each is the target's best token). The guess of step s at position i is judged by what the
    target says at position i + 1 + s: both speak of token i + 2 + s. head: the target's rows for the draft's vocabulary.  embed: the target's."""
    device = embed.device
    narrow = device.type != "cpu"
    length = max(len(lesson.ids) for lesson in lessons)

    def stacked(name: str) -> torch.Tensor:
        parts = [getattr(lesson, name) for lesson in lessons]
        found = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True).to(device)
        return found if narrow or not found.is_floating_point() else found.float()

    ids, answer = F.pad(stacked("ids"), (0, steps + 1)), F.pad(stacked("answer"), (0, steps + 2))
    best, last = F.pad(stacked("best"), (0, steps + 1)), F.pad(stacked("last"), (0, 0, 0, steps + 1))
    place = torch.full((embed.shape[0],), -1, device=device)  # target id → draft id
    place[draft.keep] = torch.arange(len(draft.keep), device=device)
    losses, right = [], []
    embeds = F.embedding(ids[:, 1:], embed if narrow else embed.float())
    with torch.autocast(device.type, torch.bfloat16, enabled=narrow):
        for step, hidden in enumerate(draft.unroll(stacked("aux"), embeds, steps)):
            at, token = slice(1 + step, 1 + step + length), slice(2 + step, 2 + step + length)
            counted = answer[:, token]
            taught = counted & (place[best[:, at]] >= 0)
            guess = draft.logits(hidden[taught]).float()
            with torch.no_grad():
                wanted = (last[:, at][taught] @ head.to(last.dtype).T).float().softmax(-1)
                hits = guess.argmax(-1) == place[best[:, at][taught]]
            losses.append(F.cross_entropy(guess, wanted) * STEP_WEIGHT**step)
            right.append(hits.sum() / counted.sum().clamp(min=1))
    return torch.stack(losses).sum(), right


# --- the test --------------------------------------------------------------------------------------------------------------------------


def served(args: argparse.Namespace, options: dict[str, Any], dialogs: Sequence[Dialog]) -> float:
    """Tokens a step brings in the engine, the target's own among them."""
    llm = LLM(
        args.model,
        progress=False,
        speculative_algorithm="EAGLE3",
        speculative_draft_model_path=args.out.as_posix(),
        speculative_adaptive="off",
        **options,
    )
    engine, drafts, accepted = llm._built.engine, 0, 0
    step = engine.step

    def counted(*given):
        nonlocal drafts, accepted
        output = step(*given)
        if output.stats.drafted_at:
            drafts += output.stats.drafted_at[0]
            accepted += output.stats.num_accepted_tokens
        return output

    engine.step = counted
    llm.chat(dialogs, SamplingParams(temperature=0.0, max_tokens=args.max_tokens), use_tqdm=False)
    return 1 + accepted / max(drafts, 1)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


if __name__ == "__main__":
    main()
