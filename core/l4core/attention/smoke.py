"""The smoke check: a few tiny batches on the device, compared with the `reference` backend in float64 on the CPU.

Runs once at start-up on the backend about to be used, in the model's own head counts and dtypes. It finds a wrong layout, head mapping, mask,
scale, page order or a kernel that does not run here. It is no proof: that is the conformance kit's work (l4core.testing).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from l4core.attention import reference
from l4core.attention.smoke_batches import FINITE_TAIL, UNOWNED, Batch, batches
from l4core.errors import BackendUnavailable
from l4core.plugin_api import (
    AttentionBackend,
    AttentionContext,
    AttentionMetadata,
    AttentionRequirements,
    KVView,
    TreeMask,
    Usable,
)

TOLERANCE = {"float64": 1e-9, "float32": 2e-3, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest |error| of outputs of size 1, by query dtype. float32 leaves room for TF32; a wrong mask or page is off by far more."""

FP8_TOLERANCE = 0.2
"""With fp8 KV a backend may round the queries to fp8 as well."""

K_SCALE, V_SCALE = 0.5, 0.25
"""Of fp8 KV: different, so that a swap shows."""


def smoke_check(backend: AttentionBackend, verdict: Usable, context: AttentionContext) -> None:
    """Raises BackendUnavailable naming the batch and the error found; whatever the backend itself raises goes through."""
    req = context.requirements
    exact = replace(req, q_dtype="float64", kv_dtype="float64")
    oracle = reference.create(replace(context, requirements=exact, device="cpu", options={}))
    for batch in batches(verdict, req, context.page_size):
        expected = torch.zeros_like(batch.q)
        exact_kv = _view(_rounded(batch, req.kv_dtype), torch.float64, "free", "cpu")
        oracle.attend(batch.q, exact_kv, oracle.plan(batch.plain), expected)
        found = _run(backend, verdict, context, batch)
        _compare(batch, found, expected, _tolerance(req))


def _rounded(batch: Batch, kv_dtype: str) -> Batch:
    """The values as they are stored: with fp8 KV rounding alone moves one by a sixteenth, which is core's doing and not the backend's."""
    dtype: torch.dtype = getattr(torch, kv_dtype)
    scales = (K_SCALE, V_SCALE) if dtype.itemsize == 1 else (1.0, 1.0)
    k, v = ((x / scale).to(dtype).to(x.dtype) * scale for x, scale in zip((batch.k, batch.v), scales, strict=True))
    return replace(batch, k=k, v=v)


def _tolerance(req: AttentionRequirements) -> float:
    return FP8_TOLERANCE if req.kv_dtype.startswith("float8") else TOLERANCE[req.q_dtype]


def _compare(batch: Batch, found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    error = (found - expected)[batch.owned].abs().amax().item() if batch.owned.any() else 0.0
    if not error <= tolerance:  # NaN lands here too
        raise BackendUnavailable(
            f"smoke check {batch.name!r}: largest error {error:.3g} against the reference; wanted at most {tolerance:g}",
            fix="choose another with --attention-backend",
        )


# ---------------------------------------------------------------- running one batch


def _run(backend: AttentionBackend, verdict: Usable, context: AttentionContext, batch: Batch) -> torch.Tensor:
    """The backend's output for `batch`, float64 on the CPU. Queries are a strided slice of a larger tensor, as the model's are."""
    req, device = context.requirements, context.device
    dtype: torch.dtype = getattr(torch, req.q_dtype)
    packed = torch.zeros(batch.q.shape[0], batch.q.shape[1] + 2 * req.num_kv_heads, req.head_dim, dtype=dtype)
    packed[:, : batch.q.shape[1]] = batch.q
    q = packed.to(device)[:, : batch.q.shape[1]]
    tail = FINITE_TAIL if verdict.finite_tail else UNOWNED
    kv = _view(batch, getattr(torch, req.kv_dtype), verdict.page_stride, device, tail=tail)
    out = torch.zeros(batch.q.shape, dtype=dtype, device=device)
    backend.attend(q, kv, backend.plan(on_device(batch.meta, device)), out)
    return out.cpu().double()


def on_device(meta: AttentionMetadata, device: str) -> AttentionMetadata:
    """A copy whose tensors lie on `device`."""
    tree = meta.tree
    if tree is not None:
        seen = None if tree.sees_prefix is None else tree.sees_prefix.to(device)
        tree = TreeMask(ancestors=tree.ancestors.to(device), sees_prefix=seen)
    return replace(
        meta,
        cu_seqlens_q=meta.cu_seqlens_q.to(device),
        seq_lens=meta.seq_lens.to(device),
        block_table=meta.block_table.to(device),
        tree=tree,
    )


def _view(batch: Batch, dtype: torch.dtype, page_stride: str, device: str, *, tail: float = UNOWNED) -> KVView:
    """batch.k and batch.v as stored in `dtype`; pages of "free" stride lie apart, as they do in memory shared with other layers.
    tail: what stands past a sequence's end in its last page."""
    layers = 2 if page_stride == "free" else 1
    stored: list[torch.Tensor] = []
    scales: list[torch.Tensor | None] = []
    for x, scale in ((batch.k, K_SCALE), (batch.v, V_SCALE)):
        scaled = dtype.itemsize == 1
        memory = torch.full((x.shape[0], layers, *x.shape[1:]), UNOWNED, dtype=torch.float64)
        held = (
            min(tail, scale * torch.finfo(dtype).max) if scaled else tail
        )  # NaN stays NaN; past the largest fp8 would become one
        owned = torch.where(x.isnan(), held, x)
        memory[:, 0] = owned / scale if scaled else owned
        stored.append(memory.to(dtype).to(device)[:, 0])
        scales.append(torch.tensor(scale, dtype=torch.float32, device=device) if scaled else None)
    return KVView(k=stored[0], v=stored[1], k_scale=scales[0], v_scale=scales[1])
