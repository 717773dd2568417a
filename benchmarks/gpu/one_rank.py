"""One rank of N of a released model as an engine by itself: its shapes, dummy weights, no sums over ranks. For times and memory, not for answers."""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from l4core.config import EngineConfig
from l4core.engine.inbox import Inbox
from l4core.engine.start import graph_sizes
from l4core.engine.start.build import BuiltEngine, build_engine
from l4core.engine.start.capacity import load_config
from l4core.kv.memory import KVMemory
from l4core.model.batch import ForwardBatch
from l4core.model.config import ModelConfig
from l4core.model.layout import parameters
from l4core.model.slicing import rank_config
from l4core.request import Request, SamplingParams


def shapes(model: str, ranks: int, layers: int | None = None) -> ModelConfig:
    """The rank's config, cut to its first `layers` layers if given (a multiple of 4 keeps three local layers for one global)."""
    config = rank_config(load_config(model), ranks)
    if layers is None:
        return config
    cut = {name: getattr(config, name)[:layers] for name in ("moe_layers", "rope_layers", "chunked_layers")}
    return dataclasses.replace(config, num_layers=layers, **cut)


def build(config: ModelConfig, *, graph_batches: Sequence[int], **options: object) -> BuiltEngine:
    """An engine of these shapes. graph_batches: the only batches that are captured, to start sooner.  options: fields of EngineConfig."""
    graph_sizes.batch_sizes = lambda largest: [n for n in graph_batches if n <= largest]
    engine_config = EngineConfig(model="rank", load_format="dummy", dtype="bfloat16", **options)  # type: ignore[arg-type]
    return build_engine(engine_config, progress=False, model_config=config)


def requests(name: str, count: int, tokens: int, vocab: int, limit: int) -> list[Request]:
    """`count` greedy requests of `tokens` random tokens that never end by themselves. limit: prompt + answer of one."""
    rng = random.Random(f"{name} {count} {tokens}")
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True, seed=0)
    return [
        Request(
            request_id=f"{name}-{i}",
            prompt_token_ids=rng.choices(range(vocab), k=tokens),
            params=params,
            eos_token_ids=(),
            max_total_tokens=limit,
        )
        for i in range(count)
    ]


def randomise(memory: KVMemory) -> None:
    """Finite random keys and values everywhere, the same megabytes again and again."""
    flat = memory._units.view(-1)
    block = torch.randn(min(flat.numel(), 1 << 27), device=flat.device, dtype=torch.bfloat16).to(flat.dtype)
    for part in flat.split(block.numel()):
        part.copy_(block[: part.numel()])


@contextmanager
def without_computing(built: BuiltEngine) -> Iterator[None]:
    """Inside, a step does everything but the model: pages are given out and tables written, and keys and values stay as they are."""
    model, hidden_size = built.engine.runner.model, built.model_config.hidden_size
    dtype = next(model.parameters()).dtype

    def nothing(batch: ForwardBatch, *_: object) -> torch.Tensor:
        return torch.zeros(len(batch.token_ids), hidden_size, dtype=dtype, device=batch.token_ids.device)

    model.forward = nothing  # type: ignore[assignment]
    try:
        yield
    finally:
        del model.forward


def admit(built: BuiltEngine, wanted: Sequence[Request]) -> int:
    """Steps until every request of `wanted` has drawn its first token → how many steps that took. RuntimeError when one ends instead."""
    waiting, steps, inbox = {r.request_id for r in wanted}, 0, Inbox(requests=wanted)
    while waiting:
        for update in built.engine.step(inbox).updates:
            if update.finish_reason is not None:
                raise RuntimeError(f"{update.request_id} ended: {update.finish_reason} {update.error}")
            waiting.discard(update.request_id)
        inbox, steps = Inbox(), steps + 1
    return steps


def step_ms(built: BuiltEngine, steps: int) -> float:
    """Wall milliseconds of a step, over `steps` in a row."""
    torch.accelerator.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        built.engine.step()
    torch.accelerator.synchronize()
    return (time.perf_counter() - began) / steps * 1e3


def kernel_ms(built: BuiltEngine, steps: int, top: int = 12) -> tuple[float, dict[str, float]]:
    """Milliseconds of all kernels of a step, and of those that take most, by name; the host's gaps are not in them."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            built.engine.step()
        torch.accelerator.synchronize()
    times = {e.key[:60]: e.self_device_time_total / steps / 1e3 for e in found.key_averages()}
    ranked = sorted(times, key=times.__getitem__, reverse=True)[:top]
    return sum(times.values()), {name: round(times[name], 4) for name in ranked}


def weight_bytes_read(config: ModelConfig, tokens: int, itemsize: int = 2) -> int:
    """Bytes of weights that one step of `tokens` tokens has to read when their experts are drawn evenly: all but the embedding and idle experts."""
    share = 1 - (1 - 1 / config.num_experts) ** tokens
    size = 0.0
    for parameter in parameters(config, ()):
        if parameter.name != "embed.weight":
            size += math.prod(parameter.shape) * (share if ".experts." in parameter.name else 1)
    return int(size * itemsize)


def kv_bytes_read(config: ModelConfig, lengths: Sequence[int], itemsize: int) -> int:
    """Bytes of keys and values that a decode of sequences of these lengths has to read."""
    per_layer = 2 * config.num_kv_heads * config.head_dim * itemsize
    chunk, local = config.attention_chunk_size or 0, sum(config.chunked_layers)
    layer_tokens = sum((config.num_layers - local) * n + local * ((n - 1) % chunk + 1 if chunk else 0) for n in lengths)
    return per_layer * layer_tokens


def copy_rate(gib: int = 4) -> float:
    """Bytes a second, read and written, of a large copy on this device."""
    source = torch.empty(gib << 29, dtype=torch.bfloat16, device=torch.accelerator.current_accelerator())
    target = torch.empty_like(source)
    times = []
    for _ in range(6):
        torch.accelerator.synchronize()
        began = time.perf_counter()
        for _ in range(4):
            target.copy_(source)
        torch.accelerator.synchronize()
        times.append((time.perf_counter() - began) / 4)
    return 2 * source.numel() * source.itemsize / min(times)
