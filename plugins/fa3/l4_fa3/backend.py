"""The backend: one call of the library's `fwd` operator a layer, its schedule prepared once a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from l4_fa3.operators import Library, Operator, find_library
from l4_fa3.splits import num_splits
from l4core.plugin_api import (
    AttentionBackend,
    AttentionContext,
    AttentionMetadata,
    AttentionRequirements,
    KVView,
    Plan,
)
from l4core.plugin_ops import merge_lse, quantize_q, tree_attend


@dataclass(frozen=True, slots=True, kw_only=True)
class Fa3Plan:
    """arguments: of `fwd`, all but queries, memory, output and scales.  one_row: every sequence has one query row.  tree: the step's metadata, where
    the call covers the prefix only and the nodes come in a second pass; hidden [T, 1]: rows whose prefix is to count as empty."""

    arguments: tuple[object, ...]
    num_seqs: int
    one_row: bool
    tree: AttentionMetadata | None = None


class Fa3Backend(AttentionBackend):
    """Holds nothing of a step."""

    def __init__(self, library: Library, req: AttentionRequirements, page_size: int, multiprocessors: int) -> None:
        self.library = library
        self._req = req
        self._page_size = page_size
        self._multiprocessors = multiprocessors
        self._dtype: torch.dtype = getattr(torch, req.kv_dtype)
        self._fp8 = self._dtype.itemsize == 1
        self._places = _Places.of(library.fwd)

    def plan(self, meta: AttentionMetadata) -> Plan:
        lengths = meta.seq_lens
        if meta.tree is not None:
            lengths = (lengths - meta.cu_seqlens_q.diff()).clamp(min=0)
        one_row = meta.phase == "decode" and meta.tree is None
        max_seqlen_q = 1 if one_row else meta.max_seqlen_q
        req = self._req
        splits = num_splits(
            num_seqs=meta.num_seqs,
            max_seqlen_q=max_seqlen_q,
            num_q_heads=req.num_q_heads,
            num_kv_heads=req.num_kv_heads,
            head_dim=req.head_dim,
            multiprocessors=self._multiprocessors,
        )
        given: dict[str, object] = {
            "cu_seqlens_q": None if one_row else meta.cu_seqlens_q,
            "seqused_k": lengths,
            "is_causal": meta.tree is None,
            "num_splits": splits,
        }
        schedule = self._schedule(meta, max_seqlen_q, given)
        if schedule is not None:
            given["scheduler_metadata"] = schedule
        arguments = self.library.fwd.arguments(
            **given,
            page_table=meta.block_table,
            max_seqlen_q=None if one_row else max_seqlen_q,
            softmax_scale=req.head_dim**-0.5,
        )
        return Fa3Plan(
            arguments=tuple(arguments),
            num_seqs=meta.num_seqs,
            one_row=one_row,
            tree=meta if meta.tree is not None else None,
        )

    def _schedule(self, meta: AttentionMetadata, max_seqlen_q: int, given: dict[str, object]) -> torch.Tensor | None:
        """What each layer's call would otherwise work out anew. Its arguments must be the call's own: the layout inside depends on them."""
        if self.library.metadata is None:
            return None
        req = self._req
        arguments = self.library.metadata.arguments(
            **given,
            batch_size=meta.num_seqs,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=meta.block_table.shape[1] * self._page_size,
            num_heads=req.num_q_heads,
            num_heads_k=req.num_kv_heads,
            headdim=req.head_dim,
            headdim_v=req.head_dim,
            qkv_dtype=self._dtype,
            page_size=self._page_size,
        )
        schedule: torch.Tensor = self.library.metadata.call(*arguments)
        return schedule

    def attend(self, q: torch.Tensor, kv: KVView, plan: Plan, out: torch.Tensor) -> None:
        assert isinstance(plan, Fa3Plan)
        if plan.tree is not None:
            self._attend_tree(q, kv, plan, plan.tree, out)
        else:
            self._call(q, kv, plan, out)

    def _call(self, q: torch.Tensor, kv: KVView, plan: Fa3Plan, out: torch.Tensor) -> torch.Tensor:
        """→ log-sum-exp, float32 [num_q_heads, T] natural (another shape for one row a sequence)."""
        if self._fp8:
            q = quantize_q(q, self._dtype)
        if plan.one_row:
            q, out = q.unsqueeze(1), out.unsqueeze(1)
        values, places = list(plan.arguments), self._places
        values[places.q] = q
        values[places.k] = kv.k
        values[places.v] = kv.v
        values[places.out] = out
        if self._fp8:
            shape = (plan.num_seqs, self._req.num_kv_heads)
            values[places.k_descale] = None if kv.k_scale is None else kv.k_scale.expand(shape)
            values[places.v_descale] = None if kv.v_scale is None else kv.v_scale.expand(shape)
        lse: torch.Tensor = self.library.fwd.call(*values)[1]
        return lse

    def _attend_tree(
        self, q: torch.Tensor, kv: KVView, plan: Fa3Plan, meta: AttentionMetadata, out: torch.Tensor
    ) -> None:
        """Every row over the whole prefix, then over the nodes it descends from; the two are merged by their log-sum-exps."""
        assert meta.tree is not None
        prefix = torch.empty_like(out)
        lse = self._call(q, kv, plan, prefix).transpose(0, 1)  # [T, Hq]
        # The kernel's word for "no keys" is +inf in one build and -inf in another.
        lse = torch.where(lse.isposinf(), -torch.inf, lse)
        if meta.tree.sees_prefix is not None:
            lse = lse.masked_fill(~meta.tree.sees_prefix.unsqueeze(1), -torch.inf)
        nodes, nodes_lse = tree_attend(q, kv, meta)
        out.copy_(merge_lse(prefix.to(nodes.dtype), lse, nodes, nodes_lse)[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Places:
    """Positions in `fwd` of what changes from layer to layer."""

    q: int
    k: int
    v: int
    out: int
    k_descale: int
    v_descale: int

    @classmethod
    def of(cls, fwd: Operator) -> _Places:
        return cls(**{name: fwd.places[name] for name in cls.__slots__})


def create(ctx: AttentionContext) -> AttentionBackend:
    """Raises BackendUnavailable when no library, or not the one named by the option `provider`, can be used."""
    library = find_library(ctx.options.get("provider"), ctx.platform.arch)
    ctx.logger.info("FlashAttention-3 of %s", library.provider)
    device = torch.device(ctx.device)
    count = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return Fa3Backend(library, ctx.requirements, ctx.page_size, count)
