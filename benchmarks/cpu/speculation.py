"""The demo checkpoint with and without its draft, in turns, `--batch` questions at a time: tokens a second and tokens a step.

    python benchmarks/cpu/speculation.py TARGET DRAFT|NGRAM [--batch 1,4,16] [--temperature 0,0.7] [--rounds 3] [--tokens 80]
        [--device cpu] [--dtype float32] [--engine OPTION=VALUE …] [--option aux_layers=2,5,8] [--misleading] [--control] [--json OUT]

`l4 demo-model TARGET --draft-out DRAFT` makes both. The two engines answer the same questions one after the other, and each goes first as often as
the other, so that a busy machine slows both. A round is eight groups of questions, whatever the batch.
Several batches and temperatures are rows of one result, in the order in which the same two engines answered them; groups: what each group took
with each engine, ms, which tells a stall from a loss.
--control: a third engine, without a draft as the first: its "speed-up" is what this machine makes of two equal ones.
NGRAM --misleading: questions in which whatever came before was followed by something else each time.
--option aux_layers=…: what a draft does that reads the wrong layers; the result names the step of its warning and the pauses.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

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
    parser.add_argument("--control", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=80)
    parser.add_argument("--temperature", type=_numbers(float), default=[0.0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--engine", action="append", default=[], metavar="OPTION=VALUE", help="as LLM takes it, for all"
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
    if args.control:
        engines["control"] = LLM(args.target, **common)
    gc.collect()
    gc.freeze()  # as the server's engine does: no collection of all that was loaded falls into anybody's answer
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
    groups = [[asked[(i + j) % len(asked)] for j in range(batch)] for i in range(len(asked))]
    for number in range(args.rounds + 1):  # the first one is not counted
        for place, group in enumerate(groups):
            answers = {}
            for name, llm in in_turn(engines, number + place):
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
    logging.getLogger("l4core").removeHandler(said)
    return {
        "tokens_a_second": {name: round(tokens / sum(took), 2) for name, took in seconds.items()},
        **speed_up(seconds, "draft"),
        "speed_up_in_processor_time": round(processor["plain"] / processor["draft"], 3),  # others' load tells less here
        **({"control": speed_up(seconds, "control")} if "control" in seconds else {}),
        "tokens_a_step": round(tokens / steps, 3),
        "batch": batch,
        "temperature": temperature,
        "answers_that_differ": differing,
        "groups": [[round(1e3 * took, 1) for took in pair] for pair in zip(*seconds.values(), strict=True)],
        "warned_by_step": said.warned_by,
        "said": said.lines,
    }


def in_turn(engines: Mapping[str, LLM], turn: int) -> list[tuple[str, LLM]]:
    """Each is first, and follows each of the others, as often as the rest."""
    orders = list(itertools.permutations(engines.items()))
    return list(orders[turn % len(orders)])


def speed_up(seconds: Mapping[str, list[float]], name: str) -> dict[str, float]:
    """Of all, of the median group, and the standard error of the first: groups resampled in pairs."""
    plain, other = torch.tensor(seconds["plain"]), torch.tensor(seconds[name])
    drawn = torch.randint(len(plain), (2000, len(plain)), generator=torch.Generator().manual_seed(0))
    resampled = plain[drawn].sum(1) / other[drawn].sum(1)
    return {
        "speed_up": round(float(plain.sum() / other.sum()), 3),
        "speed_up_error": round(float(resampled.std()), 3),
        "speed_up_median": round(float((plain / other).median()), 3),
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
