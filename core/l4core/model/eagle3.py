"""The EAGLE3 draft: one Llama layer that reads the next token's embedding beside what the target knew when it produced that token.

    hidden   = fc([aux_low, aux_mid, aux_high])       once per token the target computed; in the draft's own recursion its previous output
    x        = attention([norm(embed), norm(hidden)])  position i has token i + 1 and the hidden state of i
    logits   = head(norm(x + mlp(norm(x))))            over the draft vocabulary; draft id j is target id j + d2t[j]

RoPE rows of q and k come in Llama's order (first half with second half) and are interleaved when they are loaded, which changes no score.
Shapes in comments: T rows, H the draft's hidden size, Ht the target's.
"""

from __future__ import annotations

import torch
from torch import nn

from l4core.kv.memory import KVMemory
from l4core.model.batch import ForwardBatch
from l4core.model.draft_size import rank_draft
from l4core.model.eagle3_config import DraftConfig
from l4core.model.layers import Linear, RMSNorm, SwiGLU
from l4core.model.llama4 import Embedding
from l4core.model.rotary import rope_rows
from l4core.ops.heads import HeadRule, Heads, TorchHeads, has_heads_kernel
from l4core.ops.linear import linear
from l4core.ops.norm import pair_norm
from l4core.parallel.ranks import ALONE, Ranks
from l4core.plugin_api import AttentionBackend

GROUP = "global"
"""The draft's keys and values lie beside the global layers'."""


class Eagle3(nn.Module):
    """Weights are created empty and filled by model.eagle3_weights. `embed` and `lm_head` may be the target's own modules."""

    def __init__(
        self,
        config: DraftConfig,
        *,
        layer_id: int,
        max_positions: int,
        embed: Embedding | None = None,
        lm_head: Linear | Embedding | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """layer_id: of its keys and values in KV memory.  embed, lm_head: the target's, where the draft has none of its own.
        ranks: each has some of the heads, a part of the MLP, of `fc`'s inputs and of the vocabularies."""
        super().__init__()
        self.config, self.layer_id, self.ranks = config, layer_id, ranks
        rank = rank_draft(config, ranks.size)
        size, eps, num_aux = config.hidden_size, config.rms_norm_eps, len(config.aux_layers)
        q_size, kv_size = rank.num_q_heads * config.head_dim, rank.num_kv_heads * config.head_dim
        if embed is None:
            self.embed = Embedding(config.vocab_size, size, ranks)
        if lm_head is None:
            self.lm_head = Linear(rank.draft_vocab_size, size)
        self._shared = (embed, lm_head)  # in a tuple, so that they are not parameters of this module
        if config.norm_before_fc:
            self.input_norm = RMSNorm(num_aux * config.target_hidden_size, eps)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(RMSNorm(config.target_hidden_size, eps) for _ in range(num_aux))
        self.fc = Linear(size, num_aux * config.target_hidden_size // ranks.size)
        self.embed_norm, self.hidden_norm = RMSNorm(size, eps), RMSNorm(size, eps)
        self.qkv = Linear(q_size + 2 * kv_size, 2 * size)
        self.o = Linear(size, q_size)
        self.mlp_norm = RMSNorm(size, eps)
        self.mlp = SwiGLU(size, rank.intermediate_size)
        self.norm = RMSNorm(size, eps)
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64), persistent=False)
        self.rule = HeadRule(
            num_q_heads=rank.num_q_heads,
            num_kv_heads=rank.num_kv_heads,
            head_dim=config.head_dim,
            rope=True,
            chunked=False,
            qk_norm_eps=None,
        )
        self._max_positions = max_positions
        self._rope: torch.Tensor | None = None

    def combine(self, aux: torch.Tensor) -> torch.Tensor:
        """aux [T, num_aux · Ht], outputs of the target's layers side by side → hidden [T, H]."""
        if self.config.norm_before_fc:
            aux = self.input_norm(aux)
        if self.config.fc_norm:
            parts = aux.view(aux.shape[0], len(self.fc_norm), -1).unbind(1)
            aux = torch.cat([norm(part.contiguous()) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        if self.ranks.size > 1:
            aux = aux.chunk(self.ranks.size, dim=1)[self.ranks.rank].contiguous()
        return self.ranks.all_reduce(self.fc(aux))

    def forward(
        self, batch: ForwardBatch, hidden: torch.Tensor, kv: KVMemory, backend: AttentionBackend
    ) -> torch.Tensor:
        """One step over the batch's rows. batch.token_ids: of the token after each position; batch.positions: of the hidden states [T, H].
        → [T, H], what the next step of the recursion is fed with and `logits` reads; `hidden` is overwritten. Keys and values are written at
        batch.slot_mapping."""
        embed = (self._shared[0] or self.embed)(batch.token_ids)
        first, second = self.embed_norm, self.hidden_norm
        x = pair_norm(embed, hidden, first.weight, second.weight, first.eps)  # [T, 2H]
        stream = x[:, x.shape[1] // 2 :].contiguous() if self.config.norm_before_residual else hidden
        view = kv.view(self.layer_id)
        q = self._heads(batch, kv)(self.qkv(x), self.rule, GROUP, kv.pages(self.layer_id), view)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for segment in batch.segments:
            rows = slice(segment.begin, segment.end)
            backend.attend(q[rows], view, segment.plans[GROUP], out[rows])
        normed = self.mlp_norm(stream, self.ranks.all_reduce(self.o(out.view(out.shape[0], -1))))
        stream += self.ranks.all_reduce(self.mlp(normed))
        return self.norm(stream) if self.config.norm_output else stream

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [R, H], as `forward` returned it → [R, draft vocabulary / ranks], this rank's share, in the compute dtype."""
        weight: torch.Tensor = (self._shared[1] or self.lm_head).weight
        normed = hidden if self.config.norm_output else self.norm(hidden)
        return linear(normed, weight)

    def likeliest(
        self, hidden: torch.Tensor, count: int, *, normalised: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden [R, H] → of each row the `count` largest logits of the whole draft vocabulary, best first, and their target ids: float32 and int64
        [R, count]. normalised: log-probabilities in place of logits. Over ranks: one small gather."""
        logits = self.logits(hidden).float()
        if normalised:
            total = logits.logsumexp(dim=1, keepdim=True)
        if count == 1:
            ids = logits.argmax(dim=1, keepdim=True)
            values = logits.gather(1, ids)
        else:
            values, ids = logits.topk(min(count, logits.shape[1]), dim=1)
        if self.ranks.size > 1:
            ids = ids + self.ranks.rank * logits.shape[1]
            found = [values.view(torch.int32), ids.to(torch.int32)]
            found += [total.view(torch.int32)] if normalised else []
            width = values.shape[1]
            shares = self.ranks.all_gather(torch.cat(found, dim=1)).transpose(0, 1)  # [R, ranks, …]
            values, place = shares[..., :width].reshape(len(logits), -1).view(torch.float32).topk(count, dim=1)
            ids = shares[..., width : 2 * width].reshape(len(logits), -1).gather(1, place).to(torch.int64)
            if normalised:
                total = shares[..., 2 * width :].reshape(len(logits), -1).view(torch.float32).logsumexp(1, keepdim=True)
        return (values - total if normalised else values), self.target_ids(ids)

    def target_ids(self, draft_ids: torch.Tensor) -> torch.Tensor:
        """Draft ids → target ids, any shape."""
        offsets: torch.Tensor = self.d2t  # type: ignore[assignment]
        return draft_ids + offsets[draft_ids]

    def _heads(self, batch: ForwardBatch, kv: KVMemory) -> Heads:
        slots, config = batch.slot_mapping[GROUP], self.config
        fused = has_heads_kernel(self.norm.weight, kv.dtype)
        if self._rope is None:
            wide = torch.float32 if fused else torch.promote_types(self.norm.weight.dtype, torch.float32)
            table = rope_rows(config.head_dim, config.rope_theta, config.rope_scaling, self._max_positions, wide)
            self._rope = table.to(batch.positions.device)
        if fused:
            from l4core.ops.heads_triton import TritonHeads

            return TritonHeads(
                positions=batch.positions, slots={GROUP: slots}, tables={False: self._rope}, temperature=None
            )
        return TorchHeads(
            slots={GROUP: (slots // kv.page_size, slots % kv.page_size)},
            rope={False: self._rope[batch.positions].unsqueeze(1)},
            temperature=None,
        )
