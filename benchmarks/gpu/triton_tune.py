"""l4-triton's kernels at Scout's shapes beside FA3 and torch SDPA, and a sweep over tile sizes. Needs one NVIDIA GPU.

    PYTHONPATH=core:plugins/triton python benchmarks/gpu/triton_tune.py --out times.json [--sweep] [--fa3] [--workers 12]

Times are medians of a captured graph's replay, L2 flushed before each, in ms: the launch by Python is not in them. Pages of 64 tokens, dealt at
random, keys and values of a page side by side (so the page stride is not that of a dense pool). 40 query and 8 KV heads of 128, bfloat16.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from l4_triton import launch
from l4_triton.tiles import Tile, tiles_for
from l4core.plugin_api import AttentionMetadata, ChunkInfo, KVView

sys.path.append(Path(__file__).resolve().parents[1].as_posix())
from where import where

HEADS, KV_HEADS, DIM, PAGE = 40, 8, 128, 64
DECODES = [(b, s) for s in (1024, 8192, 131072) for b in (1, 8, 32, 128) if b * s <= 32 * 131072]
PREFILLS = [(8, 2048), (2, 8192)]
CHUNK = 8192
TRAITS = launch.Traits(converts_fp8=True, starts_early=True, interpreted=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig:
    tile: Tile
    programs_per_sm: int
    min_tiles: int


def decode_configs() -> list[DecodeConfig]:
    shapes = [
        (64, 4, 3),
        (64, 4, 4),
        (64, 4, 2),
        (128, 4, 2),
        (128, 8, 3),
        (128, 4, 3),
        (32, 4, 4),
        (32, 2, 4),
        (64, 2, 3),
        (64, 8, 3),
    ]
    configs = [
        DecodeConfig(tile=Tile(block_m=16, block_n=n, warps=w, stages=s), programs_per_sm=p, min_tiles=2)
        for (n, w, s), p in itertools.product(shapes, (1, 2, 3, 4))
        if n * s * p <= 1024 and n * s * p >= 128
    ]
    base = next(c for c in configs if c.tile.block_n == 64 and c.tile.stages == 3 and c.programs_per_sm == 2)
    return configs + [replace(base, min_tiles=m) for m in (1, 4, 8)]


def prefill_tiles() -> list[Tile]:
    shapes = [
        (128, 64, 8, 3),
        (128, 64, 8, 2),
        (128, 64, 8, 4),
        (128, 128, 8, 2),
        (128, 128, 8, 3),
        (64, 64, 4, 3),
        (128, 64, 4, 3),
        (64, 128, 4, 2),
    ]
    return [Tile(block_m=m, block_n=n, warps=w, stages=s) for m, n, w, s in shapes]


# ---------------------------------------------------------------- problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    q: torch.Tensor
    kv: KVView
    meta: AttentionMetadata
    out: torch.Tensor


class Pool:
    """One pool of pages for all problems; their tables are random choices of it."""

    def __init__(self, num_pages: int, page: int = PAGE) -> None:
        memory = torch.empty(num_pages, 2, page, KV_HEADS, DIM, dtype=torch.bfloat16, device="cuda")
        for part in memory.split(4096):
            part.normal_()
        self.page, self.memory, self.kv = page, memory, KVView(k=memory[:, 0], v=memory[:, 1])

    def problem(self, batch: int, keys: int, queries: int, chunk: int | None = None) -> Problem:
        width = -(-keys // self.page)
        table = torch.randperm(len(self.memory), device="cuda")[: batch * width].view(batch, width).int()
        packed = torch.randn(batch * queries, HEADS + 2 * KV_HEADS, DIM, dtype=torch.bfloat16, device="cuda")
        meta = AttentionMetadata(
            cu_seqlens_q=torch.arange(batch + 1, device="cuda", dtype=torch.int32) * queries,
            seq_lens=torch.full((batch,), keys, device="cuda", dtype=torch.int32),
            block_table=table,
            max_seqlen_q=queries,
            max_seqlen_k=keys,
            num_seqs=batch,
            phase="decode" if queries == 1 else "prefill",
            chunk=None if chunk is None else ChunkInfo(size=chunk),
        )
        q = packed[:, :HEADS]
        return Problem(
            q=q, kv=self.kv, meta=meta, out=torch.empty(batch * queries, HEADS, DIM, dtype=q.dtype, device="cuda")
        )


def decode(p: Problem, config: DecodeConfig) -> Callable[[], object]:
    programs = config.programs_per_sm * torch.cuda.get_device_properties(0).multi_processor_count
    partials = launch.new_partials(programs, config.tile.block_m, DIM, "cuda")
    return lambda: launch.decode(p.q, p.kv, p.meta, p.out, config.tile, TRAITS, partials, config.min_tiles)


def prefill(p: Problem, tile: Tile) -> Callable[[], object]:
    return lambda: launch.prefill(p.q, p.kv, p.meta, p.out, tile, TRAITS)


# ---------------------------------------------------------------- time

_FLUSH_BYTES = 256 << 20


def milliseconds(run: Callable[[], object], repeats: int = 20) -> float:
    """Median of a captured graph, the L2 flushed before each replay."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats + 3)]
    for begin, end in pairs:
        flush.zero_()
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return float(statistics.median(begin.elapsed_time(end) for begin, end in pairs[3:]))


def attempt(run: Callable[[], object], repeats: int = 20) -> float | str:
    try:
        return round(milliseconds(run, repeats), 5)
    except Exception as error:  # noqa: BLE001  a tile too large for the device is a result
        return repr(error)[:160]


# ---------------------------------------------------------------- peers


def fa3(p: Problem) -> Callable[[], object]:
    from flash_attn_interface import flash_attn_with_kvcache

    def run() -> object:
        return flash_attn_with_kvcache(
            p.q, p.kv.k, p.kv.v, cache_seqlens=p.meta.seq_lens, page_table=p.meta.block_table,
            cu_seqlens_q=p.meta.cu_seqlens_q, max_seqlen_q=p.meta.max_seqlen_q, causal=True,
            attention_chunk=0 if p.meta.chunk is None else p.meta.chunk.size,
        )  # fmt: skip

    return run


def fa3_decode(p: Problem) -> Callable[[], object]:
    """As one queries it for decode: [B, 1, H, D]."""
    from flash_attn_interface import flash_attn_with_kvcache

    q = p.q.unsqueeze(1)
    chunk = 0 if p.meta.chunk is None else p.meta.chunk.size
    return lambda: flash_attn_with_kvcache(
        q,
        p.kv.k,
        p.kv.v,
        cache_seqlens=p.meta.seq_lens,
        page_table=p.meta.block_table,
        causal=True,
        attention_chunk=chunk,
    )


def sdpa(batch: int, keys: int, queries: int) -> float | str:
    """Milliseconds on dense keys and values; for a decode the better of query heads as heads and as rows."""
    k, v = (torch.randn(batch, KV_HEADS, keys, DIM, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    q = torch.randn(batch, HEADS, queries, DIM, dtype=torch.bfloat16, device="cuda")
    as_heads = attempt(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=queries > 1, enable_gqa=True))
    if queries > 1:
        return as_heads
    rows = q.view(batch, KV_HEADS, HEADS // KV_HEADS, DIM)
    times = (as_heads, attempt(lambda: F.scaled_dot_product_attention(rows, k, v)))
    return min((t for t in times if isinstance(t, float)), default=as_heads)


# ---------------------------------------------------------------- tables


def compile_share(worker: int, workers: int) -> None:
    """Compiles every workers-th configuration into Triton's cache."""
    pool = Pool(2048)
    jobs: list[Callable[[], object]] = []
    few, many, piece = pool.problem(1, 1024, 1), pool.problem(32, 1024, 1), pool.problem(1, 256, 256)
    configs = {(c.tile, c.min_tiles): c for c in decode_configs()}.values()
    jobs += [decode(p, config) for config in configs for p in (few, many)]
    jobs += [prefill(piece, tile) for tile in prefill_tiles()]
    for job in jobs[worker::workers]:
        try:
            job()
        except Exception as error:  # noqa: BLE001  reported where it is timed
            print(f"compile: {error!r}"[:200], file=sys.stderr)
    torch.cuda.synchronize()


def sweep(pool: Pool) -> Iterator[dict[str, Any]]:
    shapes = [(1, 8192), (8, 8192), (32, 8192), (128, 1024), (1, 131072)]
    problems = {shape: pool.problem(*shape, 1) for shape in shapes}
    for config in decode_configs():
        times = {f"{b}x{s}": attempt(decode(p, config), 10) for (b, s), p in problems.items()}
        yield {"decode": asdict(config)} | times
    pieces = {shape: pool.problem(*shape, shape[1]) for shape in PREFILLS}
    for tile in prefill_tiles():
        found = {f"{b}x{s}": attempt(prefill(p, tile), 8) for (b, s), p in pieces.items()}
        yield (
            {"prefill": asdict(tile)}
            | found
            | {f"TFLOP/s {b}x{s}": tflops(b, s, found[f"{b}x{s}"]) for b, s in PREFILLS}
        )


def tflops(batch: int, keys: int, ms: float | str) -> float | None:
    return None if isinstance(ms, str) else round(4 * HEADS * DIM * keys * keys / 2 * batch / ms / 1e9, 1)


def table(pool: Pool, with_fa3: bool) -> Iterator[dict[str, Any]]:
    tiles = tiles_for("sm90", "bfloat16", DIM, "bfloat16")
    config = DecodeConfig(
        tile=tiles.split(HEADS // KV_HEADS), programs_per_sm=tiles.programs_per_sm, min_tiles=tiles.min_tiles
    )
    for b, s in DECODES:
        p = pool.problem(b, s, 1)
        row: dict[str, Any] = {"decode": f"{b}x{s}", "triton": attempt(decode(p, config))}
        if with_fa3:
            row["fa3"] = attempt(fa3_decode(p))
        if b * s <= 1 << 20:
            row["sdpa dense"] = sdpa(b, s, 1)
        yield row | _ratio(row)
    for b, s in [(1, 10_000), (1, 1_000_000), (8, 10_000), (8, 500_000)]:
        p = pool.problem(b, s, 1, chunk=CHUNK)
        row = {"local decode": f"{b}x{s}", "triton": attempt(decode(p, config))}
        if with_fa3:
            row["fa3"] = attempt(fa3_decode(p))
        yield row | _ratio(row)
    for b, s in PREFILLS:
        p = pool.problem(b, s, s)
        row = {"prefill": f"{b}x{s}", "triton": attempt(prefill(p, tiles.prefill))}
        if with_fa3:
            row["fa3"] = attempt(fa3(p))
        row["sdpa dense"] = sdpa(b, s, s)
        yield (
            row
            | {f"TFLOP/s {name}": tflops(b, s, row[name]) for name in ("triton", "fa3", "sdpa dense") if name in row}
            | _ratio(row)
        )


def _ratio(row: dict[str, Any]) -> dict[str, Any]:
    mine, theirs = row.get("triton"), row.get("fa3")
    return {"triton / fa3": round(mine / theirs, 3)} if isinstance(mine, float) and isinstance(theirs, float) else {}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--fa3", action="store_true")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--share", type=int, default=-1)
    a = parser.parse_args()
    if a.share >= 0:
        compile_share(a.share, a.workers)
        return
    if a.workers:
        command = [sys.executable, __file__, "--workers", str(a.workers), "--share"]
        for worker in [subprocess.Popen([*command, str(i)]) for i in range(a.workers)]:
            worker.wait()
    records: list[dict[str, Any]] = [{**where(), "page": PAGE}]
    print(records[0], flush=True)
    pool = Pool(36 * 131072 // PAGE)
    for record in itertools.chain(sweep(pool) if a.sweep else (), table(pool, a.fa3) if a.table else ()):
        records.append(record)
        print(json.dumps(record), flush=True)
    if a.out:
        with open(a.out, "w") as file:
            json.dump(records, file, indent=1)


if __name__ == "__main__":
    main()
