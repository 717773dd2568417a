from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention.paged import make_batch
from l4core.attention.sdpa import MAX_QUERY_BLOCK, SdpaBackend, _bucket, create
from l4core.platform import Platform
from l4core.plugin_api import AttentionContext, AttentionRequirements, TreeMask

DECODES = [(0, 1), (40, 1), (15, 1), (16, 1), (200, 1), (199, 1), (63, 1), (64, 1)]
MIXED = [*DECODES, (0, 5), (30, 7), (16, 16), (0, 33), (100, 40)]


def backend(page: int = 16, dtype: torch.dtype = torch.float32, *, host_lengths: bool = True) -> SdpaBackend:
    return SdpaBackend(page, dtype, host_lengths=host_lengths)


both = pytest.mark.parametrize("host_lengths", [True, False], ids=["host", "padded"])


@both
@pytest.mark.parametrize("page", [1, 16, 32, 64])
@pytest.mark.parametrize("sequences", [DECODES, MIXED], ids=["decode", "mixed"])
def test_equals_the_definition(sequences, page: int, host_lengths: bool) -> None:
    """NaN in every slot that nobody owns, shuffled pages, strided q."""
    assert make_batch(sequences, page=page).error(backend(page, host_lengths=host_lengths)) < 2e-6


@both
def test_float64(host_lengths: bool) -> None:
    assert make_batch(MIXED, dtype=torch.float64).error(backend(dtype=torch.float64, host_lengths=host_lengths)) < 1e-13


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype, host_lengths: bool) -> None:
    assert make_batch(MIXED, dtype=dtype).error(backend(dtype=dtype, host_lengths=host_lengths)) < 3e-2


@both
@pytest.mark.parametrize("stride", ["free", "dense", "odd"])
def test_page_stride_is_free(stride: str, host_lengths: bool) -> None:
    assert make_batch(MIXED, stride=stride).error(backend(host_lengths=host_lengths)) < 2e-6


@both
def test_grouped_heads(host_lengths: bool) -> None:
    for heads, kv_heads in ((10, 2), (5, 1), (3, 3)):
        b = make_batch(MIXED, num_q_heads=heads, num_kv_heads=kv_heads)
        assert b.error(backend(host_lengths=host_lengths)) < 2e-6


@both
def test_scaled_kv_of_another_dtype(host_lengths: bool) -> None:
    b = make_batch(MIXED, kv_dtype=torch.float8_e4m3fn, scales=(0.5, 3.0))
    assert b.error(backend(host_lengths=host_lengths)) < 1e-5


@both
def test_empty_rows_are_left_alone(host_lengths: bool) -> None:
    b = make_batch([(5, 1), (0, 0), (8, 0), (3, 2), (0, 0)])
    assert b.error(backend(host_lengths=host_lengths)) < 2e-6


@both
def test_rows_that_no_sequence_owns_keep_what_they_held(host_lengths: bool) -> None:
    """Prefill rows of the same step stand behind the decodes of this segment in a padded batch."""
    b = make_batch([(5, 1), (8, 3)])
    longer = torch.cat([b.q, torch.full_like(b.q, torch.nan)])
    out = torch.full(longer.shape, 7.0)
    made = backend(host_lengths=host_lengths)
    made.attend(longer, b.kv, made.plan(b.meta), out)
    assert (out[: len(b.q)].double() - b.wanted).abs().max() < 2e-6
    assert (out[len(b.q) :] == 7.0).all()


def test_a_piece_of_many_query_blocks_behind_a_prefix() -> None:
    """More queries than one mask holds, an uneven last block, and a second, shorter sequence that uses the same mask."""
    b = make_batch([(70, MAX_QUERY_BLOCK + 37), (9, 20), (0, 30)], num_q_heads=2, num_kv_heads=1, dim=4)
    assert b.error(backend()) < 2e-6


def test_plans_do_not_disturb_each_other() -> None:
    """Plan n + 1 is made before attend n, and a larger batch runs in between."""
    made, small, large = backend(), make_batch(DECODES, seed=1), make_batch(MIXED, seed=2)
    plan_small, plan_large = made.plan(small.meta), made.plan(large.meta)
    for b, plan in ((small, plan_small), (large, plan_large), (small, plan_small)):
        out = torch.zeros_like(b.q)
        made.attend(b.q, b.kv, plan, out)
        assert (out.double() - b.wanted).abs().max() < 2e-6


def test_one_plan_serves_layers_of_different_strides() -> None:
    dense, free = make_batch(MIXED, stride="dense"), make_batch(MIXED, stride="free")
    made = backend()
    plan = made.plan(dense.meta)
    for b in (dense, free, dense):
        out = torch.zeros_like(b.q)
        made.attend(b.q, b.kv, plan, out)
        assert (out.double() - b.wanted).abs().max() < 2e-6


@given(
    sequences=st.lists(
        st.tuples(st.integers(0, 300), st.one_of(st.just(1), st.integers(0, 20))), min_size=1, max_size=8
    ),
    page=st.sampled_from([1, 16, 64]),
    host_lengths=st.booleans(),
)
def test_any_batch_equals_the_definition(sequences, page: int, host_lengths: bool) -> None:
    b = make_batch(
        [(prefix if n else 0, n) for prefix, n in sequences], page=page, num_q_heads=2, num_kv_heads=1, dim=4
    )
    if b.q.shape[0]:
        assert b.error(backend(page, host_lengths=host_lengths)) < 2e-6


@given(st.lists(st.integers(1, 100_000), max_size=40))
def test_buckets_bound_the_padding(lens: list[int]) -> None:
    buckets = _bucket(list(range(len(lens))), lens)
    assert sorted(b for bucket in buckets for b in bucket) == list(range(len(lens)))
    for bucket in buckets:
        longest = max(lens[b] for b in bucket)
        assert all(longest <= max(lens[b] * 4 / 3, lens[b] + 64) for b in bucket)
        assert bucket == sorted(bucket)


def test_a_tree_is_refused() -> None:
    meta = dataclasses.replace(make_batch([(5, 2)]).meta, tree=TreeMask(ancestors=torch.ones(2, dtype=torch.int64)))
    with pytest.raises(ValueError, match="neither a tree nor a chunk"):
        backend().plan(meta)


@pytest.mark.parametrize(("device", "host_lengths"), [("cpu", True), ("cuda:0", False), ("xpu", False)])
def test_only_a_cpu_reads_lengths(device: str, host_lengths: bool) -> None:
    requirements = AttentionRequirements(
        num_q_heads=4, num_kv_heads=2, head_dim=8, q_dtype="float32", kv_dtype="float32"
    )
    platform = Platform(device_type=device.split(":")[0], vendor="x", arch="x")
    context = AttentionContext(
        requirements=requirements,
        platform=platform,
        device=device,
        page_size=32,
        options={},
        logger=logging.getLogger(),
    )
    made = create(context)
    assert isinstance(made, SdpaBackend)
    assert made.host_lengths is host_lengths
