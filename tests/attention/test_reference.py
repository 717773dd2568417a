from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from attention.paged import make_batch
from l4core.attention.reference import ReferenceBackend, create
from l4core.platform import Platform
from l4core.plugin_api import AttentionContext, AttentionRequirements, ChunkInfo, TreeMask

MIXED = [(0, 1), (40, 1), (15, 1), (16, 1), (0, 5), (30, 7), (16, 16), (0, 33)]


@pytest.mark.parametrize("page", [1, 16, 32, 64])
def test_float64_is_exact(page: int) -> None:
    """NaN in every slot that nobody owns, shuffled pages, strided q."""
    assert make_batch(MIXED, page=page, dtype=torch.float64).error(ReferenceBackend(page)) < 1e-14


@pytest.mark.parametrize("stride", ["free", "dense", "odd"])
def test_page_stride_is_free(stride: str) -> None:
    assert make_batch(MIXED, stride=stride).error(ReferenceBackend(16)) < 1e-6


def test_bfloat16_is_computed_in_float32() -> None:
    b = make_batch(MIXED, dtype=torch.bfloat16)
    out = b.run(ReferenceBackend(16))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, b.wanted.to(torch.bfloat16), rtol=2**-8, atol=1e-6)


def test_scaled_kv_of_another_dtype() -> None:
    b = make_batch(MIXED, kv_dtype=torch.float8_e4m3fn, scales=(0.5, 3.0))
    assert b.error(ReferenceBackend(16)) < 1e-5


def test_grouped_heads() -> None:
    assert make_batch(MIXED, num_q_heads=10, num_kv_heads=2).error(ReferenceBackend(16)) < 1e-6
    assert make_batch(MIXED, num_q_heads=3, num_kv_heads=3).error(ReferenceBackend(16)) < 1e-6


def test_empty_rows_are_left_alone() -> None:
    """A sequence without keys and one without queries: their rows, if any, keep what they held."""
    b = make_batch([(5, 1), (0, 0), (8, 0), (3, 2)])
    assert b.error(ReferenceBackend(16)) < 1e-6


def test_a_tree_replaces_the_causal_mask() -> None:
    """Two branches of one root: as two chains over the same keys."""
    b = make_batch([(5, 3)], dtype=torch.float64)
    tree = TreeMask(ancestors=torch.tensor([0b001, 0b011, 0b101]), sees_prefix=torch.tensor([True, True, False]))
    found = torch.zeros_like(b.q)
    backend = ReferenceBackend(16)
    backend.attend(b.q, b.kv, backend.plan(dataclasses.replace(b.meta, tree=tree)), found)
    k, v = b.kv.k[b.meta.block_table[0].long()].flatten(0, 1), b.kv.v[b.meta.block_table[0].long()].flatten(0, 1)
    for row, keys in enumerate(([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6], [5, 7])):
        group = b.q.shape[1] // k.shape[1]
        seen_k, seen_v = (x[keys].repeat_interleave(group, dim=1) for x in (k, v))
        weights = (torch.einsum("hd,khd->hk", b.q[row], seen_k) * b.q.shape[2] ** -0.5).softmax(-1)
        torch.testing.assert_close(found[row], torch.einsum("hk,khd->hd", weights, seen_v))


def test_chunks_are_refused() -> None:
    meta = dataclasses.replace(make_batch([(5, 2)]).meta, chunk=ChunkInfo(size=64))
    with pytest.raises(ValueError, match="takes no chunk"):
        ReferenceBackend(16).plan(meta)


def test_create_takes_the_page_size_from_the_context() -> None:
    requirements = AttentionRequirements(
        num_q_heads=4, num_kv_heads=2, head_dim=8, q_dtype="float64", kv_dtype="float64"
    )
    platform = Platform(device_type="cpu", vendor="cpu", arch="x86_64")
    context = AttentionContext(
        requirements=requirements, platform=platform, device="cpu", page_size=32, options={}, logger=logging.getLogger()
    )
    assert make_batch(MIXED, page=32, dtype=torch.float64).error(create(context)) < 1e-14
