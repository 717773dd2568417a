"""The smoke check passes what is right, in every dtype and page size, and finds each of the mistakes backends make."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from attention import backends
from attention.entries import SMALL
from l4core.attention import reference, sdpa
from l4core.attention.smoke import smoke_check
from l4core.errors import BackendUnavailable
from l4core.plugin_api import AttentionContext, ChunkInfo, Tier, Usable
from l4core.testing.platforms import fake_platform

USABLE = Usable(tier=Tier.PORTABLE)


def context_of(req, page_size: int) -> AttentionContext:
    return AttentionContext(
        requirements=req,
        platform=fake_platform("cpu", {}),
        device="cpu",
        page_size=page_size,
        options={},
        logger=logging.getLogger(__name__),
    )


@pytest.mark.parametrize("create", [reference.create, sdpa.create], ids=["reference", "sdpa"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("page_size", [1, 2, 16, 32])
def test_builtins_pass(create, dtype: str, page_size: int) -> None:
    context = context_of(replace(SMALL, q_dtype=dtype, kv_dtype=dtype), page_size)
    smoke_check(create(context), USABLE, context)


@pytest.mark.parametrize(
    "changes",
    [
        {"chunk_size": None},
        {"num_draft_tokens": 4},
        {"num_q_heads": 5, "num_kv_heads": 1, "head_dim": 128},
        {"q_dtype": "float64", "kv_dtype": "float64"},
        {"kv_dtype": "float8_e4m3fn"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "verdict", [USABLE, replace(USABLE, page_stride="dense", empty_rows=False)], ids=["free", "dense"]
)
def test_other_shapes_pass(changes, verdict) -> None:
    context = context_of(replace(SMALL, **changes), 8)
    smoke_check(reference.create(context), verdict, context)


MISTAKES = (
    "mask one short",
    "first page twice",
    "rows shifted",
    "dense strides",
    "keys for values",
    "no scale",
    "heads interleaved",
    "packed queries",
    "writes nothing",
    "whole tiles",
)


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mistake_is_found(mistake: str, dtype: str) -> None:
    """In the coarsest dtype too: the tolerance is for rounding, not for mistakes."""
    context = context_of(replace(SMALL, q_dtype=dtype, kv_dtype=dtype), 8)
    wrong = backends.Wrong(reference.create(context), mistake)
    with pytest.raises(BackendUnavailable, match=r"smoke check '.*': largest error"):
        smoke_check(wrong, USABLE, context)


def test_whatever_the_backend_raises_goes_through() -> None:
    context = context_of(SMALL, 8)
    wrong = backends.Wrong(reference.create(context), "plan raises")
    with pytest.raises(RuntimeError, match="workspace too small"):
        smoke_check(wrong, USABLE, context)


@pytest.mark.parametrize("honest", [True, False])
def test_a_native_chunk_is_checked_with_the_models_own(honest: bool) -> None:
    """Such a backend gets full tables and the chunk's size, and is wrong when it ignores it."""
    context = context_of(SMALL, 8)
    native = backends.NativeChunk(reference.create(context), honest)
    verdict = replace(USABLE, native_chunk=True)
    if honest:
        smoke_check(native, verdict, context)
        assert native.seen == {None, ChunkInfo(size=32)}
    else:
        with pytest.raises(BackendUnavailable, match="smoke check 'local decode'"):
            smoke_check(native, verdict, context)


TREE = replace(USABLE, tree_mask=True)


@pytest.mark.parametrize("page_size", [1, 8, 32])
@pytest.mark.parametrize("drafts", [0, 1, 7, 63])
def test_trees_pass(page_size: int, drafts: int) -> None:
    context = context_of(replace(SMALL, needs_tree=True, num_draft_tokens=drafts), page_size)
    smoke_check(reference.create(context), TREE, context)


@pytest.mark.parametrize(
    ("mistake", "batch"),
    [
        ("tree ignored", "tree verify"),
        ("tree of the first", "tree verify"),
        ("prefix always seen", "local tree verify"),
    ],
)
def test_a_mistake_with_trees_is_found(mistake: str, batch: str) -> None:
    context = context_of(replace(SMALL, needs_tree=True, num_draft_tokens=7), 8)
    with pytest.raises(BackendUnavailable, match=f"smoke check '{batch}': largest error"):
        smoke_check(backends.Wrong(reference.create(context), mistake), TREE, context)


def test_a_native_chunk_gets_a_ring() -> None:
    """Two chunks wide, whatever the sequence's length."""
    context = context_of(replace(SMALL, num_draft_tokens=3), 8)
    native = backends.NativeChunk(reference.create(context), honest=True)
    smoke_check(native, replace(USABLE, native_chunk=True), context)
    assert native.widths == {2 * 32 // 8}


def test_verification_over_a_border_is_checked() -> None:
    context = context_of(replace(SMALL, num_draft_tokens=3), 8)
    with pytest.raises(BackendUnavailable, match="smoke check 'local verify'"):
        smoke_check(backends.Wrong(reference.create(context), "one row a sequence"), USABLE, context)
