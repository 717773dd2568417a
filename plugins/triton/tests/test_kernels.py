"""The kernels called directly: ways of sharing work, LSE and fp8 bits that the conformance kit cannot single out."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from l4_triton import launch
from l4_triton.kernels.common import widen_pairs
from l4_triton.tiles import Tile
from l4core.plugin_api import KVView, Tier, Usable
from l4core.plugin_ops import tree_attend
from l4core.testing.conformance.cases import Case, Heads, random_tree
from l4core.testing.conformance.problem import Layout, Problem, build

DEVICE = os.environ.get("L4_TEST_DEVICE", "cpu")
TRAITS = launch.Traits(converts_fp8=DEVICE != "cpu", starts_early=DEVICE != "cpu", interpreted=DEVICE == "cpu")
NATIVE = Usable(tier=Tier.TUNED, tree_mask=True, native_chunk=True)
HEADS = Heads(num_q_heads=5, num_kv_heads=1, head_dim=32)


def problem(
    case: Case,
    page_size: int = 16,
    heads: Heads = HEADS,
    kv_dtype: torch.dtype = torch.float32,
    q_dtype: torch.dtype = torch.float32,
) -> Problem:
    return build(case, heads, Layout(page_size=page_size, q_dtype=q_dtype, kv_dtype=kv_dtype), NATIVE, DEVICE)


def decode(p: Problem, programs: int, block_m: int = 16, block_n: int = 16, min_tiles: int = 1) -> torch.Tensor:
    out = torch.full_like(p.q, torch.nan, memory_format=torch.contiguous_format)
    tile = Tile(block_m=block_m, block_n=block_n, warps=4, stages=2)
    partials = launch.new_partials(programs, block_m, p.q.shape[2], DEVICE)
    launch.decode(p.q, p.kv, p.meta, out, tile, TRAITS, partials, min_tiles)
    return out


def assert_right(out: torch.Tensor, p: Problem, tolerance: float = 2e-5) -> None:
    assert (out.cpu().double() - p.expected)[p.owned].abs().max() <= tolerance


RAGGED = Case(name="ragged", seq_lens=(3, 0, 130, 17), q_lens=(1, 1, 1, 1), phase="decode")


@pytest.mark.parametrize("programs", [1, 2, 5, 40])
def test_any_number_of_programs_shares_the_tiles(programs: int) -> None:
    """From one that does all to more than there are tiles: 12 tiles of 4 sequences, one of them empty."""
    assert_right(decode(problem(RAGGED), programs), problem(RAGGED))


@pytest.mark.parametrize("programs", [1, 3, 8, 23, 90])
def test_a_long_sequence_among_many(programs: int) -> None:
    """Where there are many, each counts START tiles more than it has; boundaries of programs fall before, into and behind those."""
    lengths = (*(0 if i % 11 == 5 else 1 + 7 * i % 40 for i in range(launch.FEW_SEQS)), 333, 1, 60)
    case = Case(name="many", seq_lens=lengths, q_lens=(1,) * len(lengths), phase="decode")
    assert_right(decode(problem(case), programs), problem(case))


def test_a_program_takes_at_least_min_tiles() -> None:
    """With 12 tiles of which a program wants 8, one of forty works; partial results of others must not be looked for."""
    p = problem(RAGGED)
    assert_right(decode(p, 40, min_tiles=8), p)


def test_more_rows_than_a_block_holds() -> None:
    """Nine rows of five heads in blocks of 16, keys shared among programs all the same."""
    p = problem(Case(name="wide", seq_lens=(40, 9), q_lens=(9, 4), phase="verify"))
    assert_right(decode(p, 5), p)


def test_heads_of_several_kv_heads_in_row_blocks() -> None:
    p = problem(
        Case(name="wide", seq_lens=(33,), q_lens=(11,), phase="verify"),
        heads=Heads(num_q_heads=4, num_kv_heads=2, head_dim=32),
    )
    assert_right(decode(p, 3), p)


def test_tree_rows_that_see_no_prefix() -> None:
    """They get the nodes' share alone, by both kernels, though whole programs have nothing such a row may see."""
    tree = random_tree(6, 1)
    p = problem(Case(name="tree", seq_lens=(70, 6), q_lens=(6, 6), phase="verify", trees=(tree, tree)))
    assert p.meta.tree is not None
    sees = torch.tensor([True, False, True, False, False, True] + [True] * 6)
    p = replace(p, meta=replace(p.meta, tree=replace(p.meta.tree, sees_prefix=sees.to(DEVICE))))
    nodes_only, _ = tree_attend(p.q, p.kv, p.meta)
    p.expected[~sees] = nodes_only.cpu().double()[~sees]
    assert_right(decode(p, 4), p)
    out = torch.empty_like(p.q, memory_format=torch.contiguous_format)
    launch.prefill(p.q, p.kv, p.meta, out, Tile(block_m=16, block_n=16, warps=4, stages=2), TRAITS)
    assert_right(out, p)


@pytest.mark.parametrize("split", [True, False])
def test_lse_is_the_natural_logarithm(split: bool) -> None:
    """Of the sum of exp(score), by the definition, where programs share a sequence and where one has it."""
    p = problem(Case(name="lse", seq_lens=(70, 5), q_lens=(1, 1), phase="decode"), page_size=8)
    out, lse = torch.empty_like(p.q, memory_format=torch.contiguous_format), torch.empty(p.q.shape[:2], device=DEVICE)
    tile = Tile(block_m=16, block_n=16, warps=4, stages=2)
    if split:
        launch.decode(p.q, p.kv, p.meta, out, tile, TRAITS, launch.new_partials(3, 16, 32, DEVICE), 1, lse=lse)
    else:
        launch.prefill(p.q, p.kv, p.meta, out, tile, TRAITS, lse=lse)
    for b, length in enumerate((70, 5)):
        pages = p.meta.block_table[b, : -(-length // 8)].long()
        k = p.kv.k[pages].flatten(0, 1)[:length, 0].double()
        scores = k @ p.q[b].double().T * 32**-0.5
        torch.testing.assert_close(lse[b].double(), scores.logsumexp(0), atol=1e-5, rtol=0)


@triton.jit
def _widen(pairs, out, CONVERTS: tl.constexpr):  # noqa: N803
    i = tl.arange(0, 128)
    first, second = widen_pairs(tl.load(pairs + i), tl.float32, CONVERTS)
    tl.store(out + 2 * i, first)
    tl.store(out + 2 * i + 1, second)


@pytest.mark.parametrize("converts", [False, *([True] if TRAITS.converts_fp8 else [])])
def test_fp8_is_widened_exactly(converts: bool) -> None:
    """All 254 numbers of e4m3, subnormals and both zeros too, by moving bits and, on a device that has it, by the instruction."""
    bits = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    out = torch.empty(256, device=DEVICE)
    _widen[(1,)](bits.view(torch.uint16), out, CONVERTS=converts)
    exact = bits.view(torch.float8_e4m3fn).float()
    numbers = ~exact.isnan()
    assert int(numbers.sum()) == 254
    assert torch.equal(out[numbers], exact[numbers])


@pytest.mark.parametrize(
    ("q_dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 5e-3), (torch.float32, 2e-5)]
)
def test_fp8_scales_of_keys_and_values_are_not_mixed_up(q_dtype: torch.dtype, tolerance: float) -> None:
    p = problem(RAGGED, kv_dtype=torch.float8_e4m3fn, q_dtype=q_dtype)
    assert_right(decode(p, 3), p, tolerance=tolerance)


def test_float32_over_fp8_is_float32_over_the_same_numbers() -> None:
    """Bit for bit, so that an engine in float32 with fp8 KV can be held to one that rounds float32 KV."""
    p = problem(RAGGED, kv_dtype=torch.float8_e4m3fn)
    one = torch.ones((), device=DEVICE)
    stored = replace(p, kv=KVView(k=p.kv.k, v=p.kv.v, k_scale=one, v_scale=one))
    wide = replace(p, kv=KVView(k=p.kv.k.float(), v=p.kv.v.float(), k_scale=None, v_scale=None))
    assert torch.equal(decode(stored, 3)[p.owned], decode(wide, 3)[p.owned])


def test_a_ring_that_wraps_inside_a_tile() -> None:
    """Pages of 4 in tiles of 16: the chunk's pages stand in the last and then the first columns of a ring of 24 tokens."""
    case = Case(name="ring", seq_lens=(23, 31), q_lens=(4, 8), phase="prefill", chunk=12, virtual=2)
    p = problem(case, page_size=4)
    assert p.meta.block_table.shape[1] == 6
    out = torch.full_like(p.q, torch.nan, memory_format=torch.contiguous_format)
    launch.prefill(p.q, p.kv, p.meta, out, Tile(block_m=16, block_n=16, warps=4, stages=2), TRAITS)
    assert_right(out, p)
    assert_right(decode(p, 3, block_m=16), p)
