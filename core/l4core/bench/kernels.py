"""Times of a layer's parts by themselves, as this engine has them: the products, the experts, attention of each kind, the head.

Each is called for every layer in turn, so its weights come from memory and not from a cache, and many times in a row, so an accelerator is never
idle between calls; what is launched more slowly than it runs shows its launches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch

from l4core.attention.chunked import ring_width, single_chunk_metadata
from l4core.bench.device import Rates, seconds_each
from l4core.engine.run.runner import Runner
from l4core.kv.blocks import KVGroup
from l4core.model.config import ModelConfig
from l4core.model.llama4 import Layer
from l4core.model.moe import MoE
from l4core.plugin_api import AttentionMetadata

Call = Callable[[], object]


@torch.inference_mode()
def measure(
    runner: Runner, config: ModelConfig, rates: Rates, *, tokens: Sequence[int], context: int
) -> Iterator[dict[str, Any]]:
    """One row for each part and number of tokens: µs of one call, bytes and operations, and the floor they give.

    context: tokens each decoding request has, for attention. Raises ValueError where KV memory has fewer pages than one request of it needs.
    """
    parts = _Parts(runner, config)
    for count in tokens:
        for name, calls, size, flops in parts.of(count, context):
            seconds = seconds_each(calls, parts.device)
            floor = max(size / rates.copy, flops / rates.matmul)
            yield {
                "name": name,
                "tokens": count,
                "us": seconds * 1e6,
                "floor_us": floor * 1e6,
                "bytes": size,
                "flops": flops,
                "gb_per_s": size / seconds / 1e9,
                "tflop_per_s": flops / seconds / 1e12,
            }


class _Parts:
    def __init__(self, runner: Runner, config: ModelConfig) -> None:
        self._runner, self._config = runner, config
        self._layers = cast("list[Layer]", list(runner.model.layers))
        first = runner.model.embed.weight
        self.device, self._dtype = first.device, first.dtype

    def of(self, count: int, context: int) -> Iterator[tuple[str, list[Call], float, float]]:
        """(name, a call for each layer, bytes of one, operations of one)."""
        config = self._config
        hidden = self._rows(count, config.hidden_size)
        heads = self._rows(count, config.num_q_heads * config.head_dim)
        attns = [layer.attn for layer in self._layers]
        width = config.num_q_heads * config.head_dim
        kv_width = 2 * config.num_kv_heads * config.head_dim
        yield self._product("qkv", [attn.qkv for attn in attns], hidden, config.hidden_size * (width + kv_width))
        yield self._product("o", [attn.o for attn in attns], heads, config.hidden_size * width)
        moes = [layer.moe for layer in self._layers if layer.is_moe]
        if moes:
            yield self._experts(moes, hidden)
        dense = [layer.mlp for layer in self._layers if not layer.is_moe]
        if dense:
            yield self._product("mlp", dense, hidden, 3 * config.hidden_size * config.intermediate_size_mlp)
        head = _head_bytes(self._runner)
        flops = 2.0 * count * config.vocab_size * config.hidden_size
        yield "head", [lambda: self._runner.model.logits(hidden)], head + hidden.nbytes, flops
        for group in config.kv_groups():
            yield self._attention(group, count, context)

    def _rows(self, count: int, width: int) -> torch.Tensor:
        return torch.randn(count, width, device=self.device, dtype=torch.float32).to(self._dtype)

    def _product(
        self, name: str, modules: Sequence[torch.nn.Module], x: torch.Tensor, elements: int
    ) -> tuple[str, list[Call], float, float]:
        calls: list[Call] = [lambda m=m: m(x) for m in modules]  # type: ignore[misc]
        written = modules[0](x).nbytes
        return name, calls, _weights(modules[0]) + x.nbytes + written, 2.0 * x.shape[0] * elements

    def _experts(self, moes: Sequence[MoE], x: torch.Tensor) -> tuple[str, list[Call], float, float]:
        """Router, routed and shared expert; of the routed weights those that these tokens hit count."""
        config = self._config
        hit = [moe.router(x).argmax(-1).unique().numel() for moe in moes]
        share = sum(hit) / len(hit) / config.num_experts
        routed = moes[0].routed_bytes
        rest = _weights(moes[0]) - (routed if moes[0].packed is None else 0)  # packed ones are no parameters
        calls: list[Call] = [lambda m=m: m(x) for m in moes]  # type: ignore[misc]
        flops = 2.0 * x.shape[0] * 2 * 3 * config.hidden_size * config.intermediate_size
        return "experts", calls, rest + share * routed + 2 * x.nbytes, flops

    def _attention(self, group: KVGroup, count: int, context: int) -> tuple[str, list[Call], float, float]:
        """`count` requests decode one token each, at pages in random order; more than KV memory has are read twice."""
        config, memory = self._config, self._runner.memory
        page_size = memory.page_size
        meta = self._metadata(group, count, context)
        keys = context if group.chunk_size is None else (context - 1) % group.chunk_size + 1
        if group.chunk_size is not None:
            meta = single_chunk_metadata(meta, meta.block_table, group.chunk_size, page_size)
        backend, plan = self._runner.backend, self._runner.backend.plan(meta)
        q = self._rows(count, config.num_q_heads * config.head_dim).view(count, config.num_q_heads, config.head_dim)
        out = torch.empty_like(q)
        views = [memory.view(layer_id) for layer_id in group.layer_ids]
        calls: list[Call] = [lambda v=v: backend.attend(q, v, plan, out) for v in views]  # type: ignore[misc]
        read = 2 * count * keys * config.num_kv_heads * config.head_dim * views[0].k.itemsize
        flops = 4.0 * count * keys * config.num_q_heads * config.head_dim
        return f"{group.name} attention at {context}", calls, read + 2 * q.nbytes, flops

    def _metadata(self, group: KVGroup, count: int, context: int) -> AttentionMetadata:
        memory = self._runner.memory
        columns = -(-context // memory.page_size)
        if group.chunk_size is not None:
            columns = min(columns, ring_width(group.chunk_size, memory.page_size))
        num_pages = memory.pages(group.layer_ids[0]).shape[0]
        if columns >= num_pages:
            raise ValueError(f"a context of {context} tokens takes {columns} pages; KV memory has {num_pages}")
        order = torch.randperm(num_pages - 1, device=self.device)[: count * columns] + 1
        order = order.repeat(-(-count * columns // len(order)))[: count * columns]
        ones = torch.ones(count, dtype=torch.int32, device=self.device)
        return AttentionMetadata(
            cu_seqlens_q=torch.arange(count + 1, dtype=torch.int32, device=self.device),
            seq_lens=ones * context,
            block_table=order.int().view(count, columns) * memory.table_scale[group.name],
            max_seqlen_q=1,
            max_seqlen_k=context,
            num_seqs=count,
            phase="decode",
        )


def _head_bytes(runner: Runner) -> float:
    """Of the output projection, the embedding where they are one."""
    model = runner.model
    return _weights(model.embed if model.config.tie_word_embeddings else model.lm_head)


def _weights(module: torch.nn.Module) -> float:
    return float(sum(t.nbytes for t in [*module.parameters(), *module.buffers()]))
