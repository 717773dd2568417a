"""Random paged batches, and attention over them written once more, densely and in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from l4core.plugin_api import AttentionBackend, AttentionMetadata, KVView


@dataclass(frozen=True, kw_only=True)
class Batch:
    """q [T, Hq, D], the view a backend reads, its metadata, and what must come out (float64)."""

    q: torch.Tensor
    kv: KVView
    meta: AttentionMetadata
    wanted: torch.Tensor

    def run(self, backend: AttentionBackend) -> torch.Tensor:
        out = torch.full(self.q.shape, 7.0, dtype=self.q.dtype)
        backend.attend(self.q, self.kv, backend.plan(self.meta), out)
        return out

    def error(self, backend: AttentionBackend) -> float:
        return float((self.run(backend).double() - self.wanted).abs().max())


def make_batch(
    sequences: Sequence[tuple[int, int]],
    *,
    page: int = 16,
    num_q_heads: int = 4,
    num_kv_heads: int = 2,
    dim: int = 8,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    stride: str = "free",
    seed: int = 0,
    scales: tuple[float, float] | None = None,
) -> Batch:
    """sequences: (keys before the first query, queries). Every slot that no sequence owns holds NaN, the null page zeros.

    stride: "free" = pages of one layer lie between those of others, "dense" = back to back, "odd" = page stride no multiple of a token's.
    """
    generator = torch.Generator().manual_seed(seed)
    widths = [-(-(prefix + n) // page) for prefix, n in sequences]
    num_pages = sum(widths) + 3
    k, v = (torch.full((num_pages, page, num_kv_heads, dim), torch.nan, dtype=torch.float64) for _ in range(2))
    k[0], v[0] = 0, 0
    ids = (torch.randperm(num_pages - 1, generator=generator) + 1).tolist()
    table = torch.zeros(len(sequences), max(1, *widths) + 1, dtype=torch.int32)
    q = torch.randn(sum(n for _, n in sequences), num_q_heads, dim, generator=generator, dtype=torch.float64).to(dtype)
    wanted, row = torch.full(q.shape, 7.0, dtype=torch.float64), 0
    stored, scale = kv_dtype or dtype, scales or (1.0, 1.0)
    for b, (prefix, n) in enumerate(sequences):
        shape = (prefix + n, num_kv_heads, dim)
        own = [torch.randn(shape, generator=generator, dtype=torch.float64).to(stored).double() for _ in range(2)]
        table[b, : widths[b]] = torch.tensor([ids.pop() for _ in range(widths[b])])
        position = torch.arange(prefix + n)
        where = (table[b, position // page].long(), position % page)
        k[where], v[where] = own
        wanted[row : row + n] = dense(q[row : row + n].double(), own[0] * scale[0], own[1] * scale[1])
        row += n
    meta = AttentionMetadata(
        cu_seqlens_q=torch.tensor([0, *torch.tensor([n for _, n in sequences]).cumsum(0).tolist()], dtype=torch.int32),
        seq_lens=torch.tensor([prefix + n for prefix, n in sequences], dtype=torch.int32),
        block_table=table,
        max_seqlen_q=max(n for _, n in sequences),
        max_seqlen_k=max(prefix + n for prefix, n in sequences),
        num_seqs=len(sequences),
        phase="decode" if all(n == 1 for _, n in sequences) else "prefill",
    )
    k_scale, v_scale = (None, None) if scales is None else (torch.tensor(s) for s in scales)
    view = KVView(k=laid_out(k.to(stored), stride), v=laid_out(v.to(stored), stride), k_scale=k_scale, v_scale=v_scale)
    return Batch(q=strided(q), kv=view, meta=meta, wanted=wanted)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal, bottom-right aligned."""
    n, length, group = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[2] ** -0.5
    hidden = torch.arange(length)[None] > torch.arange(length - n, length)[:, None]
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def laid_out(pages: torch.Tensor, stride: str) -> torch.Tensor:
    if stride == "dense":
        return pages.contiguous()
    num_pages, page, heads, dim = pages.shape
    size = page * heads * dim
    space = torch.full((num_pages, 3 * size + (0 if stride == "free" else 1)), torch.nan).to(pages.dtype)
    view = space[:, size : 2 * size].view(num_pages, page, heads, dim)
    view.copy_(pages)
    return view


def strided(q: torch.Tensor) -> torch.Tensor:
    """q as the model hands it over: a slice of rows that also hold k and v."""
    wide = torch.full((q.shape[0], q.shape[1] + 3, q.shape[2]), torch.nan, dtype=q.dtype)
    wide[:, : q.shape[1]] = q
    return wide[:, : q.shape[1]]
