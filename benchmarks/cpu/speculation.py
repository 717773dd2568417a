"""The demo checkpoint with and without its draft, in turns, `--batch` questions at a time: tokens a second and tokens a step.

    python benchmarks/cpu/speculation.py TARGET DRAFT|NGRAM [--batch 1,4,16] [--temperature 0,0.7] [--rounds 3] [--tokens 80]
        [--device cpu] [--dtype float32] [--engine OPTION=VALUE …] [--option aux_layers=2,5,8] [--misleading] [--json OUT]

`l4 demo-model TARGET --draft-out DRAFT` makes both. The two engines answer the same questions one after the other, so that a busy machine slows both.
Several batches and temperatures are rows of one result, in the order in which the same two engines answered them; groups: what each group took
without and with the draft, ms, which tells a stall from a loss.
NGRAM --misleading: questions in which whatever came before was followed by something else each time.
--option aux_layers=…: what a draft does that reads the wrong layers; the result names the step of its warning and the pauses.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from l4core import LLM, SamplingParams

sys.path.append(Path(__file__).resolve().parents[1].as_posix())
from where import where

QUESTIONS = (
    "What is the capital of France?",
    "List the three primary colors.",
    "Explain photosynthesis in one sentence.",
    "Give me three tips for sleeping better.",
    "Write a Python function that adds two numbers.",
    "Tell me a short story about a dog.",
    "What is the opposite of hot?",
    "Who wrote Romeo and Juliet?",
)
MISLEADING = " " + " ".join(
    f"one two {word}" for word in ["red", "blue", "green", "white", "black", "grey", "pink", "brown", "gold", "cyan"]
)
"""A beginning that goes on otherwise each time."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("draft")
    parser.add_argument("--batch", type=_numbers(int), default=[1])
    parser.add_argument("--misleading", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=80)
    parser.add_argument("--temperature", type=_numbers(float), default=[0.0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--engine", action="append", default=[], metavar="OPTION=VALUE", help="as LLM takes it, for both"
    )
    parser.add_argument("--option", action="append", default=[], help="--speculative-option of the draft")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    common: dict[str, Any] = {
        "device": args.device,
        "dtype": args.dtype,
        "context_length": 1024,
        "max_running_requests": max(4, *args.batch),
        "disable_radix_cache": True,
        "progress": False,
        **{name: json.loads(value) for name, value in (option.split("=", 1) for option in args.engine)},
    }
    flags: dict[str, Any] = {"speculative_algorithm": "NGRAM"}
    if args.draft != "NGRAM":
        flags = {"speculative_algorithm": "EAGLE3", "speculative_draft_model_path": args.draft}
    flags["speculative_option"] = tuple(args.option)
    engines = {"plain": LLM(args.target, **common), "draft": LLM(args.target, **common, **flags)}
    rows = []
    for temperature, batch in itertools.product(args.temperature, args.batch):
        rows.append({**compared(engines, args, batch, temperature), "device": args.device, "dtype": args.dtype})
        print(json.dumps({name: value for name, value in rows[-1].items() if name != "groups"}), flush=True)
        if args.json:
            args.json.write_text(json.dumps({**where(args.device), "rows": rows}, indent=1) + "\n")


def _numbers(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [kind(part) for part in text.split(",")]


def compared(engines: Mapping[str, LLM], args: argparse.Namespace, batch: int, temperature: float) -> dict[str, Any]:
    params = SamplingParams(temperature=temperature, max_tokens=args.tokens, seed=1)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    processor = dict.fromkeys(engines, 0.0)
    tokens = steps = differing = 0
    said = Said()
    logging.getLogger("l4core").addHandler(said)
    logging.getLogger("l4core").setLevel(logging.INFO)
    asked = [question + MISLEADING * args.misleading for question in QUESTIONS]
    groups = [[asked[(i + j) % len(asked)] for j in range(batch)] for i in range(0, len(asked), batch)]
    for number in range(args.rounds + 1):  # the first one is not counted
        for group in groups:
            answers = {}
            for name, llm in engines.items():
                count = Steps(llm, said if name == "draft" else None)
                began, busy = time.perf_counter(), time.process_time()
                outputs = llm.chat([[{"role": "user", "content": q}] for q in group], params, use_tqdm=False)
                took, worked = time.perf_counter() - began, time.process_time() - busy
                answers[name] = [output.outputs[0].token_ids for output in outputs]
                made = count.done()
                if number:
                    seconds[name].append(took)
                    processor[name] += worked
                    if name == "draft":
                        tokens, steps = tokens + sum(map(len, answers[name])), steps + made
            differing += answers["plain"] != answers["draft"]
    ratios = [a / b for a, b in zip(seconds["plain"], seconds["draft"], strict=True)]
    logging.getLogger("l4core").removeHandler(said)
    return {
        "tokens_a_second": {name: round(tokens / sum(took), 2) for name, took in seconds.items()},
        "speed_up": round(sum(seconds["plain"]) / sum(seconds["draft"]), 3),
        "speed_up_median": round(statistics.median(ratios), 3),
        "speed_up_in_processor_time": round(processor["plain"] / processor["draft"], 3),  # others' load tells less here
        "tokens_a_step": round(tokens / steps, 3),
        "batch": batch,
        "temperature": temperature,
        "answers_that_differ": differing,
        "groups": [[round(1e3 * took, 1) for took in pair] for pair in zip(*seconds.values(), strict=True)],
        "warned_by_step": said.warned_by,
        "said": said.lines,
    }


class Said(logging.Handler):
    """What the engine said of its drafter. warned_by: engine steps after which the warning was there; None = no warning."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.warned_by: int | None = None
        self._warned, self._steps = False, 0

    def emit(self, record: logging.LogRecord) -> None:
        if "speculation (" in record.getMessage():
            self.lines.append(record.getMessage()[:200])
            self._warned |= record.levelno >= logging.WARNING

    def step(self) -> None:
        """One more has been made."""
        self._steps += 1
        if self._warned and self.warned_by is None:
            self.warned_by = self._steps - 1  # said just before the step that is counted here


class Steps:
    """Counts the engine's steps during one answer."""

    def __init__(self, llm: LLM, said: Said | None = None) -> None:
        self._engine, self._said, self._count = llm._built.engine, said, 0
        self._step = self._engine.step
        self._engine.step = self._counted  # type: ignore[method-assign]

    def _counted(self, *given: Any) -> Any:
        self._count += 1
        if self._said is not None:
            self._said.step()
        return self._step(*given)

    def done(self) -> int:
        self._engine.step = self._step  # type: ignore[method-assign]
        return self._count


if __name__ == "__main__":
    main()
