"""What attention must give, in float64 from the definition: dense keys and a mask by position. No pages, no formulas of core's."""

from __future__ import annotations

import torch

from l4core.testing.conformance.cases import Case, Parents

__all__ = ["attention", "depths", "visible_keys"]

QUERY_BLOCK = 512


def depths(parents: Parents) -> list[int]:
    """Of each node; a child of the last committed token has depth 0."""
    found: list[int] = []
    for parent in parents:
        found.append(found[parent] + 1 if parent >= 0 else 0)
    return found


def visible_keys(case: Case, b: int) -> torch.Tensor:
    """bool [q_len, seq_len] of sequence b. Slot j < prefix holds position j; without a tree that goes for the queried slots too. Node i of a tree
    is at position prefix + depth(i), sees the prefix and its ancestors. In a chunked case only keys at positions of the query's own chunk."""
    length, n = case.seq_lens[b], case.q_lens[b]
    prefix = length - n
    position = torch.arange(length)
    visible = torch.arange(length) <= torch.arange(prefix, length)[:, None]
    if case.trees is not None:
        parents = case.trees[b]
        position[prefix:] = prefix + torch.tensor(depths(parents))
        visible[:, prefix:] = False
        for node in range(n):
            ancestor = node
            while ancestor >= 0:
                visible[node, prefix + ancestor] = True
                ancestor = parents[ancestor]
    if case.chunk is not None:
        chunk = position // case.chunk
        visible &= chunk == chunk[prefix:, None]
    return visible


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, device: str) -> torch.Tensor:
    """q [n, num_q_heads, head_dim], k and v [S, num_kv_heads, head_dim], all float64; visible bool [n, S] → float64 [n, num_q_heads, head_dim] on
    the CPU. device: where it is computed."""
    n, num_q_heads, head_dim = q.shape
    grouped = q.to(device).view(n, k.shape[1], -1, head_dim)  # query heads of one KV head beside each other
    k, v, visible = k.to(device), v.to(device), visible.to(device)
    parts = []
    for begin in range(0, n, QUERY_BLOCK):
        rows = slice(begin, begin + QUERY_BLOCK)
        scores = torch.einsum("nhgd,khd->hgnk", grouped[rows], k) * head_dim**-0.5
        weights = scores.masked_fill_(~visible[rows], -torch.inf).softmax(-1)
        parts.append(torch.einsum("hgnk,khd->nhgd", weights, v).cpu())
    return torch.cat(parts).view(n, num_q_heads, head_dim)
