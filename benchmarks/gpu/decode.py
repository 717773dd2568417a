"""A decode step and a prefill of Scout's text shape through the real engine, beside the floor: what must be read, at the rate the card copies.

    python benchmarks/gpu/decode.py [--layers 8] [--batches 1,8,32,128] [--contexts 1024] [--prefills 8x2048,1x2048] [--json OUT] [--profile]
                                    [--temperature 1] [--top-p 1] [--top-k 0] [ENGINE OPTION=VALUE …]

bfloat16, weights random. Every time is that of `Engine.step` on the host's clock, ids on the host included. Contexts beyond 4,096 tokens are not
computed: the scheduler fills its pages as for a prompt, and the keys and values are noise. The experts that a step hits are counted in a step of
its own, outside the timing; the floor counts those, not all.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

import l4core.engine.start.build as build
import l4core.engine.start.resolve as resolve
from l4core import EngineConfig, SamplingParams
from l4core.bench.floor import decode_bytes, prefill_floor_ms, weights_by_config
from l4core.engine.engine import Engine
from l4core.engine.inbox import Inbox
from l4core.engine.start.graph_sizes import GraphSizes
from l4core.model.slicing import rank_config
from l4core.parallel.ranks import ALONE, Ranks
from l4core.request import Request

sys.path.append(Path(__file__).resolve().parents[1].as_posix())
from where import where

COMPUTED_CONTEXT = 4096
"""Longer contexts are noise: a prefill of 32 × 128k tokens would take minutes."""
WARMUP, STEPS = 8, 48
GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Of this card, now. copy: bytes read and written a second.  matmul: floating-point operations a second, bfloat16, 8192³."""

    copy: float
    matmul: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batches", default="1,8,32,128")
    parser.add_argument("--contexts", default="1024")
    parser.add_argument("--prefills", default="8x2048,1x2048")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0, help="drawn outside the graph")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("options", nargs="*", help="engine options, as LLM() takes them")
    args = parser.parse_args()
    rates = measure_rates()
    began = time.perf_counter()
    batches = [int(text) for text in args.batches.split(",")]
    options = dict(option.split("=", 1) for option in args.options)
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    bench = Bench(args.layers, batches, options, sampling)
    results: dict[str, Any] = {
        **where(),
        "copy_tb_s": rates.copy / 1e12,
        "matmul_tflop_s": rates.matmul / 1e12,
        "ready_s": time.perf_counter() - began,
        "rows": [],
    }
    print(*bench.report, f"{'ready':<16}{results['ready_s']:.1f} s", sep="\n")
    print(f"copy {rates.copy / 1e12:.2f} TB/s, bf16 product {rates.matmul / 1e12:.0f} TFLOP/s\n")
    print(f"{'':<26}{'ms':>9}{'floor':>9}{'ratio':>7}{'experts':>9}", flush=True)

    def note(name: str, ms: float, floor: float, experts: float) -> None:
        """Kept at once: whatever comes later, this was measured."""
        results["rows"].append({"name": name, "ms": ms, "floor_ms": floor, "ratio": ms / floor, "experts": experts})
        results["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{name:<26}{ms:9.3f}{floor:9.3f}{ms / floor:7.3f}{experts:9.2f}", flush=True)

    for context in map(int, args.contexts.split(",")):
        for batch in batches:
            note(f"decode bs {batch} at {context}", *bench.decode(batch, context, rates, profile=args.profile))
    for text in filter(None, args.prefills.split(",")):
        batch, length = map(int, text.split("x"))
        note(f"prefill {text}", *bench.prefill(batch, length, rates, profile=args.profile))


class Bench:
    """One engine, and what its steps cost. report: its start-up block."""

    def __init__(
        self,
        layers: int,
        batches: Sequence[int],
        options: Mapping[str, str],
        sampling: Mapping[str, Any],
        ranks: Ranks = ALONE,
    ) -> None:
        """ranks: of which all make the same calls; floors are then those of one of them, without their sums."""
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(scout(layers)))
            with _weights_on_the_device(), _graphs_of(batches):
                built = build.build_engine(_config(folder, options, ranks), ranks=ranks, progress=False)
        self.engine: Engine = built.engine
        self.report = built.report
        self.config = rank_config(built.model_config, ranks.size)
        self._weights = weights_by_config(self.config)
        self._random = random.Random(0)
        self._names = iter(range(1 << 30))
        self._is_noise = False
        self._sampling = sampling

    def decode(self, batch: int, context: int, rates: Rates, *, profile: bool) -> tuple[float, float, float]:
        """→ (ms a step, floor in ms, distinct experts a layer) with `batch` requests of `context` tokens and growing."""
        self._admit(batch, context, WARMUP + STEPS + 8)
        for _ in range(WARMUP):
            self.engine.step()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(STEPS):
            self.engine.step()
        torch.cuda.synchronize()
        ms = (time.perf_counter() - began) / STEPS * 1e3
        if profile:
            self._profile(f"decode bs {batch} at {context}")
        experts = self._count_experts()
        self._clear()
        return ms, self.decode_bytes(batch, context, experts) / rates.copy * 1e3, experts

    def prefill(self, batch: int, length: int, rates: Rates, *, profile: bool) -> tuple[float, float, float]:
        """→ (ms until every request has its first token: best of four, floor, distinct experts a layer)."""
        times = []
        for _ in range(4):
            requests = self._requests(batch, length, 1)
            torch.cuda.synchronize()
            if dist.is_initialized():
                dist.barrier()  # each rank has made its own prompts, some sooner
            began = time.perf_counter()
            self._run_prompts(requests)
            times.append((time.perf_counter() - began) * 1e3)
        if profile:
            requests = self._requests(batch, length, 1)
            with _profiler(f"prefill {batch}x{length}", 1):
                self._run_prompts(requests)
        floor_ms = prefill_floor_ms(
            self.config, self._weights, batch=batch, length=length, copy=rates.copy, matmul=rates.matmul
        )
        return min(times), floor_ms, float(self.config.num_experts or 0)

    def decode_bytes(self, batch: int, context: int, experts: float) -> float:
        """That a step must read which hits so many experts a layer."""
        return decode_bytes(self.config, self._weights, batch=batch, context=context, experts=experts)

    # --- requests ----------------------------------------------------------------------------------------------------------------------

    def _requests(self, batch: int, length: int, new: int) -> list[Request]:
        return [
            Request(
                request_id=str(next(self._names)),
                prompt_token_ids=[self._random.randrange(200_000) for _ in range(length)],
                params=SamplingParams(seed=i, max_tokens=new, ignore_eos=True, **self._sampling),
                eos_token_ids=(),
                max_total_tokens=length + new,
            )
            for i in range(batch)
        ]

    def _run_prompts(self, requests: list[Request]) -> None:
        """Step until every one of the requests has a token."""
        waiting = {r.request_id for r in requests}
        inbox = Inbox(requests=requests)
        while waiting:
            output = self.engine.step(inbox)
            inbox = Inbox()
            for update in output.updates:
                assert not update.error, update.error
                if update.new_token_ids:
                    waiting.discard(update.request_id)

    def _admit(self, batch: int, context: int, new: int) -> None:
        requests = self._requests(batch, context, new)
        if context <= COMPUTED_CONTEXT:
            self._run_prompts(requests)
            return
        with self._nothing_computed():
            self._run_prompts(requests)

    @contextmanager
    def _nothing_computed(self) -> Iterator[None]:
        """Prompts take their pages and cost nothing; keys and values are noise."""
        runner: Any = self.engine.runner
        model, units = runner.model, runner.memory._units
        if not self._is_noise:
            for piece in units.split(GIB // units[0].numel()):
                piece.normal_()
            self._is_noise = True
        model.forward = lambda batch, *_: torch.zeros(
            batch.token_ids.shape[0], self.config.hidden_size, dtype=torch.bfloat16, device=units.device
        )
        try:
            yield
        finally:
            del model.forward

    def _clear(self) -> None:
        self.engine.abort([seq.request.request_id for seq in self.engine.scheduler.sequences])
        while self.engine.has_work:
            self.engine.step()
        self.engine.step(Inbox(flush_cache=True))

    # --- what a step hits and reads ----------------------------------------------------------------------------------------------------

    def _count_experts(self) -> float:
        """Distinct experts that one more step hits, the mean of all layers that have any."""
        found: list[torch.Tensor] = []

        def note(moe: Any, given: tuple[Any, ...]) -> None:
            found.append(F.linear(given[0], moe.router.weight).argmax(-1))

        runner: Any = self.engine.runner
        graphs, runner.graphs = getattr(runner, "graphs", None), None  # a replay calls no hook
        hooks = [m.register_forward_pre_hook(note) for name, m in runner.model.named_modules() if name.endswith(".moe")]
        self.engine.step()
        for hook in hooks:
            hook.remove()
        runner.graphs = graphs
        return statistics.fmean(len(ids.unique()) for ids in found) if found else 0.0

    def _profile(self, name: str) -> None:
        with _profiler(name, 3):
            for _ in range(3):
                self.engine.step()


@contextmanager
def _profiler(name: str, steps: int) -> Iterator[None]:
    """Prints what each kernel takes of a step, the longest first, and how long the device was busy."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        yield
        torch.cuda.synchronize()
    kernels = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    times: dict[str, list[float]] = {}
    for event in kernels:
        times.setdefault(event.name, []).append(event.device_time)
    ranked = sorted(times.items(), key=lambda item: -sum(item[1]))
    span = max(e.time_range.end for e in kernels) - min(e.time_range.start for e in kernels)
    busy = sum(map(sum, times.values()))
    print(
        f"--- {name}: busy {busy / steps / 1e3:.3f} ms of {span / steps / 1e3:.3f}, {len(kernels) / steps:.0f} kernels"
    )
    for kernel, each in ranked[:16]:
        print(
            f"    {sum(each) / steps:9.1f} µs {len(each) / steps:6.1f} × {statistics.median(each):8.2f}  {kernel[:90]}"
        )


def scout(layers: int) -> dict[str, Any]:
    """config.json of the text half with fewer layers."""
    raw: dict[str, Any] = json.loads((files("l4core.model") / "presets" / "scout.json").read_text())
    text = raw["text_config"] | {"num_hidden_layers": layers, "torch_dtype": "bfloat16"}
    return {**text, "architectures": ["Llama4ForCausalLM"]}


def _config(folder: str, options: Mapping[str, str], ranks: Ranks) -> EngineConfig:
    from l4core.config import from_mapping

    given: dict[str, Any] = {"max_running_requests": 128, "chunked_prefill_size": 16384, "load_format": "dummy"}
    given |= {
        name: json.loads(text) if text[:1].isdigit() or text in ("true", "false") else text
        for name, text in options.items()
    }
    return from_mapping({"model": folder, "tp": ranks.size, **given})[0]


@contextmanager
def _weights_on_the_device() -> Iterator[None]:
    """Weights as the benchmark of vLLM draws them: on the device, which takes a second; the engine's own are the same on every device."""
    own = build.fill_dummy

    def fill(parameters: Mapping[str, torch.Tensor], seed: int, rank: int = 0) -> None:
        own = torch.Generator(device="cuda").manual_seed(1 + seed + (rank << 32))
        common = torch.Generator(device="cuda").manual_seed(seed)
        for name, parameter in parameters.items():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0, 0.02, generator=common if name.endswith("router.weight") else own)

    build.fill_dummy = fill
    try:
        yield
    finally:
        build.fill_dummy = own


@contextmanager
def _graphs_of(batches: Sequence[int]) -> Iterator[None]:
    """Graphs of the batches that are measured, and no others: start-up is not what is timed here."""
    own = resolve.graph_sizes

    def only(*args: Any, **kwargs: Any) -> GraphSizes:
        found = own(*args, **kwargs)
        return GraphSizes(sizes=sorted(batches)) if found.sizes else found

    resolve.graph_sizes = only
    try:
        yield
    finally:
        resolve.graph_sizes = own


def measure_rates() -> Rates:
    source = torch.empty(2 * GIB, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return Rates(
        copy=2 * source.numel() / _seconds(lambda: target.copy_(source)), matmul=2 * 8192**3 / _seconds(lambda: a @ b)
    )


def _seconds(call: Any) -> float:
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[2:])


if __name__ == "__main__":
    main()
