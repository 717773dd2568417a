"""What quantisation costs in accuracy: perplexity and next-token agreement beside the plain model, through the engine, on a CPU or a GPU.

    python benchmarks/accuracy/quant.py [--model DIR] [--pieces 8] [--length 1024] [--json benchmarks/results/quant-accuracy.json]

The text is English prose about Python: docstrings of the standard library, module after module, cut into pieces. Agreement: share of positions where
the most likely next token is the plain model's. KL is not given: only the two most likely tokens of a position leave the engine.
On a CPU weights are used as they are kept and activations are not rounded; the row "fp8, activations too" rounds the rows that FP8 products read, as
a GPU does where it multiplies bytes.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch

import l4core.experts.quantised as experts
import l4core.quant.fp8 as fp8
from l4core import LLM, SamplingParams
from l4core.demo.build import cached_folder, find_delta
from l4core.ops.quantise_rows import quantise_rows_torch

sys.path.append(Path(__file__).resolve().parents[1].as_posix())
from where import where

MODULES = ("argparse", "asyncio/tasks", "collections/__init__", "contextlib", "datetime", "decimal", "difflib", "doctest", "email/message",
           "fractions", "heapq", "inspect", "ipaddress", "json/__init__", "logging/__init__", "pathlib", "pickle", "random", "statistics",
           "string", "subprocess", "tempfile", "textwrap", "threading", "typing", "unittest/case", "unittest/mock", "uuid", "zipfile")  # fmt: skip
VARIANTS = {"plain": None, "fp8": "fp8", "fp8, activations too": "fp8", "int4": "int4"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """What a model says of the text. losses: nats of each token.  best: its most likely token at each position."""

    losses: torch.Tensor
    best: torch.Tensor

    @property
    def perplexity(self) -> float:
        return math.exp(self.losses.mean().item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a plain checkpoint [the demo's, built before]")
    parser.add_argument("--pieces", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a piece")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = args.model or cached_folder(find_delta())
    results: dict[str, Any] = {
        **where(),
        "model": model.name,
        "pieces": args.pieces,
        "length": args.length,
        "rows": [],
    }
    plain: Read | None = None
    for name, quantization in VARIANTS.items():
        with rounded_activations() if "activations" in name else nullcontext():
            read = read_text(model, quantization, args.pieces, args.length, args.dtype)
        plain = plain or read
        row = {
            "weights": name,
            "perplexity": round(read.perplexity, 4),
            "of_plain": round(read.perplexity / plain.perplexity, 4),
            "agreement": round((read.best == plain.best).float().mean().item(), 4),
            "tokens": read.losses.numel(),
        }
        results["rows"].append(row)
        print(row, flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


def read_text(model: Path, quantization: str | None, pieces: int, length: int, dtype: str) -> Read:
    tokenizer = tokenizers.Tokenizer.from_file((model / "tokenizer.json").as_posix())
    ids = tokenizer.encode("".join(docstrings()), add_special_tokens=False).ids
    prompts = [ids[start : start + length] for start in range(0, pieces * length, length)]
    assert len(prompts[-1]) == length, f"the text has {len(ids)} tokens only"
    with LLM(model.as_posix(), quantization=quantization, dtype=dtype, max_model_len=length + 1, progress=False) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1))
    losses, best = [], []
    for prompt, output in zip(prompts, outputs, strict=True):
        steps = output.prompt_logprobs or []
        for token, step in zip(prompt[1:], steps[1:], strict=True):
            losses.append(-step[token])
            best.append(max(step, key=step.__getitem__))
    return Read(losses=torch.tensor(losses), best=torch.tensor(best))


def docstrings() -> Iterator[str]:
    """Of this interpreter's standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for module in MODULES:
        tree = ast.parse((root / f"{module}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text:
                    yield f"{text}\n\n"


@contextmanager
def rounded_activations() -> Iterator[None]:
    """Inside, the rows that products with FP8 weights read are rounded to e4m3 with a scale a row."""
    linear, mlp = fp8.linear, experts.linear

    def rounded(x: torch.Tensor) -> torch.Tensor:
        values, scale = quantise_rows_torch(x)
        return (values.float() * scale).to(x.dtype)

    fp8.linear = lambda x, weight, scale: linear(rounded(x), weight, scale)
    experts.linear = lambda x, weight: mlp(rounded(x), weight)
    try:
        yield
    finally:
        fp8.linear, experts.linear = linear, mlp


if __name__ == "__main__":
    main()
