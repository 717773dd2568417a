"""A request of millions of tokens on one device: one rank of eight of Scout, real decode steps, alone and beside 256 chats.

Keys and values are random, not computed (that would take an hour); page tables, lengths and every step after that are the engine's own.

    python benchmarks/gpu/long_context.py --tokens 5000000 --out long.json
    python benchmarks/gpu/long_context.py --tokens 10000000 --kv-cache-dtype fp8_e4m3 --out long-fp8.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from one_rank import (
    admit,
    build,
    copy_rate,
    kernel_ms,
    kv_bytes_read,
    randomise,
    requests,
    shapes,
    step_ms,
    weight_bytes_read,
    without_computing,
)

sys.path.append(Path(__file__).resolve().parents[1].as_posix())
from where import where

GIB = 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scout")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--layers", type=int, help="of the model's [all]")
    parser.add_argument("--tokens", type=int, default=5_000_000)
    parser.add_argument("--chats", type=int, default=256)
    parser.add_argument("--chat-tokens", type=int, default=1_000)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--attention-backend")
    parser.add_argument("--memory-gib", type=float, default=79.1, help="as if the device had only so much [an H100's]")
    parser.add_argument("--disable-hybrid-swa-memory", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = measure(args)
    print(json.dumps(found, indent=1))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


def measure(args: argparse.Namespace) -> dict[str, object]:
    rate = copy_rate()
    torch.accelerator.empty_cache()
    torch.accelerator.reset_peak_memory_stats()
    began = time.perf_counter()
    config = shapes(args.model, args.ranks, args.layers)
    total = torch.accelerator.get_memory_info()[1]
    built = build(
        config,
        graph_batches=(1, args.chats + 1),
        attention_backend=args.attention_backend,
        kv_cache_dtype=args.kv_cache_dtype,
        disable_hybrid_swa_memory=args.disable_hybrid_swa_memory,
        max_running_requests=args.chats + 1,
        mem_fraction_static=min(0.97, 0.9 * args.memory_gib * GIB / total),
    )
    print("\n".join(built.report), flush=True)
    ready = time.perf_counter()
    memory = built.engine.runner.memory
    randomise(memory)
    itemsize = memory.view(0).k.dtype.itemsize
    limit, vocab = built.context_length, config.vocab_size
    with without_computing(built):
        pieces = admit(built, requests("long", 1, args.tokens, vocab, limit))
    filled = time.perf_counter()
    print(f"built {ready - began:.1f} s, {pieces} pieces {filled - ready:.1f} s", flush=True)

    def timed(lengths: list[int]) -> dict[str, object]:
        step_ms(built, 8)
        ms = step_ms(built, args.steps)
        num_bytes = weight_bytes_read(config, len(lengths)) + kv_bytes_read(config, lengths, itemsize)
        floor = num_bytes / rate * 1e3
        kernels, slowest = kernel_ms(built, 4)
        return {
            "read_gb": num_bytes / 1e9,
            "floor_ms": floor,
            "step_ms": ms,
            "ratio": ms / floor,
            "kernels_ms": kernels,
            "slowest": slowest,
        }

    alone = timed([args.tokens])
    print("alone", alone, flush=True)
    chats = requests("chat", args.chats, args.chat_tokens, vocab, limit)
    admit(built, chats)
    beside = timed([args.tokens, *[args.chat_tokens] * args.chats])
    return {
        **where(),
        "what": {k: v for k, v in vars(args).items() if k != "out"},
        "report": list(built.report),
        "copy_tb_s": rate / 1e12,
        "alone": alone,
        f"beside {args.chats} chats": beside,
        "memory": {
            "predicted_gb": built.budget.peak / 1e9,
            "peak_gb": torch.accelerator.max_memory_allocated() / 1e9,
            "of_a_step_gb": built.budget.needs.rest / 1e9,
            "reserved_gb": torch.accelerator.max_memory_reserved() / 1e9,
            "used_on_device_gb": (total - torch.accelerator.get_memory_info()[0]) / 1e9,
            "weights_gb": sum(p.numel() * p.itemsize for p in built.engine.runner.model.parameters()) / 1e9,
            "kv_gb": memory.num_bytes / 1e9,
        },
        "seconds": {"build": ready - began, "fill": filled - ready},
    }


if __name__ == "__main__":
    main()
