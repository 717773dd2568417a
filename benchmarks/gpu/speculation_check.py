"""Speculation under CUDA graphs changes no token: a tiny random target in float32, EAGLE3 and a recorded drafter at acceptance 0 to 1, against
the same engine without speculation. Prints a line a case, and what graphs were captured; exits 1 when a token differs.

    python benchmarks/gpu/speculation_check.py [--prompts 50] [--tokens 100] [--running 16] [--case eagle|tree|ngram|recorded|eager] [--modes 5]

--modes 3: no penalties, so that the guesses of a chain stay on the device.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from l4core import LLM, SamplingParams
from l4core.engine.speculation.drafter import PluginSpeculation
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
        cases: dict[str, dict[str, Any]] = {
            "eagle": {"speculative_algorithm": "EAGLE3", "speculative_draft_model_path": draft.as_posix()},
            "tree": {
                "speculative_algorithm": "EAGLE3",
                "speculative_draft_model_path": draft.as_posix(),
                "speculative_eagle_topk": 3,
                "speculative_num_draft_tokens": 13,
            },
            "ngram": ngram,
            "recorded": {**ngram, "recorded": True},
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
        recorded = options.pop("recorded", False)
        llm = self._open({"speculative_num_steps": STEPS, **options})
        if recorded:
            self._record(llm)
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
            f"{name:<9} {len(different)} of {len(found)} differ {different[:5]} · {seconds:.1f} s · {graphs}",
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
            SamplingParams(max_tokens=self._num_tokens, seed=n, ignore_eos=True, **self._modes[n % len(self._modes)])
            for n in range(len(self._prompts))
        ]
        return llm.generate(self._prompts, params, use_tqdm=False)

    def _record(self, llm: LLM) -> None:
        answers = {tuple(o.prompt_token_ids): o.outputs[0].token_ids for o in self._plain}
        vocab_size = llm._built.model_config.vocab_size
        drafter = RecordedDrafter(
            lambda row: answers[tuple(row.prompt_token_ids)],
            lambda row: (row.params.seed or 0) // 5 % 5 / 4,
            num_draft_tokens=STEPS,
            vocab_size=vocab_size,
        )
        llm._built.engine.speculation = PluginSpeculation("recorded", drafter, num_drafts=STEPS, vocab_size=vocab_size)


if __name__ == "__main__":
    main()
