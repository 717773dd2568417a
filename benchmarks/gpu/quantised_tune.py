"""Tiles of the experts on quantised weights where a step has few to some tokens, captured, weights rotated through more than the cache.

    python benchmarks/gpu/quantised_tune.py [--kept int4] [--tokens 4,8,12,16,24,32,48] [--seconds 10] [--out FILE.json]

Scout's layer with its shared expert. A case is the tiles of one of two paths: unsorted, every expert that is hit reads all rows, with programs
that share its inputs; sorted, an expert reads its own. "as is" is what the package chooses, and what every other case is compared with: two orders
of adding up bfloat16 differ by 3e-3 of the norm, a wrong answer by more. --seconds: for each number of tokens. --warm: compile and compare only.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import graph_us

from l4core.experts.quantised_tiles import Tile, Tiles
from l4core.experts.quantised_triton import Fp8Experts, Int4Experts
from l4core.plugin_api import ExpertWeights

sys.path.append(Path(__file__).resolve().parents[1].as_posix())
from where import where

EXPERTS, HIDDEN, INTER, COPY = 16, 5120, 8192, 4.25e6
"""COPY: bytes a microsecond, of the floor."""
ROUTINGS, CALLS, LAYERS = 8, 24, 3
BYTES = {"int4": 33 / 64, "fp8": 1.0}
"""Of a weight with its share of a scale."""


def int4_weights() -> ExpertWeights:
    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-32768, 32767, shape, dtype=torch.int16, device="cuda")

    def scale(*shape: int) -> torch.Tensor:
        return torch.full(shape, 2.0**-9, dtype=torch.bfloat16, device="cuda")

    wide, narrow = (HIDDEN // 128, 2 * INTER), (INTER // 128, HIDDEN)
    return ExpertWeights(
        gate_up=words(EXPERTS, *wide, 32),
        gate_up_scale=scale(EXPERTS, *wide),
        down=words(EXPERTS, *narrow, 32),
        down_scale=scale(EXPERTS, *narrow),
        shared_gate_up=words(*wide, 32),
        shared_gate_up_scale=scale(*wide),
        shared_down=words(*narrow, 32),
        shared_down_scale=scale(*narrow),
    )


def fp8_weights() -> ExpertWeights:
    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, device="cuda") * 20).to(torch.float8_e4m3fn)

    def scale(*shape: int) -> torch.Tensor:
        return torch.full(shape, 2.0**-9, device="cuda")

    return ExpertWeights(
        gate_up=random(EXPERTS, 2 * INTER, HIDDEN),
        gate_up_scale=scale(EXPERTS, 2 * INTER, 1),
        down=random(EXPERTS, HIDDEN, INTER),
        down_scale=scale(EXPERTS, HIDDEN, 1),
        shared_gate_up=random(2 * INTER, HIDDEN),
        shared_gate_up_scale=scale(2 * INTER, 1),
        shared_down=random(HIDDEN, INTER),
        shared_down_scale=scale(HIDDEN, 1),
    )


def cases(num_tokens: int, warps: int, *, ratio: bool) -> Iterator[tuple[str, Tiles]]:
    """parts: programs that share the inputs of gate and up, and of down."""
    if num_tokens <= 16:
        rows = 8 if num_tokens <= 8 else 16
        for first, second, stages in ((1, 2, 3), (2, 2, 3), (2, 4, 3), (4, 8, 3), (4, 4, 4)):
            up = Tile(rows=rows, parts=first, warps=warps, stages=stages)
            down = Tile(rows=rows, parts=second, warps=warps, stages=stages)
            yield (
                f"unsorted, parts {first} {second}, stages {stages}",
                Tiles(gate_up=up, down=down, shared_gate_up=up, shared_down=down, few=True),
            )
    for parts in (1, 2, 4):
        routed = Tile(rows=8, parts=parts, warps=warps)
        for shared_parts in ((1, 1), (4, 8)):
            if num_tokens <= 16:
                shared = [Tile(rows=16, parts=n, warps=warps) for n in shared_parts]
            else:
                shared = [Tile(rows=32, parts=4, warps=4, ratio=ratio)] * 2
            yield (
                f"sorted, parts {parts}, shared {shared_parts[0]} {shared_parts[1]}",
                Tiles(gate_up=routed, down=routed, shared_gate_up=shared[0], shared_down=shared[1]),
            )
            if num_tokens > 16:
                break


class Layer:
    """Layers on the device, and random routings of so many tokens."""

    def __init__(self, kept: str, num_layers: int) -> None:
        is_int4 = kept == "int4"
        self.kept, self.warps = kept, 2 if is_int4 else 4
        self.kernel = Int4Experts("cuda") if is_int4 else Fp8Experts("cuda")
        self._layers = [int4_weights() if is_int4 else fp8_weights() for _ in range(num_layers)]

    def route(self, num_tokens: int) -> float:
        """→ experts hit in the mean, the shared one with them."""
        generator = torch.Generator().manual_seed(num_tokens)
        ids = [torch.randint(0, EXPERTS, (num_tokens,), generator=generator).int() for _ in range(ROUTINGS)]
        self._ids = [one.to("cuda") for one in ids]
        self._x = torch.randn(num_tokens, HIDDEN, device="cuda").bfloat16() * 0.02
        self._score = torch.full((num_tokens,), 0.5, device="cuda")
        return sum(len(one.unique()) for one in ids) / ROUTINGS + 1

    def run(self, tiles: Tiles, call: int = 0) -> torch.Tensor:
        layer = self._layers[call % len(self._layers)]
        return self.kernel.run(self._x, self._ids[call % ROUTINGS], self._score, layer, tiles)

    def microseconds(self, tiles: Tiles) -> float:
        return graph_us([partial(self.run, tiles, call) for call in range(CALLS)], repeats=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept", choices=tuple(BYTES), default="int4")
    parser.add_argument("--tokens", default="4,8,12,16,24,32,48")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    layer = Layer(args.kept, 1 if args.warm else LAYERS)
    rows: list[dict[str, Any]] = []
    for num_tokens in (int(text) for text in args.tokens.split(",")):
        hit = layer.route(num_tokens)
        floor_us = hit * 3 * HIDDEN * INTER * BYTES[args.kept] / COPY
        print(f"{args.kept}, {num_tokens} tokens: {hit:.2f} experts hit, floor {floor_us:.1f} us", flush=True)
        began = time.perf_counter()
        chosen = ("as is", layer.kernel.tiles(num_tokens, EXPERTS))
        wanted = layer.run(chosen[1]).float()
        for name, tiles in (chosen, *cases(num_tokens, layer.warps, ratio=args.kept == "int4"), chosen):
            if time.perf_counter() - began > args.seconds:
                print("out of time", flush=True)
                break
            error = float((layer.run(tiles).float() - wanted).norm() / wanted.norm())
            rows.append({"tokens": num_tokens, "floor_us": floor_us, "tiles": name, "error": error})
            if not args.warm:
                rows[-1]["us"] = layer.microseconds(tiles)
            print(rows[-1], flush=True)
        if args.out:
            args.out.write_text(json.dumps({**where(), "kept": args.kept, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
