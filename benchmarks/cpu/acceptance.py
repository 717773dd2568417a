"""Acceptance length of a draft on dialogs it has not seen: as the engine serves it, and as an independent computation gives it.

    python benchmarks/cpu/acceptance.py TARGET DRAFT [--dialogs benchmarks/cpu/dialogs.jsonl] [--answers FILE] [--independent] [--json OUT]

The 266 dialogs were made by the recipe of the demo's own (checkpoints/smol-l4/training: templates with WordNet nouns, and questions that the base
model wrote) with another seed; none is in anything a draft was trained on. Answers are greedy, each dialog ends at 512 tokens, chains have 3 guesses.
--answers keeps what the target wrote, which no draft changes, so that the next draft is measured without serving it.
--independent: hidden states by transformers, the draft in plain torch (examples/eagle3_train/draft.py), guesses for all positions at once.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.append(Path(__file__).resolve().parents[1].as_posix())
from where import where

HERE = Path(__file__).parent
sys.path.insert(0, (HERE.parent.parent / "examples" / "eagle3_train").as_posix())
STEPS, LENGTH = 3, 512
Answer = tuple[list[int], int]
"""All token ids of a dialog, and how many of them are the prompt."""
Spans = Sequence[Sequence[int]]
"""Of each dialog, the tokens that every step brought; the first is the prompt's."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("draft", type=Path)
    parser.add_argument("--dialogs", type=Path, default=HERE / "dialogs.jsonl")
    parser.add_argument("--count", type=int, default=266)
    parser.add_argument("--answers", type=Path)
    parser.add_argument("--independent", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--running", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    dialogs = [json.loads(line) for line in args.dialogs.read_text(encoding="utf-8").splitlines()][: args.count]
    result: dict[str, Any] = {**where(args.device), "dialogs": len(dialogs), "dtype": args.dtype}
    if args.answers is not None and args.answers.exists():
        answers: list[Answer] = json.loads(args.answers.read_text())[: args.count]
    else:
        answers, spans = served(args, dialogs)
        result["engine"] = summary(spans)
        print(json.dumps(result["engine"]), flush=True)
        if args.answers is not None:
            args.answers.write_text(json.dumps(answers))
    if args.independent:
        own = independent(args, answers)
        result["independent"] = summary(own)
        print(json.dumps(result["independent"]), flush=True)
        if "engine" in result:
            result["dialogs_with_equal_steps"] = sum(a == b for a, b in zip(spans, own, strict=True))
    print(json.dumps(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def served(args: argparse.Namespace, dialogs: Sequence[Any]) -> tuple[list[Answer], Spans]:
    from l4core import LLM, SamplingParams

    llm = LLM(
        args.target,
        dtype=args.dtype,
        device=args.device,
        context_length=LENGTH,
        max_running_requests=args.running,
        progress=False,
        speculative_algorithm="EAGLE3",
        speculative_draft_model_path=args.draft.as_posix(),
        speculative_num_steps=STEPS,
        speculative_adaptive="off",
    )
    engine, spans = llm._built.engine, defaultdict[int, list[int]](list)
    step, began, done = engine.step, time.perf_counter(), 0

    def counted(*given: Any) -> Any:
        nonlocal done
        output = step(*given)
        for update in output.updates:
            spans[int(update.request_id.split(":")[0])].append(len(update.new_token_ids))
            done += update.finish_reason is not None
            if update.finish_reason is not None and done % 16 == 0:
                print(f"{done} of {len(dialogs)} in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        return output

    engine.step = counted  # type: ignore[method-assign]
    outputs = llm.chat(dialogs, SamplingParams(temperature=0.0, max_tokens=None), use_tqdm=False)
    engine.step = step  # type: ignore[method-assign]
    answers = [([*o.prompt_token_ids, *o.outputs[0].token_ids], len(o.prompt_token_ids)) for o in outputs]
    return answers, [spans[key] for key in sorted(spans)]


@torch.inference_mode()
def independent(args: argparse.Namespace, answers: Sequence[Answer]) -> Spans:
    """transformers computes each dialog in one pass, the draft guesses behind every position, a walk over the answer picks what counts."""
    from draft import Draft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.target, dtype=getattr(torch, args.dtype)).eval().to(args.device)
    draft = Draft.load(args.draft).to(args.device)
    keep = draft.keep.to(args.device)
    layers = draft.config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
    table = model.get_input_embeddings().weight
    found = []
    for ids, begin in answers:
        tokens = torch.tensor([ids], device=args.device)
        states = model.model(tokens, output_hidden_states=True).hidden_states  # without the head: it is not asked
        aux = torch.cat([states[layer + 1] for layer in layers], -1).float()
        embeds = F.embedding(F.pad(tokens, (0, STEPS + 1))[:, 1:], table).float()
        guesses = [keep[draft.logits(hidden).argmax(-1)][0].tolist() for hidden in draft.unroll(aux, embeds, STEPS)]
        found.append(walk(ids, begin, guesses))
    return found


def walk(ids: Sequence[int], begin: int, guesses: Sequence[Sequence[int]]) -> list[int]:
    """guesses[s][i]: the draft's guess at token i + 2 + s, made when tokens up to i + 1 are known. → tokens each step brings."""
    known, spans = begin + 1, [1]
    while known < len(ids):
        right = 0
        while right < STEPS and known + right < len(ids) and guesses[right][known - 2] == ids[known + right]:
            right += 1
        spans.append(min(right + 1, len(ids) - known))
        known += right + 1
    return spans


def summary(spans: Spans) -> dict[str, Any]:
    """length: tokens a verification brings.  reached: share of verifications whose first 1, 2, 3 guesses hold."""
    steps = [span for own in spans for span in own[1:]]
    reached = [round(sum(span > depth for span in steps) / len(steps), 4) for depth in range(1, STEPS + 1)]
    return {"length": round(sum(steps) / len(steps), 4), "reached": reached, "verifications": len(steps)}


if __name__ == "__main__":
    main()
