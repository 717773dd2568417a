"""Tiles of the skinny product (l4core.ops.skinny_triton) against torch's, at Scout's shapes; captured, weights rotated through more than the cache.

python benchmarks/gpu/skinny_tune.py [--warm] [--out FILE.json]     --warm: compile and compare only, on many processes
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from timing import graph_us

from l4core.ops.skinny_triton import SkinnyTile, skinny_linear

sys.path.append(Path(__file__).resolve().parents[1].as_posix())
from where import where

SHAPES = {
    "qkv": (7168, 5120),
    "o": (5120, 5120),
    "gate_up": (16384, 5120),
    "down": (5120, 8192),
    "lm_head": (202048, 5120),
    "qkv of a rank of 8": (896, 5120),
    "o of a rank of 8": (5120, 640),
}
ROWS = (1, 8, 32, 128)
BANDWIDTH = 4.3e12
SHARED = 220 << 10
COLD = 256 << 20


def tiles(rows: int) -> Iterator[SkinnyTile]:
    """What may be good for so many rows: enough bytes under way, not too many registers."""
    if rows == 1:
        for columns, depth, warps in itertools.product((2, 4, 8, 16, 32), (128, 256, 512, 1024), (1, 2, 4, 8)):
            if 1024 <= columns * depth <= 8192 and columns * depth >= warps * 256:
                for stages in (1, 3):
                    yield SkinnyTile(rows=1, columns=columns, depth=depth, warps=warps, stages=stages)
    padded = max(16, rows)
    for columns, depth, warps, stages in itertools.product((16, 32, 64, 128), (128, 256, 512), (4, 8), (3, 4, 6)):
        ahead = 2 * depth * (columns + padded) * stages
        if 40 << 10 <= ahead <= SHARED and columns * depth <= 16384 and columns * padded >= 128 * warps:
            yield SkinnyTile(rows=padded, columns=columns, depth=depth, warps=warps, stages=stages)


def wrong(tile: SkinnyTile) -> str:
    """What is wrong with the tile, "" when nothing is."""
    try:
        x, w = (torch.randn(n, 1024, device="cuda").bfloat16() for n in (1 if tile.rows == 1 else tile.rows - 1, 1000))
        out = skinny_linear(x, w, x.new_empty(x.shape[0], 1000), tile)
        error = ((out - x @ w.t()).abs().max() / 32).item()
    except Exception as failure:  # noqa: BLE001  (a tile that does not compile or fit is a result)
        return f"{tile}: {failure!s:.100}"
    return "" if error < 0.02 else f"{tile} is off by {error}"


def warm(all_rows: Sequence[int]) -> None:
    found = list(dict.fromkeys(tile for rows in all_rows for tile in tiles(rows)))
    with multiprocessing.get_context("spawn").Pool(5) as pool:
        for text in filter(None, pool.imap_unordered(wrong, found, chunksize=4)):
            print(text, flush=True)
    print(len(found), "tiles")


def time_tiles(name: str, rows: int, weights: list[torch.Tensor]) -> dict[str, Any]:
    num_out, depth = weights[0].shape
    x = torch.randn(rows, depth, device="cuda").bfloat16()
    out = x.new_empty(rows, num_out)
    torch_us = graph_us([lambda w=w: torch.mm(x, w.t(), out=out) for w in weights * 2], repeats=3)
    results = []
    for tile in tiles(rows):
        if depth % tile.depth == 0 and (name != "lm_head" or tile.columns >= 4):
            us = graph_us([lambda w=w, t=tile: skinny_linear(x, w, out, t) for w in weights * 2], repeats=3)
            results.append((us, tile))
    results.sort(key=lambda result: result[0])
    best = [(round(us, 2), t.rows, t.columns, t.depth, t.warps, t.stages) for us, t in results[:5]]
    floor = 2 * num_out * depth / BANDWIDTH * 1e6
    return {"name": name, "rows": rows, "floor_us": round(floor, 2), "torch_us": round(torch_us, 2), "best": best}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    args = parser.parse_args()
    if args.warm:
        warm(args.rows)
        return
    found, began = [], time.perf_counter()
    for name in args.shapes:
        num_out, depth = SHAPES[name]
        copies = 2 + COLD // (2 * num_out * depth)
        weights = [torch.randn(num_out, depth, device="cuda").bfloat16() / 50 for _ in range(copies)]
        for rows in args.rows:
            found.append(time_tiles(name, rows, weights))
            print(found[-1], f"{time.perf_counter() - began:.0f} s", flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps({**where(), "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
