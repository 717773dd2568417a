"""The model's small operations at Scout's shapes, against the bytes they move, and the kernels of a decode step counted by the profiler.

python benchmarks/gpu/ops.py OUT.json [--bandwidth 4.3e12] [--only ops|count]
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import Call, graph_us

from l4core.config import from_mapping
from l4core.engine.inbox import Inbox
from l4core.engine.start.build import build_engine
from l4core.model.config import ModelConfig
from l4core.ops.heads import HeadRule
from l4core.ops.heads_triton import TritonHeads
from l4core.ops.linear import linear
from l4core.ops.norm import add_rms_norm_torch
from l4core.ops.norm_triton import add_rms_norm_triton
from l4core.ops.silu_mul import silu_mul_torch
from l4core.ops.silu_mul_triton import silu_mul_triton
from l4core.plugin_api import KVView
from l4core.request import Request, SamplingParams

sys.path.append(Path(__file__).resolve().parents[1].as_posix())
from where import where

HIDDEN, HEADS, KV_HEADS, DIM, INTER, CHUNK, PAGE = 5120, 40, 8, 128, 8192, 8192, 64
TOKENS = (1, 8, 32, 128, 2048, 16384)
COLD = 256 << 20
"""Bytes a graph goes through before it comes back to the same inputs."""
PRESETS = Path(__file__).parents[2] / "core/l4core/model/presets"


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def copies(num_bytes: int) -> int:
    return max(2, min(64, COLD // num_bytes + 1))


def norm_calls(tokens: int) -> tuple[int, list[Call], list[Call]]:
    weight, size = randn(HIDDEN), 4 * 2 * tokens * HIDDEN
    pairs = [(randn(tokens, HIDDEN), randn(tokens, HIDDEN)) for _ in range(copies(size))]

    def using(op: Callable[..., object]) -> list[Call]:
        return [lambda a=a, b=b: op(a, b, weight, 1e-5) for a, b in pairs]

    return size, using(add_rms_norm_triton), using(add_rms_norm_torch)


def silu_calls(tokens: int) -> tuple[int, list[Call], list[Call]]:
    size = 3 * 2 * tokens * INTER
    inputs = [randn(tokens, 2 * INTER) for _ in range(copies(size))]
    return size, [lambda x=x: silu_mul_triton(x) for x in inputs], [lambda x=x: silu_mul_torch(x) for x in inputs]


def heads_calls(tokens: int, *, fp8: bool = False) -> tuple[int, list[Call], list[Call]]:
    """Keys and values go to random slots of a memory of as many pages as they need, and some."""
    size = 2 * 2 * tokens * (HEADS + 2 * KV_HEADS) * DIM
    rule = HeadRule(num_q_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, rope=True, chunked=True, qk_norm_eps=1e-5)
    dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
    num_pages = tokens // PAGE + 8
    memory = torch.zeros(num_pages, 2, PAGE, KV_HEADS, DIM, device="cuda", dtype=dtype)
    view = KVView(k=memory[:, 0], v=memory[:, 1])
    slots = torch.randperm(num_pages * PAGE, device="cuda")[:tokens]
    heads = TritonHeads(
        positions=torch.randint(0, 100_000, (tokens,), device="cuda"),
        slots={"local": slots},
        tables={True: torch.randn(CHUNK, DIM // 2, 2, device="cuda")},
        temperature=None,
    )
    inputs = [randn(tokens, (HEADS + 2 * KV_HEADS) * DIM) for _ in range(copies(size))]
    return size, [lambda x=x: heads(x, rule, "local", memory, view) for x in inputs], []


def ops(bandwidth: float) -> Iterator[dict[str, Any]]:
    makers = {
        "add + norm": norm_calls,
        "rope to KV": heads_calls,
        "rope to fp8 KV": lambda tokens: heads_calls(tokens, fp8=True),
        "SwiGLU": silu_calls,
    }
    for name, maker in makers.items():
        for tokens in TOKENS:
            size, ours, twin = maker(tokens)
            row = {"op": name, "tokens": tokens, "floor_us": size / bandwidth * 1e6, "us": graph_us(ours)}
            row |= {"torch_us": graph_us(twin)} if twin else {}
            yield {key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()}


def products(bandwidth: float) -> Iterator[dict[str, Any]]:
    """The model's dense products of few rows, as it calls them, against torch's."""
    shapes = {"qkv": (7168, HIDDEN), "o": (HIDDEN, HIDDEN), "lm_head": (202048, HIDDEN)}
    for name, (num_out, depth) in shapes.items():
        weights = [randn(num_out, depth) for _ in range(2 + COLD // (2 * num_out * depth))]
        floor = round(2 * num_out * depth / bandwidth * 1e6, 2)
        for tokens in TOKENS[:4]:
            x = randn(tokens, depth)
            yield {"op": name, "tokens": tokens, "floor_us": floor} | {
                key: product_us(op, x, weights) for key, op in (("us", linear), ("torch_us", F.linear))
            }


def product_us(op: Callable[..., torch.Tensor], x: torch.Tensor, weights: list[torch.Tensor]) -> float:
    return round(graph_us([lambda w=w: op(x, w) for w in weights * 2]), 2)


def attention_side(layers: int = 8) -> Iterator[dict[str, Any]]:
    """A layer's norm, qkv, heads, o and norm in a row, without attention; the products by torch and by `linear`. error: of the stream behind."""
    weights = [(randn(7168, HIDDEN) / 70, randn(HIDDEN, HIDDEN) / 70) for _ in range(layers)]
    for tokens in TOKENS[:4]:
        first = randn(tokens, HIDDEN)
        torch_us, wanted = side_us(F.linear, first, weights)
        us, found = side_us(linear, first, weights)
        error = ((found - wanted).norm() / wanted.norm()).item()
        row = {"us": us, "torch_us": torch_us, "error": error}
        yield {"op": "norm, qkv, heads, o, norm", "tokens": tokens} | {key: round(x, 4) for key, x in row.items()}


def side_us(
    product: Callable[..., torch.Tensor], first: torch.Tensor, weights: list[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[float, torch.Tensor]:
    """µs a layer, and the residual stream [T, H] after all of them."""
    place = torch.arange(first.shape[0], device="cuda")
    norm, table = torch.ones_like(first[0]), torch.randn(CHUNK, DIM // 2, 2, device="cuda")
    memory = torch.zeros(8, 2, PAGE, KV_HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    view = KVView(k=memory[:, 0], v=memory[:, 1])
    rule = HeadRule(num_q_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, rope=False, chunked=True, qk_norm_eps=1e-5)
    heads = TritonHeads(positions=place, slots={"local": place}, tables={True: table}, temperature=None)
    state: list[torch.Tensor] = []

    def start() -> None:
        state[:] = [first.clone(), first]

    def layer(qkv: torch.Tensor, o: torch.Tensor) -> None:
        normed = add_rms_norm_triton(state[0], state[1], norm, 1e-5)
        q = heads(product(normed, qkv), rule, "local", memory, view)
        state[1] = add_rms_norm_triton(state[0], product(q.reshape(first.shape[0], -1), o), norm, 1e-5)

    us = graph_us([lambda w=w: layer(*w) for w in weights], once=start, every=len(weights))
    return us, state[0].float()


def scout(layers: int, **changes: object) -> ModelConfig:
    raw = json.loads((PRESETS / "scout.json").read_text())
    raw["text_config"] |= {"num_hidden_layers": layers, **changes}
    return ModelConfig.from_dict(raw)


def count(layers: int, batch: int, **options: object) -> collections.Counter[str]:
    """Kernels of one decode step of so many layers, by name; sampling included."""
    given = {"model": "scout", "load_format": "dummy", "max_running_requests": 8, "max_total_tokens": 16384, **options}
    narrow = scout(layers, vocab_size=8192, intermediate_size=1024)  # the count does not hang on it
    engine = build_engine(from_mapping(given)[0], progress=False, model_config=narrow).engine
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True, seed=0)
    requests = [
        Request(request_id=str(i), prompt_token_ids=[5 + i] * 40, params=params, eos_token_ids=(), max_total_tokens=200)
        for i in range(batch)
    ]
    engine.step(Inbox(requests=requests))
    for _ in range(6):
        engine.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        engine.step()
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return collections.Counter(event.name[:90] for event in events)


def kernels_a_layer(batch: int, **options: object) -> dict[str, float]:
    """Difference of eight layers and four: six local ones and two global, less three and one."""
    few, many = count(4, batch, **options), count(8, batch, **options)
    names = {name: (many[name] - few[name]) / 4 for name in many if many[name] != few[name]}
    return {"all": sum(names.values()), **dict(sorted(names.items(), key=lambda item: -item[1]))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bandwidth", type=float, default=4.3e12)
    parser.add_argument("--only", choices=["ops", "count"])
    args = parser.parse_args()
    record: dict[str, Any] = where()
    began = time.perf_counter()
    if args.only != "count":
        rows = record["ops"] = []
        for row in chain(products(args.bandwidth), attention_side(), ops(args.bandwidth)):
            rows.append(row)
            print(row, flush=True)
    if args.only != "ops":
        for batch in (1, 8):
            record[f"kernels_a_layer_bs{batch}"] = kernels_a_layer(batch)
            print(json.dumps(record[f"kernels_a_layer_bs{batch}"], indent=1), flush=True)
    record["seconds"] = round(time.perf_counter() - began, 1)
    args.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
