"""Whole Scout on one card: 48 layers, true shapes, dummy weights in 4 or 8 bits, through the real engine.

    python benchmarks/gpu/scout_quantised.py [--quantization int4] [--batches 1,8,64] [--context 1024] [--layers 48] [--profile] [--json OUT]

A step's time is that of `Engine.step` with ids on the host; its floor is what it must read at the rate this card copies, with the distinct experts
that were counted in a step outside the timing. Memory: what `l4 plan` says of the same numbers, beside what the allocator saw at most.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from one_rank import admit, build, copy_rate, kernel_ms, requests, shapes, step_ms

from l4core.bench.floor import decode_bytes, weights_by_config
from l4core.engine.inbox import Inbox
from l4core.engine.start.build import BuiltEngine

sys.path.append(Path(__file__).resolve().parents[1].as_posix())
from where import where

WARMUP, STEPS = 6, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantization", choices=("int4", "fp8"), default="int4")
    parser.add_argument("--batches", default="1,8,64")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("options", nargs="*", help="engine options, NAME=VALUE")
    args = parser.parse_args()
    rate = copy_rate()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    options: dict[str, Any] = {"context_length": 8192, "max_running_requests": 64, "max_total_tokens": 200_000}
    options |= dict(_value(option) for option in args.options)
    batches = [int(batch) for batch in args.batches.split(",")]
    built = build(shapes("scout", 1, args.layers), graph_batches=batches, quantization=args.quantization, **options)
    ready = time.perf_counter() - began
    results: dict[str, Any] = {
        **where(),
        "quantization": args.quantization,
        "layers": args.layers,
        "copy_tb_s": rate / 1e12,
        "ready_s": ready,
        "loading_peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "weights_gb": sum(p.nbytes for p in built.engine.runner.model.parameters()) / 1e9,
        "planned": {**asdict(built.budget.needs), "kv": built.budget.kv, "peak": built.budget.peak},
        "rows": [],
    }
    print(*built.report, f"{'ready':<16}{ready:.1f} s", f"{'copies':<16}{rate / 1e12:.2f} TB/s", sep="\n", flush=True)
    for batch in batches:
        row = measure(built, batch, args.context, args.quantization, rate, profile=args.profile)
        results["rows"].append(row)
        print(
            f"decode bs {batch} at {args.context}: {row['ms']:.3f} ms, floor {row['floor_ms']:.3f}, {row['ratio']:.3f} of it, "
            f"{row['experts']:.2f} experts a layer, {batch / row['ms'] * 1e3:.0f} tok/s",
            flush=True,
        )
    results["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    results["peak_of_plan"] = torch.cuda.max_memory_allocated() / built.budget.peak
    print(f"peak {results['peak_gb']:.2f} GB, {results['peak_of_plan']:.3f} of what was planned")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


def measure(
    built: BuiltEngine, batch: int, context: int, quantization: str, rate: float, *, profile: bool
) -> dict[str, Any]:
    """Times of a decode step of `batch` requests of `context` tokens and a few more."""
    config = built.model_config
    admit(built, requests(f"bs{batch}", batch, context, config.vocab_size, context + 4 * (WARMUP + STEPS)))
    step_ms(built, WARMUP)
    ms = min(step_ms(built, STEPS // 2) for _ in range(2))
    kernels = kernel_ms(built, 3, top=16) if profile else None
    if kernels is not None:
        print(f"kernels {kernels[0]:.3f} ms", *kernels[1].items(), sep="\n  ")
    experts = count_experts(built)
    built.engine.abort([sequence.request.request_id for sequence in built.engine.scheduler.sequences])
    while built.engine.has_work:
        built.engine.step()
    built.engine.step(Inbox(flush_cache=True))
    weights = weights_by_config(config, quantization)
    floor = decode_bytes(config, weights, batch=batch, context=context + WARMUP + STEPS // 2, experts=experts) / rate
    row = {
        "batch": batch,
        "context": context,
        "ms": ms,
        "floor_ms": floor * 1e3,
        "ratio": ms / floor / 1e3,
        "experts": experts,
    }
    return row | ({} if kernels is None else {"kernels_ms": kernels[0], "kernels": kernels[1]})


def count_experts(built: BuiltEngine) -> float:
    """Distinct experts that one more step hits, the mean of all layers."""
    found: list[torch.Tensor] = []
    runner: Any = built.engine.runner
    graphs, runner.graphs = runner.graphs, None  # a replay calls no hook
    hooks = [
        layer.moe.register_forward_pre_hook(
            lambda moe, given: found.append((given[0] @ moe.router.weight.t()).argmax(-1))
        )
        for layer in runner.model.layers
    ]
    built.engine.step()
    for hook in hooks:
        hook.remove()
    runner.graphs = graphs
    return statistics.fmean(len(ids.unique()) for ids in found)


def _value(option: str) -> tuple[str, Any]:
    name, _, text = option.partition("=")
    return name, json.loads(text) if text[:1].isdigit() or text in ("true", "false") else text


if __name__ == "__main__":
    main()
