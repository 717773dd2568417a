"""Trains an EAGLE3 draft for any checkpoint that L4 serves, on what the checkpoint itself writes.

    python examples/eagle3_train/train.py MODEL PROMPTS --out DRAFT [--init DRAFT] [--minutes 30 | --steps 1000]

PROMPTS: a text file, one question a line. The model answers each greedily and at temperature 0.7; the draft is trained to say what the model says,
over several steps of its own guesses. Every minute it reports how often each guess is right; at the end it serves held-out questions with the draft.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from draft import Draft
from target import Lesson, Teacher

from l4core import LLM, SamplingParams

STEP_WEIGHT = 0.8
"""Of each further guess in the loss."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="a draft to train further")
    parser.add_argument(
        "--layers", help="ids of the layers whose outputs it reads, such as 1,23,44 [1, n/2 − 1, n − 4]"
    )
    parser.add_argument("--width", type=int, help="of its MLP [four times the hidden size]")
    parser.add_argument(
        "--vocab", type=int, default=32000, help="tokens it can guess: the most frequent in the answers"
    )
    parser.add_argument("--max-tokens", type=int, default=256, help="of an answer")
    parser.add_argument("--unroll", type=int, default=5, help="guesses in a row that are trained")
    parser.add_argument("--batch", type=int, default=16, help="texts a step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--steps", type=int, default=1 << 30)
    parser.add_argument("--held-out", type=int, default=16, help="questions kept for the test")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    prompts = [line.strip() for line in args.prompts.read_text().splitlines() if line.strip()]
    random.Random(0).shuffle(prompts)
    test, train = prompts[: args.held_out], prompts[args.held_out :]
    layers = None if args.layers is None else [int(i) for i in args.layers.split(",")]
    options = {"dtype": args.dtype, "device": args.device}
    teacher = Teacher(args.model, layers, context_length=2049, **options)
    texts = teacher.answers(train, temperature=0.0, max_tokens=args.max_tokens, seed=1)
    texts += teacher.answers(train, temperature=0.7, max_tokens=args.max_tokens, seed=2)
    print(f"{len(texts)} answers, {sum(len(ids) - begin for ids, begin in texts):,} tokens", flush=True)
    if args.init is not None:
        draft = Draft.load(args.init)
    else:
        draft = Draft.new(
            teacher, frequent(texts, args.vocab, teacher), width=args.width or 4 * teacher.config.hidden_size
        )
    fit(draft, teacher, texts, args)
    draft.save(args.out)
    teacher.llm.close()
    print(f"draft: {args.out}")
    if test:
        print(
            f"acceptance length on {len(test)} held-out questions, greedy, 3 guesses: {served(args, options, test):.2f}"
        )


def frequent(texts: list[tuple[list[int], int]], count: int, teacher: Teacher) -> torch.Tensor:
    """The tokens that answers are made of, ascending."""
    answers = torch.tensor([token for ids, begin in texts for token in ids[begin:]])
    counts = torch.bincount(answers, minlength=teacher.config.vocab_size)
    return counts.argsort(descending=True, stable=True)[:count].sort().values


def fit(draft: Draft, teacher: Teacher, texts: list[tuple[list[int], int]], args: argparse.Namespace) -> None:
    device = teacher.model.embed.weight.device
    draft.to(device)
    draft.keep = draft.keep.to(device)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    rng, order = random.Random(0), list[int]()
    began = told = time.monotonic()
    recent: list[torch.Tensor] = []
    for step in range(args.steps):
        done = max((time.monotonic() - began) / (60 * args.minutes), step / args.steps)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 30) * (1.0 if done < 0.7 else (1.0 - done) / 0.3)
        if len(order) < args.batch:
            order = rng.sample(range(len(texts)), len(texts))
        chosen, order = order[: args.batch], order[args.batch :]
        loss, right = unrolled(draft, teacher, teacher.lessons([texts[i] for i in chosen]), args.unroll)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
        recent.append(torch.stack([loss.detach(), *right]))
        if time.monotonic() - told > 60 or step in (0, args.steps - 1):
            means = torch.stack(recent).mean(0).tolist()
            shares = " ".join(f"{100 * share:.1f} %" for share in means[1:])
            print(
                f"step {step + 1}, {time.monotonic() - began:.0f} s: loss {means[0]:.3f}, right by depth {shares}",
                flush=True,
            )
            told, recent = time.monotonic(), []


def unrolled(
    draft: Draft, teacher: Teacher, lessons: list[Lesson], steps: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """→ (Σ 0.8^s · soft cross-entropy of guess s, how often each is the target's best token). The guess of step s at position i is judged by what the
    target says at position i + 1 + s: both speak of token i + 2 + s."""
    device = teacher.model.embed.weight.device
    length = max(len(lesson.ids) for lesson in lessons)

    def stacked(parts: list[torch.Tensor]) -> torch.Tensor:
        padded = [F.pad(part, (0,) * (2 * (part.dim() - 1)) + (0, length - len(part))) for part in parts]
        return torch.stack(padded).to(device)

    ids = F.pad(stacked([lesson.ids for lesson in lessons]), (0, steps + 1))
    answer = F.pad(stacked([lesson.answer for lesson in lessons]), (0, steps + 2))
    said = teacher.logits(stacked([lesson.last for lesson in lessons]).flatten(0, 1)).view(len(lessons), length, -1)
    wanted = F.pad(said[..., draft.keep].softmax(-1), (0, 0, 0, steps + 1))
    best = F.pad(said.argmax(-1), (0, steps + 1))
    known = torch.zeros(said.shape[-1], dtype=torch.bool, device=device).index_fill(0, draft.keep, True)
    embeds = teacher.model.embed(ids[:, 1:]).float().clone()
    losses, right = [], []
    for step, guess in enumerate(
        draft.unroll(stacked([lesson.aux for lesson in lessons]).float().clone(), embeds, steps)
    ):
        at, token = slice(1 + step, 1 + step + length), slice(2 + step, 2 + step + length)
        counted = answer[:, token]
        taught = counted & known[best[:, at]]
        loss = -(wanted[:, at] * F.log_softmax(guess, -1)).sum(-1)
        losses.append((loss * taught).sum() / taught.sum().clamp(min=1) * STEP_WEIGHT**step)
        hits = (draft.keep[guess.detach().argmax(-1)] == best[:, at]) & counted
        right.append(hits.sum() / counted.sum().clamp(min=1))
    return torch.stack(losses).sum(), right


def served(args: argparse.Namespace, options: dict[str, str], prompts: list[str]) -> float:
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
    llm.chat(
        [[{"role": "user", "content": p}] for p in prompts], SamplingParams(temperature=0.0, max_tokens=args.max_tokens)
    )
    return 1 + accepted / max(drafts, 1)


if __name__ == "__main__":
    main()
