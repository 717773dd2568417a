"""plugin_ops.tree_attend: the torch twin against the definition, the Triton kernel against the twin."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from l4core.plugin_api import Tier, TreeMask, Usable
from l4core.plugin_ops import merge_lse, tree_attend
from l4core.plugin_ops.tree import tree_attend_torch
from l4core.plugin_ops.tree_triton import tree_attend_triton
from l4core.testing.conformance.cases import Case, Heads, random_tree
from l4core.testing.conformance.problem import Layout, Problem, build

DEVICE = os.environ.get("L4_TEST_DEVICE", "cpu")
TREES = (random_tree(7, 1), random_tree(3, 2), random_tree(16, 3))
CASE = Case(name="tree", seq_lens=(7, 40, 81), q_lens=(7, 3, 16), phase="verify", trees=TREES)
VERDICT = Usable(tier=Tier.TUNED, tree_mask=True)


def problem(kv_dtype: torch.dtype = torch.float32, page_size: int = 4) -> Problem:
    heads = Heads(num_q_heads=10, num_kv_heads=2, head_dim=32)
    return build(CASE, heads, Layout(page_size=page_size, q_dtype=torch.float32, kv_dtype=kv_dtype), VERDICT, DEVICE)


def prefix_pass(p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """What a backend's own kernel gives: each row over its whole prefix, without a causal mask. out, lse [T, Hq]."""
    meta, kv = p.meta, p.kv
    outs, lses = [], []
    for b, n in enumerate(CASE.q_lens):
        prefix = CASE.seq_lens[b] - n
        pages = meta.block_table[b].long()
        k, v = (x[pages].flatten(0, 1)[:prefix].repeat_interleave(5, 1).double() for x in (kv.k, kv.v))
        q = p.q[int(meta.cu_seqlens_q[b]) :][:n].double()
        scores = torch.einsum("nhd,khd->nhk", q, k) * 32**-0.5
        lses.append(scores.logsumexp(-1))
        outs.append(torch.einsum("nhk,khd->nhd", scores.softmax(-1), v))
    return torch.cat(outs), torch.cat(lses)


def test_prefix_and_nodes_merge_to_the_definition() -> None:
    """One sequence has no prefix at all."""
    p = problem()
    out, _ = merge_lse(*prefix_pass(p), *tree_attend(p.q, p.kv, p.meta))
    assert (out.cpu().double() - p.expected).abs().max() < 2e-6


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize("page_size", [1, 64])
def test_kernel_equals_the_twin(kv_dtype: torch.dtype, page_size: int) -> None:
    """fp8 with its scales too. NaN lies in every slot past the nodes."""
    p = problem(kv_dtype, page_size)
    assert p.meta.tree is not None
    out, lse = tree_attend_triton(p.q, p.kv, p.meta, p.meta.tree.ancestors)
    wanted, wanted_lse = tree_attend_torch(p.q, p.kv, p.meta, p.meta.tree.ancestors)
    torch.testing.assert_close(out, wanted, atol=5e-6, rtol=1e-5)
    torch.testing.assert_close(lse, wanted_lse, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("attend", [tree_attend_torch, tree_attend_triton])
def test_rows_of_nobody_are_zero_and_minus_infinity(attend) -> None:  # type: ignore[no-untyped-def]
    """Padding after the last sequence, and a sequence of seq_len 0 that has a row."""
    p = problem()
    meta = replace(
        p.meta,
        seq_lens=torch.tensor([7, 0], dtype=torch.int32, device=DEVICE),
        cu_seqlens_q=torch.tensor([0, 7, 8], dtype=torch.int32, device=DEVICE),
        block_table=p.meta.block_table[:2],
        num_seqs=2,
    )
    assert p.meta.tree is not None
    out, lse = attend(p.q, p.kv, meta, p.meta.tree.ancestors)
    whole, _ = tree_attend_torch(p.q, p.kv, p.meta, p.meta.tree.ancestors)
    assert torch.allclose(out[:7], whole[:7], atol=1e-5)
    assert (out[7:] == 0).all()
    assert lse[7:].isneginf().all()


def test_sixty_four_nodes_use_every_bit() -> None:
    """Node 63's bit is the sign of an int64."""
    tree = random_tree(64, 4)
    case = replace(CASE, seq_lens=(70,), q_lens=(64,), trees=(tree,))
    layout = Layout(page_size=16, q_dtype=torch.float64, kv_dtype=torch.float64)
    p = build(case, Heads(num_q_heads=1, num_kv_heads=1, head_dim=16), layout, VERDICT, "cpu")
    assert p.meta.tree is not None
    ancestors = p.meta.tree.ancestors | torch.tensor(-(2**63))  # now all see node 63
    out, lse = tree_attend(p.q, p.kv, replace(p.meta, tree=TreeMask(ancestors=ancestors)))
    assert out.dtype == lse.dtype == torch.float64
    keys = p.kv.k[p.meta.block_table[0].long()].flatten(0, 1)[6:70, 0]
    seen = ((ancestors[:, None] >> torch.arange(64)) & 1).bool()
    scores = (p.q[:, 0] @ keys.T / 4).masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(lse[:, 0], scores.logsumexp(-1))
    assert seen[:, 63].all()


def test_refuses_what_it_cannot_do() -> None:
    p = problem()
    with pytest.raises(ValueError, match="tree is None"):
        tree_attend(p.q, p.kv, replace(p.meta, tree=None))
    with pytest.raises(ValueError, match="at most 64"):
        tree_attend(p.q, p.kv, replace(p.meta, max_seqlen_q=65))
