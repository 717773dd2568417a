"""Speculation under CUDA graphs changes no token: a tiny random target in float32, EAGLE3 and a recorded drafter at acceptance 0 to 1, against
the same engine without speculation. Answers are unequally long, the cases named "fewer" want one, two and three guesses in turn, and some sequences
get none: every eighth of the recorded drafter's, those beyond 130 tokens of the draft's.

Prints a line a case: requests whose tokens differ; of batches without prompts, the steps that verified guesses and the draft's passes, replayed and
not; what graphs were captured. Exits 1 when a token differs.

    python benchmarks/gpu/speculation_check.py [--prompts 50] [--tokens 100] [--running 16] [--modes 5]
        [--case eagle|fewer|tree|ngram|recorded|recorded-fewer|eager]

--modes 3: no penalties, so that the guesses of a chain stay on the device.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from l4core import LLM, SamplingParams
from l4core.engine.batch import Ints, ScheduledBatch
from l4core.engine.engine import EMPTY, Engine
from l4core.engine.run.fixed_step import FixedStep, StepShape
from l4core.engine.run.runner import Forward
from l4core.engine.speculation.draft_steps import FixedExtend
from l4core.engine.speculation.drafter import PluginSpeculation
from l4core.engine.speculation.eagle3 import Eagle3Speculation
from l4core.request import RequestOutput
from l4core.testing.models.checkpoints import make_tiny_checkpoint
from l4core.testing.models.eagle3 import make_tiny_draft
from l4core.testing.models.tokenizers import make_byte_tokenizer
from l4core.testing.recorded_drafter import RecordedDrafter

SHAPE = {"layers": 4, "hidden": 128, "heads": 8, "head_dim": 32, "inter": 256, "chunk": 64, "floor_scale": 32}
STEPS = 3
MODES: Sequence[Mapping[str, Any]] = (
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"temperature": 1.3},
    {"temperature": 0.7, "top_p": 0.9, "presence_penalty": 0.5},
    {"temperature": 1.3, "top_p": 0.95, "repetition_penalty": 1.2},
)
"""The first three are drawn inside graphs, the others by the pipeline."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--running", type=int, default=16)
    parser.add_argument("--modes", type=int, default=len(MODES))
    parser.add_argument("--case")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        make_byte_tokenizer(root / "tokenizer")
        folder = make_tiny_checkpoint(root / "target", tokenizer=root / "tokenizer", **SHAPE)
        draft = make_tiny_draft(
            root / "draft", json.loads((folder / "config.json").read_text()), aux_layers=[0, 1, 2], draft_vocab=200
        )
        check = Check(folder, args.prompts, args.tokens, args.running, MODES[: args.modes])
        ngram = {"speculative_algorithm": "NGRAM"}
        eagle = {
            "speculative_algorithm": "EAGLE3",
            "speculative_draft_model_path": draft.as_posix(),
            "speculative_option": ("longest_context=130",),
        }
        cases: dict[str, dict[str, Any]] = {
            "eagle": eagle,
            "fewer": {**eagle, "fewer": True},
            "tree": {
                **eagle,
                "speculative_eagle_topk": 3,
                "speculative_num_draft_tokens": 13,
            },
            "ngram": ngram,
            "recorded": {**ngram, "recorded": True},
            "recorded-fewer": {**ngram, "recorded": True, "fewer": True},
            "eager": {**ngram, "recorded": True, "disable_cuda_graph": True},
        }
        for name, options in cases.items():
            if args.case in (None, name):
                failed += check.run(name, options)
    sys.exit(int(failed > 0))


class Check:
    """One target; the answers without speculation."""

    def __init__(
        self, folder: Path, num_prompts: int, num_tokens: int, running: int, modes: Sequence[Mapping[str, Any]]
    ) -> None:
        self._folder, self._num_tokens, self._running, self._modes = folder, num_tokens, running, modes
        self._prompts = [
            [(7 * i + i // 9) % 250 for i in range(5 + 7 * n % 150)] + [n % 250] for n in range(num_prompts)
        ]
        began = time.perf_counter()
        self._plain = self._answers(self._open({}))
        print(f"plain in {time.perf_counter() - began:.1f} s", flush=True)

    def run(self, name: str, options: dict[str, Any]) -> int:
        """→ requests whose tokens differ."""
        recorded, fewer = options.pop("recorded", False), options.pop("fewer", False)
        llm = self._open({"speculative_num_steps": STEPS, **options})
        if recorded:
            self._record(llm)
        if fewer:
            vary(llm._built.engine)
        counts = Counts(llm._built.engine)
        began = time.perf_counter()
        found = self._answers(llm)
        seconds = time.perf_counter() - began
        different = [
            n
            for n, (mine, theirs) in enumerate(zip(found, self._plain, strict=True))
            if mine.outputs[0].token_ids != theirs.outputs[0].token_ids
        ]
        graphs = next(line for line in llm.report if line.startswith("graphs"))
        print(
            f"{name:<14} {len(different)} of {len(found)} differ {different[:5]} · {seconds:.1f} s · {counts.describe()} · {graphs}",
            flush=True,
        )
        for n in different[:3]:
            a, b = found[n].outputs[0].token_ids, self._plain[n].outputs[0].token_ids
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            print(
                f"   prompt {n} of {len(self._prompts[n])} tokens, {self._modes[n % len(self._modes)]}: first difference at output {at}"
            )
        llm.close()
        return len(different)

    def _open(self, options: Mapping[str, Any]) -> LLM:
        return LLM(
            self._folder.as_posix(),
            dtype="float32",
            device="cuda",
            attention_backend="triton",
            page_size=16,
            max_running_requests=self._running,
            context_length=512,
            max_total_tokens=20_000,
            progress=False,
            speculative_adaptive="off",
            **options,
        )

    def _answers(self, llm: LLM) -> list[RequestOutput]:
        params = [
            SamplingParams(
                max_tokens=max(1, self._num_tokens - n % 9),
                seed=n,
                ignore_eos=True,
                **self._modes[n % len(self._modes)],
            )
            for n in range(len(self._prompts))
        ]
        return llm.generate(self._prompts, params, use_tqdm=False)

    def _record(self, llm: LLM) -> None:
        answers = {tuple(o.prompt_token_ids): o.outputs[0].token_ids for o in self._plain}
        vocab_size = llm._built.model_config.vocab_size
        drafter = RecordedDrafter(
            lambda row: () if (row.params.seed or 0) % 8 == 7 else answers[tuple(row.prompt_token_ids)],
            lambda row: (row.params.seed or 0) // 5 % 5 / 4,
            num_draft_tokens=STEPS,
            vocab_size=vocab_size,
        )
        llm._built.engine.speculation = PluginSpeculation("recorded", drafter, num_drafts=STEPS, vocab_size=vocab_size)


class Counts:
    """Of batches without prompts, the engine's steps that verify guesses and its draft's passes: how many were replayed, how many of those had
    padding, how many were launched kernel by kernel."""

    def __init__(self, engine: Engine) -> None:
        self._steps, self._passes = Counter[str](), Counter[str]()
        runner, speculation = engine.runner, engine.speculation
        self._build, runner.build = runner.build, self._built  # type: ignore[method-assign]
        if isinstance(speculation, Eagle3Speculation):
            self._find, speculation._find_extend = speculation._find_extend, self._found  # type: ignore[method-assign]

    def _built(self, batch: ScheduledBatch) -> Forward:
        forward = self._build(batch)
        if batch.num_verified and batch.columns.borders[2] == batch.columns.borders[3]:
            shape = forward.shape if isinstance(forward, FixedStep) else None
            self._steps[_kind(shape, batch.columns.lengths)] += 1
        return forward

    def _found(self, starts: Ints, lengths: Ints, counts: Ints) -> FixedExtend | None:
        step = self._find(starts, lengths, counts)
        if lengths.max() <= STEPS + 1:
            self._passes[_kind(step and step.shape, lengths)] += 1
        return step

    def describe(self) -> str:
        """ "verified: 90 replayed (40 with padding), 2 not"."""
        return " · ".join(
            f"{name}: {found['whole'] + found['padded']} replayed ({found['padded']} with padding), {found['eager']} not"
            for name, found in (("verified", self._steps), ("draft passes", self._passes))
            if found
        )


def _kind(shape: StepShape | None, lengths: Ints) -> str:
    if shape is None:
        return "eager"
    return "whole" if (lengths == shape.num_tokens).all() else "padded"


def vary(engine: Engine) -> None:
    """One guess is wanted, then two, then three."""
    step, numbers = engine.step, cycle(range(1, STEPS + 1))
    engine.step = lambda inbox=EMPTY: step(replace(inbox, num_drafts=next(numbers)))  # type: ignore[method-assign, misc]


if __name__ == "__main__":
    main()
