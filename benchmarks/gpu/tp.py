"""Several GPUs of one machine as one engine: does it compute what one computes, and how fast.

    python benchmarks/gpu/tp.py [--ranks N] [--parts tokens,logits,sums,speed] [--variants graphs,eager,ep,EAGLE3,fp8] [--sums nccl,direct] [--ep 1,2]
                                [--layers 8] [--batches 1,8,32,128] [--prefills 8x2048] [--skip-one] [--seconds N] [--json OUT] [--device cpu]

tokens   64 mixed requests in float32 on a small model with l4-triton against one GPU's tokens: graphs, every kernel launched from the host, experts
         dealt out, an EAGLE3 draft, FP8 weights (--variants)
logits   the same in bfloat16: the difference from float32 on one GPU, of N ranks and of one; N ranks may have LOGITS times the error of one (the
         median of all rows: where a router's choice is a tie, one rounding sends a token elsewhere)
sums     microseconds of a sum over ranks in a graph, by NCCL and by reading each other's memory
speed    Scout's shapes with `layers` layers, random bfloat16 weights, on one GPU and on N, beside the floor: bytes a rank must read over the rate its
         card copies, and 2 sums a layer and one for the embedding. --skip-one: not on one GPU, where a whole model may not fit
Starts its own ranks (torch.distributed.run), or is one of torchrun's. With an empty kernel cache tokens and logits compile for minutes: each line
comes, and is in OUT, as soon as it is known; with --seconds no engine is begun in a part that has taken so long already; what OUT has is not measured
again. --device cpu: tokens and logits of processes over gloo.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
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

from l4core.engine.start.build import build_engine
from l4core.parallel.ranks import ALONE, Ranks
from l4core.testing.models.checkpoints import make_tiny_checkpoint
from l4core.testing.models.eagle3 import make_tiny_draft
from l4core.testing.ranks.serving import Served, mixed_requests, rank_config_of, serve, serve_with

sys.path.append(Path(__file__).resolve().parents[1].as_posix())
from where import where

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
VARIANTS = ("graphs", "eager", "ep", "EAGLE3", "fp8")
LOGITS = 1.5
SUMS_OF = (1, 8, 32, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, help="default: all GPUs here")
    parser.add_argument("--parts", default="tokens,logits,sums,speed")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="of tokens")
    parser.add_argument("--requests", type=int, default=64, help="of tokens")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="in each part, after which no engine is begun"
    )
    parser.add_argument("--skip-one", action="store_true", help="speed on the ranks only")
    parser.add_argument("--sums", default="nccl", help="how speed adds up over ranks: nccl, direct, or both")
    parser.add_argument("--ep", default="1", help="how speed deals out experts: 1, 2, …, or several")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batches", default="1,8,32,128")
    parser.add_argument("--prefills", default="8x2048")
    parser.add_argument("--json", type=Path, help="written after every line; what it has is not measured again")
    args = parser.parse_args()
    if unknown := set(args.variants.split(",")) - set(VARIANTS):
        parser.error(f"--variants names {', '.join(sorted(unknown))}; there are {', '.join(VARIANTS)}")
    if args.device == "cpu" and (gpu := set(args.parts.split(",")) - {"tokens", "logits"}):
        parser.error(f"--parts {', '.join(sorted(gpu))}: on a CPU there are tokens and logits")
    if "RANK" not in os.environ:
        ranks = args.ranks or (torch.accelerator.device_count() if args.device == "cuda" else 2)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        os.execv(sys.executable, [*launch, *sys.argv])
    device = torch.device("cpu")
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
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
        self.began = self.part_began = time.perf_counter()
        self.found: dict[str, Any] = {**where(device.type), "ranks": self.ranks.size}
        if device.type == "cuda":
            self.found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        if args.json and args.json.is_file():
            self.found = json.loads(args.json.read_text()) | self.found

    def all(self) -> None:
        for part in self.args.parts.split(","):
            self.part_began = time.perf_counter()
            getattr(self, part)()
            self.say(part, f"{time.perf_counter() - self.part_began:.0f} s")

    def is_wanted(self, name: str) -> bool:
        """Whether what will be noted as `name` is still unknown and there is time for it: the first rank's answer on all."""
        is_late = time.perf_counter() - self.part_began > self.args.seconds
        if is_late and name not in self.found:
            self.say(name, f"not begun after {self.args.seconds:.0f} s")
        answer = [name not in self.found and not is_late]
        dist.broadcast_object_list(answer, src=0, group=self.control)
        return answer[0]

    def note(self, name: str, value: Any) -> None:
        """Kept at once: whatever comes later, this was measured."""
        if not self.is_first:
            return
        self.found[name] = value
        self.say(name, value)
        if self.args.json:
            self.args.json.write_text(json.dumps(self.found, indent=1) + "\n")

    def say(self, name: str, value: Any) -> None:
        if self.is_first:
            print(f"{name:<34}{value}", flush=True)

    def by_one(self, call: Callable[[], Any]) -> Any:
        """What the first rank's GPU gives alone, while the others wait."""
        made = [call() if self.is_first else None]
        self.free()
        dist.broadcast_object_list(made, src=0, group=self.control)
        return made[0]

    def free(self) -> None:
        """The memory of engines that are no longer used."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

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

    def options(self, **own: Any) -> dict[str, Any]:
        """Of an engine of the small model."""
        return {
            "device": self.device.type,
            "attention_backend": "triton" if self.device.type == "cuda" else "sdpa",
            **own,
        }

    def tokens(self) -> None:
        requests = mixed_requests(self.args.requests, vocab=SMALL["vocab"], max_tokens=24)
        alone: dict[str, Served] = {}

        def answers(name: str, path: Path, ranks: Ranks, own: dict[str, Any]) -> Served:
            options = self.options(cuda_graph_max_bs=16, **own)
            built = build_engine(rank_config_of(path, ranks, **options), ranks=ranks, progress=False)
            self.say(f"{name}, ready", f"{time.perf_counter() - self.part_began:.0f} s")
            return serve_with(built, requests, ranks, keep=False)

        with self.small() as path:
            for name in self.args.variants.split(","):
                if not self.is_wanted(f"tokens, {name}"):
                    continue
                weights = {"quantization": "fp8"} if name == "fp8" else {}
                one = f"one GPU {weights or ''}".strip()
                if one not in alone:
                    alone[one] = self.by_one(lambda one=one, own=weights: answers(one, path, ALONE, own))
                served = answers(name, path, self.ranks, weights | self.variant(name, path))
                self.free()
                equal = sum(served.tokens[i] == alone[one].tokens[i] for i in alone[one].tokens)
                self.note(f"tokens, {name}", f"{equal} of {len(requests)} equal")
                every = [None] * self.ranks.size
                dist.all_gather_object(every, served.tokens, group=self.control)
                assert all(tokens == served.tokens for tokens in every), "ranks disagree"
                assert not served.errors, served.errors

    def variant(self, name: str, path: Path) -> dict[str, Any]:
        """Options that one rank does without."""
        return {
            "eager": {"disable_cuda_graph": True},
            "ep": {"ep": self.ranks.size},
            "EAGLE3": {
                "speculative_algorithm": "EAGLE3",
                "speculative_draft_model_path": str(path / "draft"),
            },
        }.get(name, {})

    def logits(self) -> None:
        name = "bf16 logits, median of a row's max |Δ|"
        if not self.is_wanted(name):
            return
        requests = mixed_requests(16, vocab=SMALL["vocab"], max_tokens=1)
        options = self.options(disable_cuda_graph=True)
        with self.small() as path:
            exact: Served = self.by_one(lambda: serve(path, requests, ALONE, **options))
            self.say("float32 on one", f"{time.perf_counter() - self.part_began:.0f} s")
            one: Served = self.by_one(lambda: serve(path, requests, ALONE, dtype="bfloat16", **options))
            self.say("bfloat16 on one", f"{time.perf_counter() - self.part_began:.0f} s")
            many = serve(path, requests, self.ranks, dtype="bfloat16", **options)
        errors = {}
        for kind, served in (("one", one), ("ranks", many)):
            apart = torch.stack([(served.logits[key] - row).abs().amax() for key, row in exact.logits.items()])
            errors[kind] = float(apart.median())
        self.note(name, errors)
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
        self.note("layers", self.args.layers)
        self.free()

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

        alone = None if self.args.skip_one else self.by_one(lambda: measure("1 GPU", ALONE))
        ways = [(kind, ep) for kind in self.args.sums.split(",") for ep in self.args.ep.split(",")]
        for kind, ep in ways:
            ranks = self.ranks if kind == "nccl" else self.direct()
            if ranks is None:
                continue
            way = kind if ep == "1" else f"{kind}, ep {ep}"
            many = measure(f"{self.ranks.size} GPUs, {way}", ranks, ep)
            self.free()
            for number, row in enumerate(many):
                tokens = math.prod(map(int, row["what"].split()[1].split("x")))
                x = torch.zeros(tokens, 5120, dtype=torch.bfloat16, device=self.device)
                sums = (2 * self.args.layers + 1) * graph_us(lambda x=x, ranks=ranks: ranks.all_reduce(x)) / 1e3
                floor = row["bytes_ms"] + sums
                told = {"ms": row["ms"], "floor_ms": floor, "of_it_sums_ms": sums, "over_floor": row["ms"] / floor}
                if alone is not None:
                    one_ms = alone[number]["ms"]
                    told |= {"one_gpu_ms": one_ms, "efficiency": one_ms / row["ms"] / self.ranks.size}
                self.note(f"{way}: {row['what']}", {key: round(value, 3) for key, value in told.items()})


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
