"""One decode of a long sequence by l4-triton on one KV head (a rank of eight of Scout), alone and beside chats: tiles, programs, shares.

    python benchmarks/gpu/long_decode.py --out long-decode.json     [--warm: compile and compare with the definition only]
    python benchmarks/gpu/long_decode.py --chats 256 --out beside.json

Times are of a captured graph; keys and values are far more than the caches hold. Pages are dealt at random.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timing import graph_us

from l4_triton import launch
from l4_triton.tiles import Tile
from l4core.plugin_api import AttentionMetadata, KVView

sys.path.append(Path(__file__).resolve().parents[1].as_posix())
from where import where

HEADS, DIM, PAGE, CHAT_TOKENS = 5, 128, 64, 1000
TOKENS = {torch.bfloat16: 5_000_000, torch.float8_e4m3fn: 10_000_000}
TILES = {
    torch.bfloat16: [(64, 4, 3, 2), (64, 4, 3, 3), (64, 2, 3, 3), (64, 2, 2, 4), (32, 2, 6, 3), (32, 2, 4, 4), (32, 2, 3, 5), (32, 1, 4, 4)],
    torch.float8_e4m3fn: [(64, 2, 4, 4), (64, 2, 5, 4), (64, 2, 3, 4), (64, 2, 6, 3), (64, 2, 3, 5), (64, 4, 4, 3), (64, 4, 5, 3), (64, 1, 4, 4)],
}  # fmt: skip
"""Keys a tile, warps, stages, programs a multiprocessor."""
STARTS = [0, 2, 3, 4, 6]
"""What beginning a sequence counts for, in tiles, beside chats."""


def traits() -> Any:
    return launch.Traits(converts_fp8=True, starts_early=True, interpreted=False)


class Problem:
    def __init__(self, dtype: torch.dtype, tokens: int, chats: int = 0) -> None:
        lengths = [tokens] + [CHAT_TOKENS] * chats
        counts = [-(-n // PAGE) for n in lengths]
        pages, longest = sum(counts), max(counts)
        memory = torch.empty(pages, 2, PAGE, 1, DIM, dtype=dtype, device="cuda")
        flat = memory.view(-1)
        block = torch.randn(1 << 26, device="cuda").to(dtype)
        for part in flat.split(block.numel()):
            part.copy_(block[: part.numel()])
        scale = torch.ones((), device="cuda") if dtype.itemsize == 1 else None
        self.kv = KVView(k=memory[:, 0], v=memory[:, 1], k_scale=scale, v_scale=scale)
        self.q = torch.randn(len(lengths), HEADS, DIM, device="cuda").bfloat16()
        self.out = torch.empty_like(self.q)
        self.tokens, self.num_bytes = tokens, 2 * sum(lengths) * DIM * dtype.itemsize
        table = torch.zeros(len(lengths), longest, device="cuda", dtype=torch.int32)
        dealt = torch.randperm(pages, device="cuda").int().split(counts)
        for row, mine in zip(table, dealt, strict=True):
            row[: len(mine)] = mine
        self.meta = AttentionMetadata(
            cu_seqlens_q=torch.arange(len(lengths) + 1, device="cuda", dtype=torch.int32),
            seq_lens=torch.tensor(lengths, device="cuda", dtype=torch.int32),
            block_table=table,
            max_seqlen_q=1,
            max_seqlen_k=tokens,
            num_seqs=len(lengths),
            phase="decode",
        )

    def run(self, tile: Tile, partials: launch.Partials) -> None:
        launch.decode(self.q, self.kv, self.meta, self.out, tile, traits(), partials, 2)

    def error(self) -> float:
        """Of the long sequence's `out` against float64 over the same values."""
        table = self.meta.block_table[0].long()
        k, v = (x[table].flatten(0, 1)[: self.tokens, 0].double() for x in (self.kv.k.float(), self.kv.v.float()))
        exact = torch.softmax(self.q[0].double() @ k.T * DIM**-0.5, -1) @ v
        return float((self.out[0].double() - exact).abs().max())


def variants(dtype: torch.dtype) -> Iterator[tuple[Tile, launch.Partials]]:
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    for block_n, warps, stages, programs in TILES[dtype]:
        tile = Tile(block_m=16, block_n=block_n, warps=warps, stages=stages)
        yield tile, launch.new_partials(programs * processors, 16, DIM, "cuda")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--chats", type=int, default=0)
    parser.add_argument("--dtype", choices=("bfloat16", "float8_e4m3fn"), help="[both]")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = []
    for dtype, tokens in TOKENS.items():
        if args.dtype not in (None, str(dtype).removeprefix("torch.")):
            continue
        problem = Problem(dtype, 100_003 if args.warm else tokens, args.chats)
        ways = [(*way, None) for way in variants(dtype)]
        if args.chats:
            ways = [(*next(variants(dtype)), start) for start in STARTS]
        for tile, partials, start in ways:
            record: dict[str, Any] = {
                "dtype": str(dtype),
                "tile": [tile.block_n, tile.warps, tile.stages],
                "programs": partials.programs,
            }
            if start is not None:
                record["start"] = launch.START = start
            try:
                problem.run(tile, partials)
                record |= {"error": problem.error()} if args.warm else _times(problem, tile, partials)
            except Exception as error:  # noqa: BLE001  a tile too large for the device is a result
                record["failed"] = f"{error!r:.120}"
            found.append(record)
            print(json.dumps(record), flush=True)
        del problem
        torch.cuda.empty_cache()
    if args.out:
        args.out.write_text(json.dumps({**where(), "rows": found}, indent=1) + "\n")


def _times(problem: Problem, tile: Tile, partials: launch.Partials) -> dict[str, float]:
    us = graph_us([lambda: problem.run(tile, partials)] * 2, repeats=3)
    return {"us": round(us, 1), "tb_s": round(problem.num_bytes / us / 1e6, 3)}


if __name__ == "__main__":
    main()
