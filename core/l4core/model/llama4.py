"""Llama 4, the text model: 48 layers of attention and (mixture-of-experts) MLP, three of four local, every fourth global.

    local layer   RoPE on q and k, then QK norm; a token sees the current chunk only
    global layer  no RoPE; q times a temperature that grows with the position; a token sees everything before it

Shapes in comments: T tokens of a step, H hidden, Hq / Hkv query / key-value heads, D head dimension, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from l4core.kv.memory import KVMemory
from l4core.model.batch import AttentionSegment, ForwardBatch
from l4core.model.config import ModelConfig
from l4core.model.huge_pages import advise_huge_pages
from l4core.model.layers import Linear, RMSNorm, SwiGLU, parameter
from l4core.model.moe import MoE
from l4core.model.rotary import Rotary, temperature
from l4core.model.slicing import rank_config
from l4core.model.step_heap import packing_into_huge_pages
from l4core.ops.heads import HeadRule, Heads, TorchHeads, has_heads_kernel
from l4core.ops.linear import linear
from l4core.parallel.ranks import ALONE, Ranks
from l4core.plugin_api import AttentionBackend, ExpertKernel


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """What all layers of one step share."""

    kv: KVMemory
    backend: AttentionBackend
    segments: tuple[AttentionSegment, ...]
    heads: Heads


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer_id: int) -> None:
        super().__init__()
        self.layer_id = layer_id
        is_rope = config.rope_layers[layer_id]
        self.rule = HeadRule(
            num_q_heads=config.num_q_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rope=is_rope,
            chunked=config.chunked_layers[layer_id],
            qk_norm_eps=config.rms_norm_eps if config.use_qk_norm and is_rope else None,
        )
        q_size, kv_size = config.num_q_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.qkv = Linear(q_size + 2 * kv_size, config.hidden_size)  # rows q | k | v
        self.o = Linear(config.hidden_size, q_size)

    def forward(self, x: torch.Tensor, step: _Step) -> torch.Tensor:
        """x [T, H] → [T, H]."""
        group, view = step.kv.group_of(self.layer_id), step.kv.view(self.layer_id)
        q = step.heads(self.qkv(x), self.rule, group, step.kv.pages(self.layer_id), view)  # [T, Hq, D]
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for segment in step.segments:
            rows = slice(segment.begin, segment.end)
            step.backend.attend(q[rows], view, segment.plans[group], out[rows])
        y: torch.Tensor = self.o(out.view(x.shape[0], -1))
        return y


class Layer(nn.Module):
    """On one of several ranks attention has some of the heads and the feed-forward a part of its width; what each makes is summed over the ranks."""

    def __init__(self, config: ModelConfig, layer_id: int, experts: ExpertKernel | None, ranks: Ranks, ep: int) -> None:
        super().__init__()
        rank = rank_config(config, ranks.size)
        self.ranks = ranks
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(rank, layer_id)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.is_moe = config.moe_layers[layer_id]
        if self.is_moe:
            self.moe = MoE(config, experts, rank=ranks.rank, world=ranks.size, ep=ep)
        else:
            self.mlp = SwiGLU(config.hidden_size, rank.intermediate_size_mlp)

    def forward(self, stream: torch.Tensor, normed: torch.Tensor, step: _Step) -> torch.Tensor:
        """stream: the residual stream [T, H], changed in place; normed: its `attn_norm`. → what is still to be added to the stream, which the
        next norm does in the same pass."""
        norm = self.mlp_norm
        update: torch.Tensor
        if self.is_moe:
            update = self.moe(*self.moe.norm_route(stream, self._attended(normed, step), norm.weight, norm.eps))
        else:
            update = self.mlp(norm(stream, self._attended(normed, step)))
        return self.ranks.all_reduce(update)

    def _attended(self, normed: torch.Tensor, step: _Step) -> torch.Tensor:
        """Nobody holds it beside the norm that adds it: a step's memory is counted so."""
        return self.ranks.all_reduce(self.attn(normed, step))


class Embedding(nn.Module):
    """Each rank has the rows of its share of the vocabulary; the others' add zeros."""

    def __init__(self, vocab_size: int, hidden_size: int, ranks: Ranks = ALONE) -> None:
        """vocab_size: of all ranks."""
        super().__init__()
        self.ranks = ranks
        self.weight = parameter(vocab_size // ranks.size, hidden_size)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids int64 [T] → [T, H]."""
        if self.ranks.size == 1:
            return F.embedding(token_ids, self.weight)
        rows = token_ids - self.ranks.rank * self.weight.shape[0]
        elsewhere = (rows < 0) | (rows >= self.weight.shape[0])
        own = F.embedding(rows.masked_fill_(elsewhere, 0), self.weight).masked_fill_(elsewhere.unsqueeze(1), 0.0)
        return self.ranks.all_reduce(own)


class Llama4(nn.Module):
    """Weights are created empty (on torch's default device and dtype, so a meta model costs nothing) and filled by model.weights."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        max_positions: int,
        experts: ExpertKernel | None = None,
        aux_layers: tuple[int, ...] = (),
        ranks: Ranks = ALONE,
        ep: int = 1,
    ) -> None:
        """config: of the whole model; parameters have the shapes of this rank's share (model.slicing).
        max_positions: the largest context that will be served; only a RoPE layer with full attention has a table of that size.
        experts: the kernel of the mixture of experts, None = torch's.  aux_layers: ids of layers whose outputs `forward` hands out, for a
        drafter.  ranks: that compute the model together, in `ep` groups for the experts."""
        super().__init__()
        self.config = config
        self.ranks = ranks
        self.aux_layers = aux_layers
        self.rotary = Rotary(config, max_positions)
        self.embed = Embedding(config.vocab_size, config.hidden_size, ranks)
        self.layers = nn.ModuleList(
            Layer(config, layer_id, experts, ranks, ep) for layer_id in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.vocab_size // ranks.size, config.hidden_size)

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> Llama4:
        """torch's own, with large weights on a CPU in huge pages."""
        super().to_empty(device=device, recurse=recurse)
        advise_huge_pages(self.parameters())
        return self

    def pack(self) -> None:
        """After the weights are loaded, on a CPU: large ones take the order its kernels read fastest. What they were is gone, layer by layer."""
        of_kernels = {id(part) for moe in self.modules() if isinstance(moe, MoE) for part in moe.linears_of_kernel()}
        packing = [  # holds no Experts alive
            module for module in self.modules() if isinstance(module, (Linear, MoE)) and id(module) not in of_kernels
        ]
        with packing_into_huge_pages(sum(p.nbytes for p in self.parameters() if p.is_cpu)):
            for module in packing:
                module.pack()

    def forward(
        self, batch: ForwardBatch, kv: KVMemory, backend: AttentionBackend, aux: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Computes the batch's tokens, writes their keys and values, returns hidden states after the last norm: [T, H].

        aux: [T, len(aux_layers) · H], receives the residual stream after each of `aux_layers`, side by side in their order.
        No host sync on an accelerator. Tokens of a step must not depend on each other through more than attention.
        """
        step = self._prepare(batch, kv, backend)
        outputs = None if aux is None else aux.view(aux.shape[0], len(self.aux_layers), -1)  # [T, n, H]
        stream = self.embed(batch.token_ids)  # [T, H]
        layers = cast("list[Layer]", list(self.layers))
        norms = [*(layer.attn_norm for layer in layers), self.norm]
        normed: torch.Tensor = norms[0](stream)
        for layer_id, layer in enumerate(layers):
            kept = None if outputs is None else self._handed_out(layer_id, outputs)
            normed = norms[layer_id + 1](stream, layer(stream, normed, step), kept)
        return normed

    def new_aux(self, num_rows: int) -> torch.Tensor | None:
        """Memory for `forward` to hand out the outputs of `aux_layers`, [num_rows, len(aux_layers) · H]; None where there are none."""
        if not self.aux_layers:
            return None
        weight = self.embed.weight
        return torch.empty(
            num_rows, len(self.aux_layers) * self.config.hidden_size, dtype=weight.dtype, device=weight.device
        )

    def head(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """hidden [R, H] → logits [R, V / ranks] of this rank's share of the vocabulary, in the compute dtype; written to `out` where given, else they
        may be a transposed view."""
        weight = self.embed.weight if self.config.tie_word_embeddings else self.lm_head.weight
        return linear(hidden, weight, out)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [R, H] → logits [R, V] of the whole vocabulary, float32 (float64 for a float64 model), contiguous."""
        logits = self.whole_rows(self.head(hidden))
        return logits.to(_wide(logits.dtype)).contiguous()

    def whole_rows(self, logits: torch.Tensor) -> torch.Tensor:
        """logits [R, V / ranks] as `head` gives them → [R, V], gathered from all ranks."""
        if self.ranks.size == 1:
            return logits
        return self.ranks.all_gather(logits).transpose(0, 1).reshape(logits.shape[0], -1)

    @property
    def num_logits(self) -> int:
        """Columns of `head`'s logits: this rank's share of the vocabulary."""
        return self.embed.weight.shape[0]

    @property
    def first_id(self) -> int:
        """Token id of the first of them."""
        return self.ranks.rank * self.num_logits

    def _handed_out(self, layer_id: int, outputs: torch.Tensor) -> torch.Tensor | None:
        """Where this layer's output is wanted, [T, H] of `outputs` [T, n, H]; None = it is not."""
        return outputs[:, self.aux_layers.index(layer_id)] if layer_id in self.aux_layers else None

    def _prepare(self, batch: ForwardBatch, kv: KVMemory, backend: AttentionBackend) -> _Step:
        fused = has_heads_kernel(self.embed.weight, kv.dtype)
        heads = self._triton_heads(batch) if fused else self._torch_heads(batch, kv.page_size)
        return _Step(kv=kv, backend=backend, segments=tuple(batch.segments), heads=heads)

    def _triton_heads(self, batch: ForwardBatch) -> Heads:
        from l4core.ops.heads_triton import TritonHeads

        config, device = self.config, batch.positions.device
        return TritonHeads(
            positions=batch.positions,
            slots=batch.slot_mapping,
            tables={
                chunked: self.rotary.table(chunked=chunked, device=device, dtype=torch.float32)
                for chunked in self._rope_kinds()
            },
            temperature=(config.floor_scale, config.attn_scale) if config.attn_temperature_tuning else None,
        )

    def _torch_heads(self, batch: ForwardBatch, page_size: int) -> Heads:
        config, wide = self.config, _wide(self.embed.weight.dtype)
        factor = None
        if config.attn_temperature_tuning and not all(config.rope_layers):
            factor = temperature(batch.positions, config, wide).view(-1, 1, 1)
        return TorchHeads(
            slots={name: (slots // page_size, slots % page_size) for name, slots in batch.slot_mapping.items()},
            rope={
                chunked: self.rotary.rows(batch.positions, chunked=chunked, dtype=wide)
                for chunked in self._rope_kinds()
            },
            temperature=factor,
        )

    def _rope_kinds(self) -> set[bool]:
        """Whether there are RoPE layers with chunked attention (True), and with full attention (False)."""
        return {
            chunked for rope, chunked in zip(self.config.rope_layers, self.config.chunked_layers, strict=True) if rope
        }


def _wide(dtype: torch.dtype) -> torch.dtype:
    """float64 stays; everything else is at least float32 where precision matters."""
    return torch.promote_types(dtype, torch.float32)
