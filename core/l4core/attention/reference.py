"""Attention written from its definition, one query row at a time: right, slow, and what everything else is compared with.

Computes in float64 for float64 input, in float32 otherwise. Copies lengths to the host, so it never runs inside a graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from l4core.plugin_api import AttentionBackend, AttentionContext, AttentionMetadata, KVView, Plan, TreeMask


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sequence:
    """Query rows from first_row on, and the keys that each may see."""

    first_row: int
    num_keys: int
    pages: torch.Tensor  # int64 [pages of num_keys]
    visible: tuple[torch.Tensor, ...]  # one bool [num_keys] a row


class ReferenceBackend(AttentionBackend):
    """Stateless."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size

    def plan(self, meta: AttentionMetadata) -> Plan:
        if meta.chunk is not None:
            raise ValueError("the reference backend takes no chunk; core splits chunks before")
        rows, lens = meta.cu_seqlens_q.tolist(), meta.seq_lens.tolist()
        return tuple(
            _Sequence(
                first_row=rows[b],
                num_keys=lens[b],
                pages=meta.block_table[b, : -(-lens[b] // self._page_size)].long(),
                visible=tuple(
                    _visible(meta.tree, rows[b] + i, i, rows[b + 1] - rows[b], lens[b]).to(meta.block_table.device)
                    for i in range(rows[b + 1] - rows[b])
                ),
            )
            for b in range(meta.num_seqs)
            if rows[b + 1] > rows[b] and lens[b] > 0
        )

    def attend(self, q: torch.Tensor, kv: KVView, plan: Plan, out: torch.Tensor) -> None:
        assert isinstance(plan, tuple)
        for sequence in plan:
            k = _read(kv.k, kv.k_scale, sequence, q.dtype)  # [S, Hkv, D]
            v = _read(kv.v, kv.v_scale, sequence, q.dtype)
            for i, visible in enumerate(sequence.visible):
                row = sequence.first_row + i
                out[row] = _one_query(q[row], k[visible], v[visible])


def create(ctx: AttentionContext) -> AttentionBackend:
    return ReferenceBackend(ctx.page_size)


def _visible(tree: TreeMask | None, row: int, i: int, num_rows: int, num_keys: int) -> torch.Tensor:
    """bool [num_keys]: what row i of num_rows of its sequence sees; `row` is its place in the batch."""
    prefix = num_keys - num_rows
    if tree is None:
        return torch.arange(num_keys) <= prefix + i
    bits = int(tree.ancestors[row])
    sees_prefix = tree.sees_prefix is None or bool(tree.sees_prefix[row])
    return torch.tensor([sees_prefix] * prefix + [bool(bits >> j & 1) for j in range(num_rows)])


def _read(paged: torch.Tensor, scale: torch.Tensor | None, sequence: _Sequence, dtype: torch.dtype) -> torch.Tensor:
    """[num_pages, P, Hkv, D] → the sequence's own [num_keys, Hkv, D]; what else lies in its last page is never looked at."""
    tokens = paged[sequence.pages].flatten(0, 1)[: sequence.num_keys].to(_wide(dtype))
    return tokens if scale is None else tokens * scale


def _one_query(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q [Hq, D], k and v [S, Hkv, D] → [Hq, D]; query head h reads KV head h // (Hq / Hkv)."""
    num_q_heads, head_dim = q.shape
    group = num_q_heads // k.shape[1]
    heads = []
    for h in range(num_q_heads):
        keys, values = k[:, h // group], v[:, h // group]  # [S, D]
        scores = (keys @ q[h].to(keys.dtype)) * head_dim**-0.5  # [S]
        heads.append(torch.softmax(scores, dim=0) @ values)
    return torch.stack(heads).to(q.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
