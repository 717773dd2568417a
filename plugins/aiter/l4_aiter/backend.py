"""The backend: one call of AITER's `unified_attention` a layer, for prefill, decode and both at once. Imported only when it was chosen."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from l4_aiter.probe import FIX
from l4core.plugin_api import (
    AttentionBackend,
    AttentionContext,
    AttentionMetadata,
    AttentionRequirements,
    BackendUnavailable,
    KVView,
    Plan,
)

MODULES = ("aiter.ops.triton.attention.unified_attention", "aiter.ops.triton.unified_attention")
"""Where the function is, in new and in older versions."""

FUNCTION = "unified_attention"
Attention: TypeAlias = Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class AiterPlan:
    """meta: the step's.  rows: query rows that sequences own in a decode batch, None = as many as the queries have."""

    meta: AttentionMetadata
    max_seqlen_q: int
    rows: int | None


class AiterBackend(AttentionBackend):
    """Holds nothing of a step. unit: float32 [1], 1.0, in place of a missing scale; None unless KV is fp8."""

    def __init__(self, attention: Attention, req: AttentionRequirements, unit: torch.Tensor | None) -> None:
        self._attention = attention
        self._scale = req.head_dim**-0.5
        self._unit = unit

    def plan(self, meta: AttentionMetadata) -> Plan:
        if meta.tree is not None or meta.chunk is not None:
            raise ValueError("this backend declares neither tree_mask nor native_chunk")
        decode = meta.phase == "decode"
        return AiterPlan(
            meta=meta, max_seqlen_q=1 if decode else meta.max_seqlen_q, rows=meta.num_seqs if decode else None
        )

    def attend(self, q: torch.Tensor, kv: KVView, plan: Plan, out: torch.Tensor) -> None:
        assert isinstance(plan, AiterPlan)
        if self._unit is None:
            scales: tuple[torch.Tensor | None, ...] = (None, None)
        else:
            scales = tuple(self._unit if scale is None else scale for scale in (kv.k_scale, kv.v_scale))
        # The decode kernel runs one program a sequence, whatever cu_seqlens_q says, and its reduction one a row.
        rows = slice(0, plan.rows)
        self._attention(**arguments(plan, q[rows], kv.k, kv.v, out[rows], scales[0], scales[1], self._scale))


def arguments(
    plan: AiterPlan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    scale: float,
) -> dict[str, object]:
    """Of `unified_attention`, the same in every version. The kernel multiplies by the scales only where both are given."""
    meta = plan.meta
    return {
        "q": q,
        "k": k,
        "v": v,
        "out": out,
        "cu_seqlens_q": meta.cu_seqlens_q,
        "max_seqlen_q": plan.max_seqlen_q,
        "seqused_k": meta.seq_lens,
        "max_seqlen_k": meta.max_seqlen_k,
        "softmax_scale": scale,
        "causal": True,
        "window_size": (-1, -1),
        "block_table": meta.block_table,
        "softcap": 0,
        "q_descale": None,
        "k_descale": k_scale,
        "v_descale": v_scale,
    }


def create(ctx: AttentionContext) -> AttentionBackend:
    """Raises BackendUnavailable when AITER does not import here, or its function takes other arguments."""
    attention = find_attention()
    fp8 = ctx.requirements.kv_dtype.startswith("float8")
    unit = torch.ones(1, dtype=torch.float32, device=ctx.device) if fp8 else None
    ctx.logger.info("attention by %s.%s", attention.__module__, FUNCTION)
    return AiterBackend(attention, ctx.requirements, unit)


def find_attention() -> Attention:
    refusals = []
    for name in MODULES:
        try:
            attention: Attention = getattr(importlib.import_module(name), FUNCTION)
        except Exception as error:  # noqa: BLE001  (without ROCm its import raises RuntimeError, KeyError and others)
            refusals.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())}")
            continue
        _check_signature(attention)
        return attention
    raise BackendUnavailable(f"aiter cannot be used: {'; '.join(refusals)}", fix=FIX)


def _check_signature(attention: Attention) -> None:
    """BackendUnavailable names the arguments that we give and it lacks, or that it wants and we do not give."""
    nothing = torch.empty(0)
    meta = AttentionMetadata(
        cu_seqlens_q=nothing,
        seq_lens=nothing,
        block_table=nothing,
        max_seqlen_q=1,
        max_seqlen_k=1,
        num_seqs=0,
        phase="decode",
    )
    plan = AiterPlan(meta=meta, max_seqlen_q=1, rows=0)
    given = arguments(plan, nothing, nothing, nothing, nothing, None, None, 1.0)
    try:
        inspect.signature(attention).bind(**given)
    except TypeError as error:
        raise BackendUnavailable(f"aiter's {FUNCTION} is of a version that is not known: {error}", fix=FIX) from error
