"""What each kind of step takes with the demo checkpoint and its draft: milliseconds by batch, each kind forced for a whole group of questions.

    python benchmarks/cpu/speculation_steps.py TARGET DRAFT [--batch 1,4,8,16] [--device cpu] [--dtype float32] [--tokens 64] [--json OUT]

    plain      an engine without a draft        free     one with a draft that does nothing
    reading    the draft reads along            waiting  guesses are wanted and there are none
    1, 2, 3    so many guesses

ms: the median of steps with the whole batch.  took: the group, prompts and all.  length: tokens a sequence gains in a step. What the pace of guesses
is tested against (tests/engine/test_draft_pace_groups.py) are rows of this.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from speculation import QUESTIONS

from l4core import LLM, SamplingParams
from l4core.engine.inbox import Inbox
from l4core.request import StepOutput, StepStats

sys.path.append(Path(__file__).resolve().parents[1].as_posix())
from where import where

KINDS = ("plain", "free", "reading", "waiting", "1", "2", "3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("draft")
    parser.add_argument("--batch", type=lambda text: [int(part) for part in text.split(",")], default=[1, 4, 8, 16])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    common: dict[str, Any] = {
        "device": args.device,
        "dtype": args.dtype,
        "context_length": 1024,
        "max_running_requests": max(args.batch),
        "max_total_tokens": 40_000,
        "disable_radix_cache": True,
        "progress": False,
    }
    plain = Timed(LLM(args.target, **common))
    draft = Timed(LLM(args.target, **common, speculative_algorithm="EAGLE3", speculative_draft_model_path=args.draft))
    params = SamplingParams(temperature=0.0, max_tokens=args.tokens, seed=1)
    rows = []
    for batch in args.batch:
        for kind in KINDS:
            engine = plain if kind == "plain" else draft
            best = min((engine.group(kind, batch, params) for _ in range(args.rounds)), key=lambda row: row["took"])
            rows.append({"batch": batch, "kind": kind, "device": args.device, "dtype": args.dtype, **best})
            print(json.dumps(rows[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps({**where(args.device), "rows": rows}, indent=1) + "\n")


@dataclass
class Forced:
    """In place of the pace: always the same."""

    num_drafts: int = 0
    reads: bool = True

    def stamp(self, inbox: Inbox) -> Inbox:
        return replace(inbox, num_drafts=self.num_drafts, draft_reads=self.reads)

    def observe(self, stats: StepStats, *, busy: bool) -> None:
        pass

    def take_pause(self) -> str:
        return ""


@dataclass
class Timed:
    """An engine whose steps are timed. steps: (what it brought, ms since the one before ended)."""

    llm: LLM
    steps: list[tuple[StepStats, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._step, self._since = self.llm._built.engine.step, 0.0
        self.llm._built.engine.step = self._timed  # type: ignore[method-assign]

    def group(self, kind: str, batch: int, params: SamplingParams) -> dict[str, float]:
        """One group of questions, all of its steps of this kind."""
        if kind != "plain":
            self._force(kind)
        self.steps.clear()
        questions = [[{"role": "user", "content": QUESTIONS[i % len(QUESTIONS)]}] for i in range(batch)]
        began = self._since = time.perf_counter()
        self.llm.chat(questions, params, use_tqdm=False)
        took = time.perf_counter() - began
        full = [ms for stats, ms in self.steps if stats.num_decode_tokens == batch and not stats.num_prefill_tokens]
        drafts = sum(sum(stats.drafted_at[:1]) for stats, _ in self.steps)
        accepted = sum(sum(stats.accepted_at) for stats, _ in self.steps)
        return {
            "ms": round(statistics.median(full), 3) if full else 0.0,
            "took": round(took, 4),
            "steps": len(self.steps),
            "length": round(1 + accepted / max(drafts, 1), 2),
        }

    def _force(self, kind: str) -> None:
        guesses = int(kind) if kind.isdigit() else kind == "waiting"
        object.__setattr__(self.llm._built, "drafts", Forced(int(guesses), kind != "free"))
        speculation = self.llm._built.engine.speculation
        if kind == "waiting":
            speculation.propose = lambda requests, late=False: {}
        else:
            speculation.__dict__.pop("propose", None)

    def _timed(self, *given: Any) -> StepOutput:
        output = self._step(*given)
        now = time.perf_counter()
        self.steps.append((output.stats, (now - self._since) * 1e3))
        self._since = now
        return output


if __name__ == "__main__":
    main()
