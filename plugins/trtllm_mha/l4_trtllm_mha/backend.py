"""Blackwell: one kernel for decode and verify, one for prefill. Tree verification is the prefill kernel over the prefix, then core's node pass."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from l4_trtllm_mha.calls import COUNTERS, Calls, check_strides, find_calls
from l4_trtllm_mha.probe import SIBLING, WORKSPACE_MB
from l4_trtllm_mha.xqa import XqaBackend
from l4core.plugin_api import (
    AttentionBackend,
    AttentionContext,
    AttentionMetadata,
    AttentionRequirements,
    BackendUnavailable,
    KVView,
    Plan,
)
from l4core.plugin_ops import merge_lse, quantize_q, tree_attend

COUNTER_BYTES = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TrtllmPlan:
    """meta: the step's.  lengths: keys each call covers, at least 1 (an empty row reads the null page).  cu_seqlens_k: of prefill and of a tree's
    prefix, else None."""

    meta: AttentionMetadata
    lengths: torch.Tensor
    cu_seqlens_k: torch.Tensor | None


class TrtllmBackend(AttentionBackend):
    """Holds the scratch memory that the kernels of all layers use one after another, nothing of a step."""

    def __init__(self, calls: Calls, req: AttentionRequirements, device: str, workspace_bytes: int) -> None:
        self._calls = calls
        self._req = req
        self._scale = req.head_dim**-0.5
        self._fp8: torch.dtype | None = getattr(torch, req.kv_dtype) if req.kv_dtype.startswith("float8") else None
        # The kernels count finished blocks in it and leave the counters at zero, so zero once is enough.
        self._workspace = torch.zeros(workspace_bytes, dtype=torch.uint8, device=device)
        counters = torch.zeros(COUNTER_BYTES, dtype=torch.uint8, device=device) if calls.counters else None
        self._more = {COUNTERS: counters} if counters is not None else {}

    def plan(self, meta: AttentionMetadata) -> Plan:
        lengths = meta.seq_lens
        if meta.tree is not None:
            lengths = lengths - meta.cu_seqlens_q.diff()
        lengths = lengths.clamp(min=1)
        if meta.phase == "prefill" or meta.tree is not None:
            ends = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
            return TrtllmPlan(meta=meta, lengths=lengths, cu_seqlens_k=ends)
        return TrtllmPlan(meta=meta, lengths=lengths, cu_seqlens_k=None)

    def attend(self, q: torch.Tensor, kv: KVView, plan: Plan, out: torch.Tensor) -> None:
        assert isinstance(plan, TrtllmPlan)
        check_strides(kv)
        if plan.meta.tree is not None:
            self._attend_tree(q, kv, plan, out)
        elif plan.cu_seqlens_k is not None:
            self._context(q, kv, plan, out, causal=True, lse=None)
        else:
            self._decode(q, kv, plan, out)

    def _common(self, q: torch.Tensor, kv: KVView, plan: TrtllmPlan) -> dict[str, object]:
        return {
            "query": q if self._fp8 is None else quantize_q(q, self._fp8),
            "kv_cache": (kv.k, kv.v),
            "workspace_buffer": self._workspace,
            "block_tables": plan.meta.block_table,
            "seq_lens": plan.lengths,
            "bmm1_scale": self._scale if kv.k_scale is None else kv.k_scale * self._scale,
            "bmm2_scale": 1.0 if kv.v_scale is None else kv.v_scale,
            "kv_layout": "NHD",
            **self._more,
        }

    def _decode(self, q: torch.Tensor, kv: KVView, plan: TrtllmPlan, out: torch.Tensor) -> None:
        meta = plan.meta
        one_row = meta.phase == "decode"
        self._calls.decode(
            **self._common(q, kv, plan),
            max_seq_len=meta.max_seqlen_k,
            out=out,
            backend="trtllm-gen",
            q_len_per_req=1 if one_row else None,
            max_q_len=None if one_row else meta.max_seqlen_q,
            cum_seq_lens_q=None if one_row else meta.cu_seqlens_q,
        )

    def _context(
        self,
        q: torch.Tensor,
        kv: KVView,
        plan: TrtllmPlan,
        out: torch.Tensor,
        *,
        causal: bool,
        lse: torch.Tensor | None,
    ) -> None:
        meta = plan.meta
        self._calls.context(
            **self._common(q, kv, plan),
            max_q_len=meta.max_seqlen_q,
            max_kv_len=meta.max_seqlen_k,
            batch_size=meta.num_seqs,
            cum_seq_lens_q=meta.cu_seqlens_q,
            cum_seq_lens_kv=plan.cu_seqlens_k,
            out=out,
            causal=causal,
            lse=lse,
        )

    def _attend_tree(self, q: torch.Tensor, kv: KVView, plan: TrtllmPlan, out: torch.Tensor) -> None:
        """Every row over the whole prefix, then over the nodes it descends from; the two are merged by their log-sum-exps."""
        meta = plan.meta
        assert meta.tree is not None
        prefix = torch.empty_like(out)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        self._context(q, kv, plan, prefix, causal=False, lse=lse)
        lse = lse * math.log(2.0)  # the kernels' is to base 2
        lse = lse.masked_fill(~sees_prefix(meta, q.shape[0]).unsqueeze(1), -torch.inf)
        nodes, nodes_lse = tree_attend(q, kv, meta)
        out.copy_(merge_lse(prefix.to(nodes.dtype), lse, nodes, nodes_lse)[0])


def sees_prefix(meta: AttentionMetadata, num_tokens: int) -> torch.Tensor:
    """bool [T]: rows whose prefix is not empty and that may see it. (Where it is empty the kernel was given one key of the null page.)"""
    assert meta.tree is not None
    q_lens = meta.cu_seqlens_q.diff()
    has_prefix = torch.repeat_interleave(meta.seq_lens > q_lens, q_lens, output_size=num_tokens)
    return has_prefix if meta.tree.sees_prefix is None else has_prefix & meta.tree.sees_prefix


def create(ctx: AttentionContext) -> AttentionBackend:
    """Raises BackendUnavailable when FlashInfer cannot be used, and on Hopper unless the option sibling=xqa asks for it."""
    sibling = ctx.options.get("sibling")
    if sibling not in (None, "xqa"):
        raise BackendUnavailable(f"sibling is {sibling!r}; wanted xqa", fix="--attention-option sibling=xqa")
    megabytes = ctx.options.get("workspace_mb", str(WORKSPACE_MB))
    if not megabytes.isdecimal() or int(megabytes) < 32:
        raise BackendUnavailable(
            f"workspace_mb is {megabytes!r}; wanted a number of at least 32", fix="--attention-option workspace_mb=256"
        )
    if (ctx.platform.arch in SIBLING) != (sibling == "xqa"):
        raise BackendUnavailable(
            f"found {ctx.platform.arch}: TensorRT-LLM's kernels are for Blackwell, and the option sibling=xqa is for Hopper only",
            fix="--attention-option sibling=xqa" if sibling is None else "leave --attention-option sibling out",
        )
    make = XqaBackend if sibling else TrtllmBackend
    return make(find_calls(), ctx.requirements, ctx.device, int(megabytes) << 20)
