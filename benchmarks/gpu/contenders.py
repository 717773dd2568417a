"""Who is timed: FlashAttention-3 called directly, L4's backends as the engine calls them, and torch's SDPA on dense keys and values."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from shapes import HEAD_DIM, NUM_KV_HEADS, NUM_Q_HEADS, SCALE, Problem, dense
from timing import Call

from l4core.attention.verdicts import hold_to
from l4core.platform import detect
from l4core.plugin_api import (
    AttentionBackend,
    AttentionContext,
    AttentionRequirements,
    KVView,
    Unusable,
)
from l4core.plugin_entries import import_object


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """calls: one a layer.  once: what a step does before its layers.  output: of the last layer, [T, num_q_heads, head_dim]."""

    calls: list[Call]
    output: Callable[[], torch.Tensor]
    once: Call | None = None


def bare_fa3(problem: Problem) -> Timed:
    """The library's public function, on the same pages, all of its defaults."""
    attend = importlib.import_module("flash_attn_interface").flash_attn_with_kvcache
    meta, shape, q = problem.meta, problem.shape, problem.q
    one_row = shape.phase == "decode"
    found: list[torch.Tensor] = []
    ragged: dict[str, object] = (
        {} if one_row else {"cu_seqlens_q": meta.cu_seqlens_q, "max_seqlen_q": meta.max_seqlen_q}
    )

    def layer(kv: KVView) -> Call:
        def call() -> None:
            queries = q.unsqueeze(1) if one_row else q
            out = attend(
                queries, kv.k, kv.v, cache_seqlens=meta.seq_lens, page_table=meta.block_table, causal=True, **ragged
            )
            found[:] = [out]

        return call

    return Timed(calls=[layer(kv) for kv in problem.layers], output=lambda: found[0].view(q.shape))


MOST_DENSE = 24 << 30
"""Bytes of dense copies that are made for SDPA at most."""


def sdpa(problem: Problem) -> Timed | None:
    """torch's own, on keys and values laid out densely beforehand; None where the copies would not fit."""
    memories = {kv.k.data_ptr(): kv for kv in problem.layers}
    if problem.shape.kv_bytes * len(memories) > MOST_DENSE:
        return None
    copies = {address: dense(problem, kv) for address, kv in memories.items()}
    layers = [copies[kv.k.data_ptr()] for kv in problem.layers]
    batch, queries = problem.shape.batch, problem.shape.queries
    function = torch.nn.functional.scaled_dot_product_attention
    group = NUM_Q_HEADS // NUM_KV_HEADS
    found: list[torch.Tensor] = []
    q4 = problem.q.view(batch, queries, NUM_Q_HEADS, HEAD_DIM).transpose(1, 2)

    def layer(k: torch.Tensor, v: torch.Tensor) -> Call:
        def call() -> None:
            if queries == 1:  # the heads of a group as rows: faster than enable_gqa here
                out = function(q4.reshape(batch, NUM_KV_HEADS, group, HEAD_DIM), k, v, scale=SCALE)
                found[:] = [out.view(batch, NUM_Q_HEADS, HEAD_DIM)]
            else:
                out = function(q4, k, v, is_causal=True, enable_gqa=True, scale=SCALE)
                found[:] = [out.transpose(1, 2).reshape(-1, NUM_Q_HEADS, HEAD_DIM)]

        return call

    return Timed(calls=[layer(k, v) for k, v in layers], output=lambda: found[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Ours:
    """One of L4's backends, made as the engine makes it."""

    backend: AttentionBackend
    native_chunk: bool
    provider: str

    def timed(self, problem: Problem) -> Timed:
        meta = problem.native if self.native_chunk else problem.meta
        plans: list[object] = []
        out = torch.full(problem.q.shape, torch.nan, dtype=problem.q.dtype, device="cuda")

        def once() -> None:
            plans[:] = [self.backend.plan(meta)]

        def layer(kv: KVView) -> Call:
            return lambda: self.backend.attend(problem.q, kv, plans[0], out)

        return Timed(calls=[layer(kv) for kv in problem.layers], output=lambda: out, once=once)


OURS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "l4-fa3": ("l4_fa3", {}),
    "l4-trtllm-mha (XQA)": ("l4_trtllm_mha", {"sibling": "xqa"}),
    "l4-triton": ("l4_triton", {}),
}


def ours(page_size: int, kv_dtype: str = "bfloat16") -> Iterator[tuple[str, Ours]]:
    """Those that are installed and usable here."""
    for name, (module, options) in OURS.items():
        if importlib.util.find_spec(module) is None:
            print(f"{name}: not installed")
            continue
        found = make(module, options, page_size, kv_dtype)
        if isinstance(found, Unusable):
            print(f"{name}: {found.reason}")
        else:
            yield name, found


def make(module: str, options: Mapping[str, str], page_size: int, kv_dtype: str) -> Ours | Unusable:
    entry = importlib.import_module(module).l4_attention_backends()[0]
    platform = detect("cuda")
    req = AttentionRequirements(
        num_q_heads=NUM_Q_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        q_dtype="bfloat16",
        kv_dtype=kv_dtype,
        page_size=page_size,
        chunk_size=8192,
        max_num_seqs=256,
        max_num_tokens=16384,
        needs_graph=True,
    )
    verdict = hold_to(entry.probe(platform, req), req)
    if isinstance(verdict, Unusable):
        return verdict
    context = AttentionContext(
        requirements=req,
        platform=platform,
        device="cuda",
        page_size=page_size,
        options=options,
        logger=logging.getLogger(module),
    )
    return Ours(
        backend=import_object(entry.create)(context), native_chunk=verdict.native_chunk, provider=verdict.provider
    )
