"""Scout's attention at the batch shapes that are measured, as tensors on the device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from l4core.attention.chunked import ring_width, single_chunk_metadata
from l4core.plugin_api import AttentionMetadata, ChunkInfo, KVView

NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM = 40, 8, 128
CHUNK = 8192
SCALE = HEAD_DIM**-0.5

POOL_BYTES = 24 << 30
"""Memory for one layer's keys and values. Longer batches share pages at random: too far apart in time for a cache to gain from it."""
COLD_BYTES = 256 << 20
"""Keys and values that one graph goes through at least, in as many memories as that takes: five times the cache of an H100."""
LAYERS = 12
"""Calls of one step: Scout has 12 global layers, and 36 local ones. A graph holds as many steps as it takes to go through COLD_BYTES."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """batch sequences of `context` tokens of which the last `queries` are asked. layer: "local" sees the context's last chunk only."""

    phase: Literal["decode", "prefill"]
    batch: int
    context: int
    queries: int
    layer: Literal["global", "local"]

    @property
    def name(self) -> str:
        size = f"{self.batch}×{self.context}" if self.phase == "prefill" else f"bs {self.batch}, context {self.context}"
        return f"{self.phase} {size}, {self.layer} layer"

    @property
    def keys(self) -> int:
        """Keys that the last query sees."""
        return (self.context - 1) % CHUNK + 1 if self.layer == "local" else self.context

    @property
    def flops(self) -> float:
        """Of the visible scores and their products with the values."""
        visible = self.queries * (self.keys - self.queries) + self.queries * (self.queries + 1) / 2
        return 4.0 * NUM_Q_HEADS * HEAD_DIM * self.batch * visible

    @property
    def kv_bytes(self) -> int:
        return 4 * NUM_KV_HEADS * HEAD_DIM * self.batch * self.keys


def decode(batch: int, context: int, layer: Literal["global", "local"]) -> Shape:
    return Shape(phase="decode", batch=batch, context=context, queries=1, layer=layer)


def prefill(batch: int, length: int, layer: Literal["global", "local"]) -> Shape:
    return Shape(phase="prefill", batch=batch, context=length, queries=length, layer=layer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """meta: of a backend without chunks; native: of one that takes the chunk size (the same as meta for a global layer).  layers: the memory of
    each call of a graph; large ones come more than once."""

    shape: Shape
    page_size: int
    q: torch.Tensor
    layers: list[KVView]
    meta: AttentionMetadata
    native: AttentionMetadata


def build(shape: Shape, page_size: int, dtype: torch.dtype = torch.bfloat16) -> Problem:
    """Pages in random order; a local layer has a ring of two chunks, as core keeps it. dtype: of keys and values, fp8 with scale 1."""
    columns = -(-shape.context // page_size)
    if shape.layer == "local":
        columns = min(columns, ring_width(CHUNK, page_size))
    page_bytes = 2 * page_size * NUM_KV_HEADS * HEAD_DIM * dtype.itemsize
    num_pages = min(shape.batch * columns, POOL_BYTES // page_bytes)
    memories = [_layer(num_pages, page_size, dtype) for _ in range(1 + COLD_BYTES // shape.kv_bytes)]
    calls = LAYERS * -(-len(memories) // LAYERS)
    layers = [memories[i % len(memories)] for i in range(calls)]
    order = torch.cat([torch.randperm(num_pages, device="cuda") for _ in range(-(-shape.batch * columns // num_pages))])
    table = order[: shape.batch * columns].int().view(shape.batch, columns)
    tokens = shape.batch * shape.queries
    packed = torch.randn(tokens, NUM_Q_HEADS + 2 * NUM_KV_HEADS, HEAD_DIM, device="cuda").bfloat16()
    meta = AttentionMetadata(
        cu_seqlens_q=torch.arange(shape.batch + 1, dtype=torch.int32, device="cuda") * shape.queries,
        seq_lens=torch.full((shape.batch,), shape.context, dtype=torch.int32, device="cuda"),
        block_table=table,
        max_seqlen_q=shape.queries,
        max_seqlen_k=shape.context,
        num_seqs=shape.batch,
        phase=shape.phase,
    )
    native = meta
    if shape.layer == "local":
        native = replace(meta, chunk=ChunkInfo(size=CHUNK))
        meta = single_chunk_metadata(meta, table, CHUNK, page_size)
    return Problem(shape=shape, page_size=page_size, q=packed[:, :NUM_Q_HEADS], layers=layers, meta=meta, native=native)


def _layer(num_pages: int, page_size: int, dtype: torch.dtype) -> KVView:
    memory = torch.empty(num_pages, 2, page_size, NUM_KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    stored = memory.normal_().to(dtype)
    scale = torch.ones((), device="cuda") if dtype.itemsize == 1 else None
    return KVView(k=stored[:, 0], v=stored[:, 1], k_scale=scale, v_scale=scale)


def dense(problem: Problem, kv: KVView) -> tuple[torch.Tensor, torch.Tensor]:
    """keys, values [batch, num_kv_heads, keys, head_dim] of a batch of equal lengths, copied out of the pages."""
    pages = problem.meta.block_table[:, : -(-problem.shape.keys // problem.page_size)].long()
    k, v = (x[pages].flatten(1, 2)[:, : problem.shape.keys].transpose(1, 2).contiguous() for x in (kv.k, kv.v))
    return k, v
