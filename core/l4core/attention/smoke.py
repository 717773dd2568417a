"""The smoke check: a few tiny batches on the device, compared with the `reference` backend in float64 on the CPU.

Runs once at start-up on the backend about to be used, in the model's own head counts and dtypes. It finds a wrong layout, head mapping, mask,
scale, page order or a kernel that does not run here. It is no proof: that is the conformance kit's work (l4core.testing).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch

from l4core.attention import reference
from l4core.attention.chunked import ring_width, single_chunk_metadata
from l4core.errors import BackendUnavailable
from l4core.plugin_api import (
    AttentionBackend,
    AttentionContext,
    AttentionMetadata,
    AttentionRequirements,
    ChunkInfo,
    KVView,
    Usable,
)

TOLERANCE = {"float64": 1e-9, "float32": 2e-3, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest |error| of outputs of size 1, by query dtype. float32 leaves room for TF32; a wrong mask or page is off by far more."""

FP8_TOLERANCE = 0.2
"""With fp8 KV a backend may round the queries to fp8 as well."""

UNOWNED = float("nan")
"""What slots hold that no sequence owns. KV memory is not cleared, so it may be there in earnest; one such key read spoils the output."""

Phase: TypeAlias = Literal["decode", "prefill", "verify"]
NULL_PAGE = 0
MIN_CHUNK = 4
SEED = 4
KV_SCALE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One call to check. q: float64 [T, num_q_heads, head_dim].  k, v: float32 [num_pages, page_size, num_kv_heads, head_dim].
    owned: bool [T], rows of `out` that count.  meta: for the backend.  plain: the same without `chunk`, for the oracle."""

    name: str
    meta: AttentionMetadata
    plain: AttentionMetadata
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    owned: torch.Tensor


def smoke_check(backend: AttentionBackend, verdict: Usable, context: AttentionContext) -> None:
    """Raises BackendUnavailable naming the batch and the error found; whatever the backend itself raises goes through."""
    req = context.requirements
    if req.needs_tree:
        raise BackendUnavailable("tree verification has no smoke check in this version of L4, so it is not trusted")
    exact = replace(req, q_dtype="float64", kv_dtype="float64")
    oracle = reference.create(replace(context, requirements=exact, device="cpu", options={}))
    for batch in _batches(verdict, req, context.page_size):
        expected = torch.zeros_like(batch.q)
        oracle.attend(batch.q, _view(batch, torch.float64, "free", "cpu"), oracle.plan(batch.plain), expected)
        found = _run(backend, verdict, context, batch)
        _compare(batch, found, expected, _tolerance(req))


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
    kv = _view(batch, getattr(torch, req.kv_dtype), verdict.page_stride, device)
    out = torch.zeros(batch.q.shape, dtype=dtype, device=device)
    meta = batch.meta
    moved = replace(
        meta,
        cu_seqlens_q=meta.cu_seqlens_q.to(device),
        seq_lens=meta.seq_lens.to(device),
        block_table=meta.block_table.to(device),
    )
    backend.attend(q, kv, backend.plan(moved), out)
    return out.cpu().double()


def _view(batch: Batch, dtype: torch.dtype, page_stride: str, device: str) -> KVView:
    """batch.k and batch.v as stored in `dtype`; pages of "free" stride lie apart, as they do in memory shared with other layers."""
    scale = KV_SCALE if dtype.itemsize == 1 else 1.0
    layers = 2 if page_stride == "free" else 1
    stored = []
    for x in (batch.k, batch.v):
        memory = torch.full((x.shape[0], layers, *x.shape[1:]), UNOWNED, dtype=torch.float32).to(dtype)
        memory[:, 0] = x / scale
        stored.append(memory.to(device))
    scales = torch.tensor(scale, dtype=torch.float32, device=device) if scale != 1.0 else None
    return KVView(k=stored[0][:, 0], v=stored[1][:, 0], k_scale=scales, v_scale=scales)


# ---------------------------------------------------------------- the batches


def _batches(verdict: Usable, req: AttentionRequirements, page_size: int) -> Iterator[Batch]:
    p = page_size
    empty = (0,) if verdict.empty_rows else ()
    lengths = (1, p, p + 1, 2 * p + 3, *empty)
    yield _batch("decode", req, p, lengths, queries=[1] * len(lengths), phase="decode")
    yield _batch("prefill", req, p, (3, p + 2, 2 * p + 6), queries=[3, 2, 6], phase="prefill")
    if req.num_draft_tokens:
        rows = req.num_draft_tokens + 1
        yield _batch("verify", req, p, (rows, p + rows, 2 * p + rows), queries=[rows] * 3, phase="verify")
    if req.chunk_size is None:
        return
    native = verdict.native_chunk
    chunk = (
        req.chunk_size if native else max(2, -(-MIN_CHUNK // p)) * p
    )  # a kernel that knows of chunks gets the real one
    lengths = (chunk + 3,) if native else (chunk + 3, 2 * chunk + 2, chunk)  # over a border, over two, up to one
    local: tuple[tuple[str, Phase, tuple[int, ...]], ...] = (
        ("local decode", "decode", (1, 1, 1)),
        ("local prefill", "prefill", (3, 2, 1)),
    )
    for name, phase, queries in local:
        batch = _batch(name, req, p, lengths, queries=queries[: len(lengths)], phase=phase, chunk=chunk)
        plain = _inside_chunk(batch.meta, chunk, p)
        yield replace(batch, plain=plain, meta=replace(batch.meta, chunk=ChunkInfo(size=chunk)) if native else plain)


def _inside_chunk(meta: AttentionMetadata, chunk: int, page_size: int) -> AttentionMetadata:
    """Ordinary causal attention inside each sequence's current chunk, made by core's own formulas from a ring table."""
    columns = ring_width(chunk, page_size)
    ring = torch.full((meta.num_seqs, columns), NULL_PAGE, dtype=torch.int32)
    for b, pages in enumerate(meta.block_table.tolist()):
        for index, page in enumerate(pages):
            if page != NULL_PAGE:
                ring[b, index % columns] = page
    return single_chunk_metadata(meta, ring, chunk, page_size)


def _batch(
    name: str,
    req: AttentionRequirements,
    page_size: int,
    lengths: Sequence[int],
    *,
    queries: Sequence[int],
    phase: Phase,
    chunk: int | None = None,
) -> Batch:
    """Sequences of `lengths` keys with `queries` rows each: pages dealt in random order, every other slot NaN, the null page zero. With a chunk
    only pages of the current one exist, as core keeps them; the table points at the null page for the others."""
    draw = torch.Generator().manual_seed(SEED)
    firsts = [(length - 1) // chunk * chunk // page_size if chunk else 0 for length in lengths]
    ends = [-(-length // page_size) for length in lengths]
    num_pages = 1 + sum(ends) - sum(firsts)
    memory = torch.randn(2, num_pages, page_size, req.num_kv_heads, req.head_dim, generator=draw)
    memory[:, NULL_PAGE] = 0.0
    table = torch.full((len(lengths), max(ends)), NULL_PAGE, dtype=torch.int32)
    dealt = iter((torch.randperm(num_pages - 1, generator=draw) + 1).tolist())
    for b, length in enumerate(lengths):
        for index in range(firsts[b], ends[b]):
            table[b, index] = page = next(dealt)
            memory[:, page, max(0, length - index * page_size) :] = UNOWNED
    meta = AttentionMetadata(
        cu_seqlens_q=torch.tensor([0, *queries]).cumsum(0).int(),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        block_table=table,
        max_seqlen_q=max(queries),
        max_seqlen_k=max(lengths),
        num_seqs=len(lengths),
        phase=phase,
    )
    q = 2 * torch.randn(sum(queries), req.num_q_heads, req.head_dim, generator=draw)
    owned = torch.tensor([length > 0 for length, n in zip(lengths, queries, strict=True) for _ in range(n)])
    return Batch(name=name, meta=meta, plain=meta, q=q.double(), k=memory[0], v=memory[1], owned=owned)
