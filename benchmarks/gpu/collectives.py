"""What a sum over ranks takes on this machine, captured in a graph as the engine runs it: the two numbers that `l4 bench predict` assumes.

    torchrun --nproc-per-node 8 benchmarks/gpu/collectives.py [--hidden 5120] [--json OUT]

bfloat16, [tokens, hidden], in place. latency: of the smallest; bandwidth: 2·(n − 1)/n of the bytes over what the largest takes beyond it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.append(Path(__file__).resolve().parents[1].as_posix())
from where import where

TOKENS = (1, 8, 64, 256, 1024, 8192)
CALLS, ROUNDS = 50, 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=5120)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = []
    for tokens in TOKENS:
        us = microseconds(torch.zeros(tokens, args.hidden, dtype=torch.bfloat16, device=device))
        wire = 2 * (size - 1) / size * tokens * args.hidden * 2
        rows.append({"tokens": tokens, "bytes": tokens * args.hidden * 2, "us": us, "bus_gb_s": wire / us / 1e3})
        if rank == 0:
            print(f"{tokens:>6} tokens {us:9.1f} µs {rows[-1]['bus_gb_s']:7.1f} GB/s", flush=True)
    first, last = rows[0], rows[-1]
    bandwidth = 2 * (size - 1) / size * (last["bytes"] - first["bytes"]) / (last["us"] - first["us"]) / 1e3
    found = {
        **where(),
        "ranks": size,
        "rows": rows,
        "all_reduce_us": first["us"],
        "link_gbs": bandwidth,
    }
    if rank == 0:
        print(f"--all-reduce-us {first['us']:.1f} --link-gbs {bandwidth:.0f}")
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n")
    dist.destroy_process_group()


def microseconds(x: torch.Tensor) -> float:
    """Of one sum, the median of graphs of many in a row."""
    for _ in range(3):
        dist.all_reduce(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            dist.all_reduce(x)
    times = []
    for _ in range(ROUNDS):
        dist.barrier()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / CALLS)
    return statistics.median(times)


if __name__ == "__main__":
    main()
