"""The backend: one call of the library's attention function a layer. Imported only when it was chosen."""

from __future__ import annotations

import torch

from l4_intel_xpu.compiled import check_compiled
from l4_intel_xpu.libraries import Library, Operands, Step, candidates, load
from l4_intel_xpu.probe import FIX
from l4core.plugin_api import (
    AttentionBackend,
    AttentionContext,
    AttentionMetadata,
    AttentionRequirements,
    BackendUnavailable,
    KVView,
    Plan,
)


class IntelXpuBackend(AttentionBackend):
    """Holds nothing of a step. unit: float32 [], 1.0, in place of a missing scale; None unless KV is fp8."""

    def __init__(self, library: Library, req: AttentionRequirements, unit: torch.Tensor | None) -> None:
        self.library = library
        self._num_kv_heads = req.num_kv_heads
        self._scale = req.head_dim**-0.5
        self._unit = unit

    def plan(self, meta: AttentionMetadata) -> Plan:
        if meta.tree is not None or meta.chunk is not None:
            raise ValueError("this backend declares neither tree_mask nor native_chunk")
        return Step(
            cu_seqlens_q=meta.cu_seqlens_q,
            seq_lens=meta.seq_lens,
            block_table=meta.block_table,
            max_seqlen_q=1 if meta.phase == "decode" else meta.max_seqlen_q,
            max_seqlen_k=meta.max_seqlen_k,
        )

    def attend(self, q: torch.Tensor, kv: KVView, plan: Plan, out: torch.Tensor) -> None:
        assert isinstance(plan, Step)
        num_seqs = plan.seq_lens.shape[0]
        k_scale, v_scale = (self._expand(scale, num_seqs) for scale in (kv.k_scale, kv.v_scale))
        operands = Operands(q=q, k=kv.k, v=kv.v, out=out, k_scale=k_scale, v_scale=v_scale)
        self.library.attend(plan, operands, self._scale)

    def _expand(self, scale: torch.Tensor | None, num_seqs: int) -> torch.Tensor | None:
        """→ float32 [num_seqs, num_kv_heads], a view of storage that holds this one number, as the libraries ask. Both scales or none are given."""
        if self._unit is None:
            return None
        single = self._unit if scale is None else scale
        if single.untyped_storage().nbytes() != single.element_size():
            single = single.clone()
        return single.expand(num_seqs, self._num_kv_heads)


def create(ctx: AttentionContext) -> AttentionBackend:
    """Raises BackendUnavailable with what each library lacked, or what the one named by the option `provider` lacks."""
    req = ctx.requirements
    fp8 = req.kv_dtype.startswith("float8")
    unit = torch.ones((), dtype=torch.float32, device=ctx.device) if fp8 else None
    refusals = []
    for name in candidates(ctx.options.get("provider")):
        try:
            library = load(name)
            check_compiled(library, ctx, unit)
        except BackendUnavailable as refusal:
            refusals.append(refusal)
            continue
        ctx.logger.info("attention on Intel GPUs by %s", library.provider)
        return IntelXpuBackend(library, req, unit)
    raise BackendUnavailable("; ".join(refusal.reason for refusal in refusals), fix=refusals[0].fix or FIX)
