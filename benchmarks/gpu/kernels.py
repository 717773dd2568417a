"""Attention kernel times at Scout's shapes on one GPU, as JSON.

    PYTHONPATH=core:plugins/fa3:plugins/triton:plugins/trtllm_mha python benchmarks/gpu/kernels.py OUT.json [--only TEXT] [--page 64]

Every contender works on the same pages and is compared with the first of them before it is timed. A time is GPU time a layer, from a captured graph
of one step: what a backend prepares once a step (`plan`) is in it, spread over the layers of the graph.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from contenders import Ours, Timed, bare_fa3, ours, sdpa
from shapes import CHUNK, Problem, Shape, build, decode, prefill
from timing import graph_us, host_us

from l4core.attention.chunked import ring_width, single_chunk_metadata
from l4core.plugin_api import AttentionMetadata

sys.path.append(Path(__file__).resolve().parents[1].as_posix())
from where import where

BARE = "FA3, called directly"
TOLERANCE = 2e-2
LIBRARIES = ("tokenspeed-fa3", "flashinfer-python")
SAME_CHUNK_PART = 1808
"""Tokens past a chunk's border, of contexts that should cost a local layer the same: 10 000 and 1 001 232."""


def shapes() -> Iterator[Shape]:
    for layer in ("global", "local"):
        for batch in (1, 8, 32, 128):
            for context in (1024, 8192, 131072):
                yield decode(batch, context, layer)
        for batch, length in ((8, 2048), (2, 8192)):
            yield prefill(batch, length, layer)
    for context in (CHUNK + SAME_CHUNK_PART, 122 * CHUNK + SAME_CHUNK_PART):
        yield decode(8, context, "local")


def measure(shape: Shape, backends: Mapping[str, Ours], page_size: int) -> dict[str, Any]:
    """{contender: {us, rel_error, tflops or tbps, host_us}} of one shape; a contender that fails or is wrong has that instead of times."""
    row = _measure(build(shape, page_size), backends)
    gc.collect()
    torch.cuda.empty_cache()
    return row


def _measure(problem: Problem, backends: Mapping[str, Ours]) -> dict[str, Any]:
    makers: dict[str, Callable[[Problem], Timed | None]] = {BARE: bare_fa3, "torch SDPA, dense": sdpa}
    makers |= {name: backend.timed for name, backend in backends.items()}
    row: dict[str, Any] = {}
    made: dict[str, Timed] = {}
    wanted: torch.Tensor | None = None
    for name, maker in makers.items():
        if problem.shape.phase == "prefill" and "XQA" in name:
            continue  # one row at a time there: not what it is for
        try:
            timed = maker(problem)
            if timed is None:
                continue
            run(timed)
            found = timed.output().float()
            wanted = found if wanted is None else wanted
            error = ((found - wanted).norm() / wanted.norm()).item()
            row[name] = figures(problem, timed) | {"rel_error": error} if error <= TOLERANCE else {"wrong": error}
            made[name] = timed
        except Exception as error:  # noqa: BLE001  (one contender's failure must not lose the others' figures; it stands in the record)
            row[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
    for name, timed in made.items():  # a second round: the card's clocks are not the same all along
        if "us" in row[name]:
            row[name] |= rates(problem, min(row[name]["us"], graph_us(timed.calls, once=timed.once)))
    return row


def run(timed: Timed) -> None:
    if timed.once is not None:
        timed.once()
    for call in timed.calls:
        call()


def figures(problem: Problem, timed: Timed) -> dict[str, float]:
    shape = problem.shape
    host = {"host_us": host_us(timed.calls[0])} if shape.batch == 1 and shape.context == 1024 else {}
    return rates(problem, graph_us(timed.calls, once=timed.once)) | host


def rates(problem: Problem, us: float) -> dict[str, float]:
    shape = problem.shape
    rate = {"tflops": shape.flops / us / 1e6} if shape.phase == "prefill" else {"tbps": shape.kv_bytes / us / 1e6}
    return {"us": us} | rate


def step_metadata(batch: int, page_size: int) -> dict[str, float]:
    """GPU µs of a local layer group's metadata for one decode step, and that it waits for nothing."""
    width = ring_width(CHUNK, page_size)
    meta = AttentionMetadata(
        cu_seqlens_q=torch.arange(batch + 1, dtype=torch.int32, device="cuda"),
        seq_lens=torch.randint(1, 200_000, (batch,), dtype=torch.int32, device="cuda"),
        block_table=torch.zeros(batch, 1, dtype=torch.int32, device="cuda"),
        max_seqlen_q=1,
        max_seqlen_k=1 << 20,
        num_seqs=batch,
        phase="decode",
    )
    ring = torch.randint(0, 1000, (batch, width), dtype=torch.int32, device="cuda")

    def call() -> AttentionMetadata:
        return single_chunk_metadata(meta, ring, CHUNK, page_size)

    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    call()
    torch.cuda.set_sync_debug_mode("default")
    return {"batch": batch, "us": graph_us([call] * 10), "host_us": host_us(call), "host_syncs": 0}


def table(rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[str]:
    """A line a shape: µs of the direct call, then each contender's multiple of it."""
    for shape, row in rows.items():
        bare = row[BARE]["us"]
        others = (
            f"{name} ×{figure['us'] / bare:.3f}" if "us" in figure else f"{name} {figure}"
            for name, figure in row.items()
            if name != BARE
        )
        rate = row[BARE].get("tflops") or row[BARE]["tbps"]
        yield f"{shape}: {bare:.1f} µs ({rate:.3g}) | " + " | ".join(others)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default="", help="shapes whose name contains this")
    parser.add_argument("--page", type=int, default=64)
    args = parser.parse_args()
    torch.manual_seed(0)
    backends = dict(ours(args.page))
    rows: dict[str, Any] = {}
    record = {
        **where("auto", *LIBRARIES),
        "heads": "40 query heads on 8 KV heads of 128, bfloat16",
        "page_size": args.page,
        "providers": {name: backend.provider for name, backend in backends.items()},
        "step_metadata": step_metadata(128, args.page),
        "shapes": rows,
    }
    print("step metadata", record["step_metadata"])
    for shape in shapes():
        if args.only in shape.name:
            rows[shape.name] = measure(shape, backends, args.page)
            print(*table({shape.name: rows[shape.name]}), flush=True)
            args.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
