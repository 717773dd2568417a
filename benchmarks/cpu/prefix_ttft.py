"""Time to the first token of requests that share a beginning, with the prefix cache on and off, on one engine's steps.

  python benchmarks/cpu/prefix_ttft.py MODEL [--shared 64,512,2000] [--own 32] [--requests 6] [--dtype float32] [--threads 2] [--json OUT]

MODEL: a folder (`l4 demo-model DIR`, or benchmarks/cpu/make_model.py). Requests come one after the other, so nothing but their own prompt is
computed; the first of each length warms the cache (and the machine) and is not counted. Both engines are built before anything is timed and take
turns request by request. Median and range of the others. The floor of a hit: its own tokens over all, times the time without the cache.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from l4core import LLM, SamplingParams
from l4core.engine.inbox import Inbox
from l4core.request import Request

sys.path.append(Path(__file__).resolve().parents[1].as_posix())
from where import where


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--shared", default="64,512,2000", help="lengths in tokens")
    parser.add_argument("--own", type=int, default=32, help="tokens of each request that no other has")
    parser.add_argument("--requests", type=int, default=6)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    engines = {
        name: LLM(args.model, dtype=args.dtype, device=args.device, disable_radix_cache=off, progress=False)
        for name, off in (("on", False), ("off", True))
    }
    result: dict[str, Any] = {**where(args.device), "model": Path(args.model).name}
    result |= {"threads": args.threads, "own": args.own, "rows": []}
    print(f"{'shared':>8}{'cached':>8}{'on, ms':>10}{'off, ms':>10}{'off / on':>10}{'floor':>8}")
    for shared in map(int, args.shared.split(",")):
        row = measure(engines, shared, args.own, args.requests)
        result["rows"].append(row)
        print(
            f"{shared:>8}{row['cached']:>8}{row['on']['median_ms']:>10.1f}{row['off']['median_ms']:>10.1f}"
            f"{row['off']['median_ms'] / row['on']['median_ms']:>10.2f}{row['most']:>8.2f}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(engines: dict[str, LLM], shared: int, own: int, count: int) -> dict[str, Any]:
    """cached: tokens found by each counted request.  most: how much faster it could be, were its own tokens all it costs."""
    rng = random.Random(shared)
    vocab = 250
    beginning = rng.choices(range(vocab), k=shared)
    times: dict[str, list[float]] = {name: [] for name in engines}
    cached = 0
    for number in range(count + 1):
        prompt = [*beginning, *rng.choices(range(vocab), k=own)]
        for name, llm in engines.items():
            seconds, found = first_token(llm, f"{shared}-{number}", prompt)
            if number:
                times[name].append(seconds * 1e3)
                cached = max(cached, found)
    return {
        "shared": shared,
        "cached": cached,
        "most": (shared + own) / (shared + own - cached),
        **{
            name: {"median_ms": statistics.median(found), "min_ms": min(found), "max_ms": max(found)}
            for name, found in times.items()
        },
    }


def first_token(llm: LLM, request_id: str, prompt: list[int]) -> tuple[float, int]:
    """→ (seconds from the request to its only token, prompt tokens that were found computed)."""
    engine = llm._built.engine
    request = Request(
        request_id=request_id,
        prompt_token_ids=prompt,
        params=SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, seed=0),
        eos_token_ids=(),
        max_total_tokens=len(prompt) + 1,
    )
    began = time.perf_counter()
    inbox = Inbox(requests=[request])
    while True:
        output = engine.step(inbox)
        inbox = Inbox()
        for update in output.updates:
            if update.error:
                raise RuntimeError(update.error)
            if update.new_token_ids:
                return time.perf_counter() - began, update.num_cached_tokens


if __name__ == "__main__":
    main()
