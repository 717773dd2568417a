"""Several GPUs of one machine as one engine: does it compute what one computes, and how fast.

    python benchmarks/gpu/tp.py [--ranks N] [--parts sums,tokens,logits,speed] [--sums nccl,direct] [--ep 1,2] [--layers 8]
                                [--batches 1,8,32,128] [--prefills 8x2048] [--json OUT]

tokens   64 mixed requests in float32 on a small model with l4-triton against one GPU's tokens: graphs, every kernel launched from the host, experts
         dealt out, an EAGLE3 draft, FP8 weights
logits   the same in bfloat16: the difference from float32 on one GPU, of N ranks and of one; N ranks may have LOGITS times the error of one (the
         median of all rows: where a router's choice is a tie, one rounding sends a token elsewhere)
sums     microseconds of a sum over ranks in a graph, by NCCL and by reading each other's memory
speed    Scout's shapes with `layers` layers, random bfloat16 weights, on one GPU and on N, beside the floor: bytes a rank must read over the rate its
         card copies, and 2 sums a layer and one for the embedding
Starts its own ranks (torch.distributed.run), or is one of torchrun's.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from collectives import microseconds
from decode import Bench, measure_rates
from direct_sums import DirectRanks

from l4core.engine.build import build_engine
from l4core.parallel.ranks import ALONE, Ranks
from l4core.testing.models.checkpoints import make_tiny_checkpoint
from l4core.testing.models.eagle3 import make_tiny_draft
from l4core.testing.ranks.serving import Served, mixed_requests, rank_config_of, serve, serve_with

SMALL = {
    "layers": 4,
    "hidden": 256,
    "heads": 40,
    "kv_heads": 8,
    "head_dim": 32,
    "inter": 512,
    "experts": 4,
    "vocab": 2048,
}
LOGITS = 1.5
SUMS_OF = (1, 8, 32, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, help="default: all GPUs here")
    parser.add_argument("--parts", default="tokens,logits,sums,speed")
    parser.add_argument("--sums", default="nccl", help="how speed adds up over ranks: nccl, direct, or both")
    parser.add_argument("--ep", default="1", help="how speed deals out experts: 1, 2, …, or several")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batches", default="1,8,32,128")
    parser.add_argument("--prefills", default="8x2048")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if "RANK" not in os.environ:
        ranks = args.ranks or torch.accelerator.device_count()
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        os.execv(sys.executable, [*launch, *sys.argv])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    try:
        Run(args, device).all()
    finally:
        dist.destroy_process_group()


class Run:
    """One rank's part."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        self.ranks = Ranks(dist.group.WORLD)
        self.is_first = self.ranks.rank == 0
        self.control = dist.new_group(backend="gloo")
        self.began = time.perf_counter()
        self.found: dict[str, Any] = {
            "card": torch.cuda.get_device_name(),
            "ranks": self.ranks.size,
            "torch": torch.__version__,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }

    def all(self) -> None:
        for part in self.args.parts.split(","):
            getattr(self, part)()
            self.note(part, f"{time.perf_counter() - self.began:.0f} s")

    def note(self, name: str, value: Any) -> None:
        """Kept at once: whatever comes later, this was measured."""
        if not self.is_first:
            return
        self.found[name] = value
        print(f"{name:<34}{value}", flush=True)
        if self.args.json:
            self.args.json.write_text(json.dumps(self.found, indent=1) + "\n")

    def by_one(self, call: Callable[[], Any]) -> Any:
        """What the first rank's GPU gives alone, while the others wait."""
        made = [call() if self.is_first else None]
        gc.collect()
        torch.cuda.empty_cache()
        dist.broadcast_object_list(made, src=0, group=self.control)
        return made[0]

    @contextmanager
    def small(self) -> Iterator[Path]:
        """Folder of the small model, the same for all ranks."""
        with tempfile.TemporaryDirectory() as folder:
            if self.is_first:
                make_tiny_checkpoint(Path(folder), **SMALL)
                target = json.loads((Path(folder) / "config.json").read_text())
                make_tiny_draft(Path(folder) / "draft", target, aux_layers=(0, 2))
            shared = [folder]
            dist.broadcast_object_list(shared, src=0, group=self.control)
            yield Path(shared[0])
            dist.barrier(group=self.control)

    def direct(self) -> Ranks | None:
        try:
            return DirectRanks(dist.group.WORLD, self.device)
        except RuntimeError as error:
            self.note("direct sums", f"none: {error}")
            return None

    # --- does it compute the same ------------------------------------------------------------------------------------------------------

    def tokens(self) -> None:
        requests = mixed_requests(64, vocab=SMALL["vocab"], max_tokens=24)
        options: dict[str, Any] = {"device": "cuda", "attention_backend": "triton", "cuda_graph_max_bs": 16}
        fp8 = {"quantization": "fp8"}

        def answers(name: str, path: Path, ranks: Ranks, own: dict[str, Any]) -> Served:
            built = build_engine(rank_config_of(path, ranks, **options, **own), ranks=ranks, progress=False)
            self.note(f"{name}, ready", f"{time.perf_counter() - self.began:.0f} s")
            return serve_with(built, requests, ranks, keep=False)

        with self.small() as path:
            draft = {"speculative_algorithm": "EAGLE3", "speculative_draft_model_path": str(path / "draft")}
            for alone, variants in (
                (
                    {},
                    {
                        "graphs": {},
                        "eager": {"disable_cuda_graph": True},
                        "ep": {"ep": self.ranks.size},
                        "EAGLE3": draft,
                    },
                ),
                (fp8, {"fp8": fp8}),
            ):
                wanted: Served = self.by_one(lambda own=alone: answers(f"one GPU {own}", path, ALONE, own))
                for name, own in variants.items():
                    served = answers(name, path, self.ranks, own)
                    equal = sum(served.tokens[i] == wanted.tokens[i] for i in wanted.tokens)
                    self.note(
                        f"tokens, {name}", f"{equal} of {len(requests)} equal, {time.perf_counter() - self.began:.0f} s"
                    )
                    every = [None] * self.ranks.size
                    dist.all_gather_object(every, served.tokens, group=self.control)
                    assert all(one == served.tokens for one in every), "ranks disagree"
                    assert not served.errors, served.errors

    def logits(self) -> None:
        requests = mixed_requests(16, vocab=SMALL["vocab"], max_tokens=1)
        options = {"device": "cuda", "attention_backend": "triton", "disable_cuda_graph": True}
        with self.small() as path:
            exact: Served = self.by_one(lambda: serve(path, requests, ALONE, **options))
            one: Served = self.by_one(lambda: serve(path, requests, ALONE, dtype="bfloat16", **options))
            many = serve(path, requests, self.ranks, dtype="bfloat16", **options)
        errors = {}
        for name, served in (("one", one), ("ranks", many)):
            apart = torch.stack([(served.logits[key] - row).abs().amax() for key, row in exact.logits.items()])
            errors[name] = float(apart.median())
        self.note("bf16 logits, median of a row's max |Δ|", errors)
        assert errors["ranks"] <= LOGITS * errors["one"], errors

    # --- how fast ----------------------------------------------------------------------------------------------------------------------

    def sums(self) -> None:
        rows = []
        direct = self.direct()
        for tokens in SUMS_OF:
            x = torch.randn(tokens, 5120, dtype=torch.bfloat16, device=self.device)
            row = {"tokens": tokens, "nccl_us": microseconds(x.clone())}
            if direct is not None:
                total, wanted = direct.all_reduce(x.clone()), self.ranks.all_reduce(x.clone())
                every = self.ranks.all_gather(total)
                row["direct_us"] = graph_us(lambda x=x: direct.all_reduce(x))
                row["equal_on_all"] = bool((every == every[0]).all())
                row["apart"] = float((total.float() - wanted.float()).abs().max())
            rows.append(row)
        gathered = torch.zeros(3, 128, dtype=torch.int32, device=self.device)
        self.note("sums", rows)
        self.note("gather of a draw, µs", graph_us(lambda: self.ranks.all_gather(gathered)))

    def speed(self) -> None:
        batches = [int(text) for text in self.args.batches.split(",")]
        prefills = [tuple(map(int, text.split("x"))) for text in filter(None, self.args.prefills.split(","))]
        rates = measure_rates()
        self.note("copy TB/s, product TFLOP/s", (round(rates.copy / 1e12, 3), round(rates.matmul / 1e12, 1)))
        gc.collect()
        torch.cuda.empty_cache()

        def measure(name: str, ranks: Ranks, ep: str = "1") -> list[dict[str, Any]]:
            bench = Bench(self.args.layers, batches, {"ep": ep}, {"temperature": 1.0}, ranks)
            rows = []
            for batch in batches:
                ms, floor, experts = bench.decode(batch, 1024, rates, profile=False)
                rows.append({"what": f"decode {batch}", "ms": ms, "bytes_ms": floor, "experts": experts})
                self.note(f"{name}, decode {batch}", rows[-1])
            for batch, length in prefills:
                ms, floor, _ = bench.prefill(batch, length, rates, profile=False)
                rows.append({"what": f"prefill {batch}x{length}", "ms": ms, "bytes_ms": floor})
                self.note(f"{name}, prefill {batch}x{length}", rows[-1])
            return rows

        alone = self.by_one(lambda: measure("1 GPU", ALONE))
        ways = [(kind, ep) for kind in self.args.sums.split(",") for ep in self.args.ep.split(",")]
        for kind, ep in ways:
            ranks = self.ranks if kind == "nccl" else self.direct()
            if ranks is None:
                continue
            way = kind if ep == "1" else f"{kind}, ep {ep}"
            many = measure(f"{self.ranks.size} GPUs, {way}", ranks, ep)
            gc.collect()
            torch.cuda.empty_cache()
            for one, row in zip(alone, many, strict=True):
                tokens = int(row["what"].split()[1]) if "decode" in row["what"] else 16384
                x = torch.zeros(tokens, 5120, dtype=torch.bfloat16, device=self.device)
                sums = (2 * self.args.layers + 1) * graph_us(lambda x=x, ranks=ranks: ranks.all_reduce(x)) / 1e3
                floor = row["bytes_ms"] + sums
                ratio, scaling = row["ms"] / floor, one["ms"] / row["ms"] / self.ranks.size
                self.note(
                    f"{way}: {row['what']}",
                    {
                        "ms": round(row["ms"], 3),
                        "one_gpu_ms": round(one["ms"], 3),
                        "floor_ms": round(floor, 3),
                        "of_it_sums_ms": round(sums, 3),
                        "over_floor": round(ratio, 3),
                        "efficiency": round(scaling, 3),
                    },
                )


def graph_us(call: Callable[[], Any]) -> float:
    """Of one call, in a graph of many."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            call()
    times = []
    for _ in range(9):
        dist.barrier()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / 20)
    return sorted(times)[4]


if __name__ == "__main__":
    main()
