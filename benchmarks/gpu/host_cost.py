"""What the host does in a step: one layer, hidden 256, vocabulary 1,000, 256 running requests, so that the device has next to nothing to do.

    python benchmarks/gpu/host_cost.py [--requests 256] [--json OUT] [--profile OUT.txt] [ENGINE OPTION=VALUE …]

For the simple loop and the overlapped one: ms a step, of its parts, how much of it the host waited for the device. The bar is 1.0 ms in the simple
loop. `mixed`: the simple loop with a prompt of 64 tokens in every step, another request ending in each. `gc_ms`: the longest collection, of how many.
On a machine without an accelerator the same is measured with the forward pass and the draw left out: the host's share and nothing else.
--profile: where the host's time goes (cProfile, the simple loop), kept under benchmarks/results/.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import io
import json
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import l4core.engine.start.build as build
import l4core.engine.start.resolve as resolve
from l4core.config import from_mapping
from l4core.engine.engine import Engine
from l4core.engine.inbox import Inbox
from l4core.engine.run.draws import PendingDraws
from l4core.engine.run.fixed_step import Computed
from l4core.engine.start.graph_sizes import GraphSizes
from l4core.request import Request, SamplingParams

sys.path.append(Path(__file__).resolve().parents[1].as_posix())
from where import where

WARMUP, STEPS = 30, 300
PROMPT, LONGER_PROMPT = 8, 64
CONFIG = {
    "architectures": ["Llama4ForCausalLM"],
    "model_type": "llama4_text",
    "torch_dtype": "bfloat16",
    "attention_chunk_size": 8192,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "attn_scale": 0.1,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 256,
    "intermediate_size": 512,
    "intermediate_size_mlp": 512,
    "interleave_moe_layer_step": 1,
    "moe_layers": [],
    "max_position_embeddings": 8192,
    "no_rope_layers": [1],
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 1,
    "num_local_experts": 1,
    "num_hidden_layers": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "use_qk_norm": True,
    "vocab_size": 1000,
    "eos_token_id": [1],
}
"""Of the model: one layer and nothing in it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("options", nargs="*")
    args = parser.parse_args()
    on_device = torch.accelerator.is_available()
    engine = make_engine(dict(option.split("=", 1) for option in args.options), args.requests)
    results: dict[str, Any] = {
        **where(),
        "device_work": on_device,
        "requests": args.requests,
    }
    if not on_device:
        leave_the_device_out(engine)
    gc.collect()
    gc.freeze()  # as the engine's own process does
    for loop in ("simple", "overlapped") if on_device else ("simple",):
        set_loop(engine, loop)
        results[loop] = measure(engine, args.requests)
        print(f"{loop:<12}" + "  ".join(f"{name} {value:.3f}" for name, value in results[loop].items()), flush=True)
    set_loop(engine, "simple")
    results["mixed"] = measure(engine, args.requests, mixed=True)
    print(f"{'mixed':<12}" + "  ".join(f"{name} {value:.3f}" for name, value in results["mixed"].items()), flush=True)
    if args.profile:
        set_loop(engine, "simple")
        args.profile.write_text(profile(engine, args.requests))
        print(f"profile: {args.profile}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


def make_engine(options: dict[str, str], num_requests: int) -> Engine:
    given: dict[str, Any] = {
        "load_format": "dummy",
        "max_running_requests": num_requests + 2,
        "max_total_tokens": num_requests * 1024,
        "context_length": 4096,
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG))
        own, resolve.graph_sizes = resolve.graph_sizes, one_graph(num_requests)
        built = build.build_engine(from_mapping({"model": folder, **given, **options})[0], progress=False)
        resolve.graph_sizes = own
    print(*(line for line in built.report if line.startswith(("device", "attention", "graphs", "loop"))), sep="\n")
    return built.engine


def one_graph(size: int) -> Callable[..., GraphSizes]:
    """A graph of the batch that is measured, and no other: start-up is not what is timed here."""
    own = resolve.graph_sizes

    def only(*args: Any, **kwargs: Any) -> GraphSizes:
        found = own(*args, **kwargs)
        return GraphSizes(sizes=[size]) if found.sizes else found

    return only


def set_loop(engine: Engine, loop: str) -> None:
    assert not engine.has_work
    engine.overlap = loop == "overlapped"
    engine.scheduler.max_in_flight = 2 if engine.overlap else 1


class _Arrived:
    """A draw that needs no device: token 7 for every row."""

    def __init__(self, num_rows: int) -> None:
        self._rows = torch.from_numpy(np.full((2, num_rows), 7, dtype=np.int64))

    def wait(self) -> torch.Tensor:
        return self._rows


def leave_the_device_out(engine: Engine) -> None:
    """On a machine without an accelerator: the batch is built as for a graph, and everything after that costs nothing."""
    from l4core.engine.run.fixed_step import StepShape

    runner: Any = engine.runner
    steps: dict[int, Any] = {}

    class Always:
        def find(self, num_seqs: int, num_tokens: int) -> Any:
            if num_seqs not in steps:
                steps[num_seqs] = runner.fixed_step(StepShape(num_seqs, 1))
            return steps[num_seqs]

    runner.graphs = Always()
    runner.execute = lambda forward: Computed(hidden=torch.empty(0))

    def draw(batch: Any, forward: Any, computed: Any, parsed: Any) -> PendingDraws:
        rows = batch.columns.rows[batch.columns.num_draws > 0]
        positions = (batch.columns.starts + batch.columns.lengths)[batch.columns.num_draws > 0]
        plain = runner._params.are_plain(lambda i: batch.sequences[i].request, rows, positions, parsed)
        arrived: Any = _Arrived(len(rows))
        return PendingDraws(batch, plain=plain, positions=positions, drawn=arrived, others=None, prompt_logprobs={})

    runner.draw = draw


def measure(engine: Engine, num_requests: int, *, mixed: bool = False) -> dict[str, float]:
    """ms of a step, and in the median of its parts; `waited` is what of `wait` the host did nothing but wait for the device. core: of this process's
    own time, which other processes on the machine disturb less. mixed: a prompt comes with every step, and as many end."""
    start(engine, num_requests)
    times, core = [], []
    with timed(engine) as spent, collections() as paused:
        for number in range(STEPS):
            inbox = Inbox(requests=[request(f"late {number}", LONGER_PROMPT, 2, 301 + number)]) if mixed else Inbox()
            began, began_core = time.perf_counter(), time.thread_time()
            engine.step(inbox)
            times.append((time.perf_counter() - began) * 1e3)
            core.append((time.thread_time() - began_core) * 1e3)
    finish(engine)
    return {
        "ms a step": statistics.fmean(times),
        "median": statistics.median(times),
        "p99": sorted(times)[int(0.99 * len(times))],
        "core": statistics.median(core),
        "core p99": sorted(core)[int(0.99 * len(core))],
        "gc_ms": max(paused, default=0.0),
        "gc": len(paused),
        **{part: statistics.median(seconds or [0.0]) * 1e3 for part, seconds in spent.items()},
    }


@contextmanager
def collections() -> Iterator[list[float]]:
    """→ ms of this process's own time that each garbage collection takes while this lasts."""
    paused: list[float] = []
    began = 0.0

    def note(phase: str, info: dict[str, int]) -> None:
        nonlocal began
        if phase == "start":
            began = time.thread_time()
        else:
            paused.append((time.thread_time() - began) * 1e3)

    gc.callbacks.append(note)
    try:
        yield paused
    finally:
        gc.callbacks.remove(note)


@contextmanager
def timed(engine: Engine) -> Iterator[dict[str, list[float]]]:
    """→ seconds that each step spends in each of its parts, by its name, while this lasts."""
    runner, scheduler = engine.runner, engine.scheduler
    parts: list[tuple[Any, str]] = [(scheduler, "schedule"), (runner, "build"), (runner, "execute"), (runner, "draw")]
    parts += [(PendingDraws, "wait"), (scheduler, "commit")]
    spent: dict[str, list[float]] = {name: [] for name in (*(name for _, name in parts), "waited")}

    def wrap(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def one(*args: Any) -> Any:
            began = time.perf_counter()
            if name == "wait" and (event := getattr(args[0]._drawn, "_event", None)) is not None:
                event.synchronize()
                spent["waited"].append(time.perf_counter() - began)
            made = call(*args)
            spent[name].append(time.perf_counter() - began)
            return made

        return one

    own = [(owner, name, getattr(owner, name), name in vars(owner)) for owner, name in parts]
    for owner, name, call, _ in own:
        setattr(owner, name, wrap(call, name))
    try:
        yield spent
    finally:
        for owner, name, call, is_its_own in own:
            if is_its_own:
                setattr(owner, name, call)
            else:
                delattr(owner, name)


def profile(engine: Engine, num_requests: int) -> str:
    start(engine, num_requests)
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(STEPS):
        engine.step()
    profiler.disable()
    finish(engine)
    out = io.StringIO()
    out.write(f"{STEPS} steps of {num_requests} requests, simple loop; cProfile adds to every call\n")
    pstats.Stats(profiler, stream=out).strip_dirs().sort_stats("tottime").print_stats(30)
    return out.getvalue()


def start(engine: Engine, num_requests: int) -> None:
    """All requests decoding, and warm."""
    requests = [request(str(i), PROMPT, 2000, i) for i in range(num_requests)]
    engine.step(Inbox(requests=requests))
    for _ in range(WARMUP):
        engine.step()
    assert all(seq.is_decode for seq in engine.scheduler.sequences)


def request(request_id: str, prompt_len: int, max_tokens: int, number: int = 0) -> Request:
    """number: of the prompt; its parity says whether it is drawn with a temperature."""
    return Request(
        request_id=request_id,
        prompt_token_ids=[(number * 7 + j) % 1000 for j in range(prompt_len)],
        params=SamplingParams(temperature=number % 2 * 0.8, seed=number, max_tokens=max_tokens, ignore_eos=True),
        eos_token_ids=(),
        max_total_tokens=prompt_len + max_tokens,
    )


def finish(engine: Engine) -> None:
    engine.abort([seq.request.request_id for seq in engine.scheduler.sequences])
    while engine.has_work:
        engine.step()


if __name__ == "__main__":
    main()
