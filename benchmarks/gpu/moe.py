"""One mixture-of-experts layer on the card: router, routed and shared experts, by kernel and number of tokens, beside the floor.

    python benchmarks/gpu/moe.py [--experts 16] [--inter 8192] [--tokens 1,8,32,128,2048,16384] [--out FILE]

Times are of captured graphs that go through several layers' weights. The floor is bytes of the weights that are hit (counted from the routing) and of
the activations over the copy rate, or operations over the matrix rate, whichever is more.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from moe_tune import HIDDEN, weights
from timing import graph_us

from l4core.experts.fused import TritonExperts
from l4core.experts.portable import TorchExperts
from l4core.experts.tiles import tiles_for
from l4core.ops.router import route
from l4core.plugin_api import ExpertKernel, ExpertWeights

sys.path.append(Path(__file__).resolve().parents[1].as_posix())
from where import where

BYTES_PER_S, FLOPS = 4.3e12, 750e12
"""Of an H200: copy, and products of bfloat16."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--inter", type=int, default=8192)
    parser.add_argument(
        "--tokens", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 32, 128, 2048, 16384]
    )
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    layers = weights(args.experts, args.inter, args.layers)
    router = torch.randn(args.experts, HIDDEN, device="cuda").bfloat16()
    major, minor = torch.cuda.get_device_capability()
    tiles = tiles_for(f"sm{major}{minor}", args.experts, HIDDEN, args.inter, "bfloat16")
    kernels: dict[str, ExpertKernel] = {"torch": TorchExperts(), "triton": TritonExperts(tiles)}
    rows = []
    for tokens in args.tokens:
        rows.append(measure(tokens, layers, router, kernels))
        print("  ".join(f"{key} {value:.4g}" for key, value in rows[-1].items()), flush=True)
    if args.out:
        found = {
            **where(),
            "experts": args.experts,
            "inter": args.inter,
        }
        args.out.write_text(json.dumps(found | {"rows": rows}, indent=1))


def measure(
    tokens: int, layers: list[ExpertWeights], router: torch.Tensor, kernels: dict[str, ExpertKernel]
) -> dict[str, float]:
    """Microseconds a layer, of each kernel with the router; error: largest difference from torch's, relative to the largest value."""
    x = torch.randn(tokens, HIDDEN, device="cuda").bfloat16()
    ids, score = route(x, router)
    hit = ids.unique().numel()
    expert = layers[0].gate_up[0].nbytes + layers[0].down[0].nbytes
    moved = (hit + 1) * expert + tokens * (4 * HIDDEN + 4 * layers[0].down.shape[2]) * 2
    row: dict[str, float] = {"tokens": tokens, "experts_hit": hit}
    row["floor_us"] = max(moved / BYTES_PER_S, 2 * tokens * expert / FLOPS) * 1e6
    row["router_us"] = graph_us([lambda: route(x, router)] * 20)
    want = kernels["torch"].forward(x, ids, score, layers[0]).float()
    for name, kernel in kernels.items():
        got = kernel.forward(x, ids, score, layers[0]).float()
        row[f"{name}_error"] = float((got - want).abs().max() / want.abs().max())
        row[f"{name}_us"] = graph_us([lambda w=w, k=kernel: k.forward(x, *route(x, router), w) for w in layers])  # type: ignore[misc]
    return row


if __name__ == "__main__":
    main()
