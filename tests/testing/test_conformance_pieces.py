"""What the attention kit is made of: cases, trees, the definition, memory and tables, the combinations dealt to a case, and graphs' equal shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from l4core.plugin_api import Tier, Usable
from l4core.testing.conformance import AttentionConformance, QuickAttentionConformance
from l4core.testing.conformance.attention import AttentionConformance as Kit
from l4core.testing.conformance.cases import CASE_NAMES, DRAFTS, Case, Heads, all_cases, random_tree
from l4core.testing.conformance.device_tests import GRAPHED, SYNCED, _copy_into, _other_lengths, _tensors
from l4core.testing.conformance.expected import attention, depths, visible_keys
from l4core.testing.conformance.problem import K_SCALE, V_SCALE, Layout, build
from l4core.testing.conformance.setup import RELEASED, Combination
from l4core.testing.platforms import fake_platform

HEADS = Heads(num_q_heads=4, num_kv_heads=2, head_dim=8)
USABLE = Usable(tier=Tier.TUNED)
LAYOUT = Layout(page_size=16, q_dtype=torch.float32, kv_dtype=torch.float32)
CASES = all_cases(64)

# ---------------------------------------------------------------- cases


def test_the_cases_are_those_of_the_issue() -> None:
    """Every length beside a border, pieces over one, two and three, both kinds of verification, on both sides of a border."""
    decode = all_cases(8192)["local decode"]
    assert {8191, 8192, 8193, 16383, 16384, 16385} <= set(decode.seq_lens)
    for name, borders in (("prefill over two borders", 2), ("prefill over three borders", 3)):
        case = CASES[name]
        first, last = case.seq_lens[0] - case.q_lens[0], case.seq_lens[0] - 1
        assert last // 64 - first // 64 == borders
    verify = CASES["verify at a border"]
    spans = {(n - DRAFTS - 1) // 64 == (n - 1) // 64 for n in verify.seq_lens}
    assert spans == {True, False}
    tree = CASES["local tree over a border"]
    assert tree.trees is not None
    assert len(set(tree.trees)) >= 4
    assert max(len(t) for t in CASES["tree of 64 nodes"].trees or ()) == 64


def test_the_heads_are_those_of_the_released_models() -> None:
    assert [(h.num_q_heads, h.num_kv_heads, h.head_dim) for h in RELEASED] == [
        (40, 8, 128),
        (20, 4, 128),
        (10, 2, 128),
        (5, 1, 128),
    ]
    assert AttentionConformance.heads[:4] == RELEASED


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("nodes", [1, 2, 11, 64])
def test_random_trees_are_in_order_of_depth(nodes: int, seed: int) -> None:
    tree = random_tree(nodes, seed)
    assert len(tree) == nodes
    assert all(-1 <= parent < i for i, parent in enumerate(tree))
    assert depths(tree) == sorted(depths(tree))


# ---------------------------------------------------------------- the definition


def test_a_chunk_hides_what_lies_before_it() -> None:
    case = Case(name="x", seq_lens=(6,), q_lens=(4,), phase="prefill", chunk=4)
    assert visible_keys(case, 0).int().tolist() == [
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]


def test_a_tree_goes_by_position() -> None:
    """Two keys, then nodes a (position 2), b and c after a (position 3), d after b (position 4, past the border)."""
    case = Case(name="x", seq_lens=(6,), q_lens=(4,), phase="verify", trees=((-1, 0, 0, 1),))
    assert visible_keys(case, 0).int().tolist() == [
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 1, 0],
        [1, 1, 1, 1, 0, 1],
    ]
    assert visible_keys(replace(case, chunk=4), 0)[3].int().tolist() == [0, 0, 0, 0, 0, 1]


def test_attention_is_torchs_in_float64() -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, h, 8, generator=draw, dtype=torch.float64) for n, h in ((3, 4), (5, 2), (5, 2)))
    visible = torch.ones(3, 5, dtype=torch.bool).tril(2)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))), attn_mask=visible
    )
    assert torch.allclose(attention(q, k, v, visible, "cpu"), wanted.transpose(0, 1), atol=1e-12)


# ---------------------------------------------------------------- memory and tables


@pytest.mark.parametrize("name", CASE_NAMES)
@pytest.mark.parametrize("stride", ["free", "dense"])
def test_only_what_a_sequence_owns_is_finite(name: str, stride: str) -> None:
    """Beside the null page: as many finite slots as there are keys, and what the table names is where they are."""
    layout = replace(LAYOUT, page_stride=stride)
    problem = build(CASES[name], HEADS, layout, USABLE, "cpu")
    finite = problem.memory[1:].isfinite().all(-1).all(-1)  # [pages, layers, 2, page_size]
    assert not finite[:, 0].any(), "another layer's slots"
    first = [
        (n - m) // 64 * 64 if CASES[name].chunk else 0
        for n, m in zip(CASES[name].seq_lens, CASES[name].q_lens, strict=True)
    ]
    owned = sum(n - f // 16 * 16 for n, f in zip(CASES[name].seq_lens, first, strict=True))
    assert finite[:, 1].sum(0).sum(-1).tolist() == [owned, owned]
    assert problem.kv.k.stride(-1) == 1
    lens = problem.meta.seq_lens.tolist()
    for row, length in zip(problem.meta.block_table, lens, strict=True):
        slots = torch.arange(length)
        assert problem.kv.k[row[slots // 16].long(), slots % 16].isfinite().all()


def test_dense_pages_lie_back_to_back_and_free_ones_apart() -> None:
    for stride, wanted in (("free", 4), ("dense", 1)):
        view = build(CASES["long decode"], HEADS, replace(LAYOUT, page_stride=stride), USABLE, "cpu").kv  # type: ignore[arg-type]
        assert view.k.stride(0) == view.v.stride(0) == wanted * 16 * 2 * 8
        assert view.k.shape == view.v.shape


def test_native_chunks_come_as_a_ring_and_as_a_full_table() -> None:
    native = replace(USABLE, native_chunk=True)
    ring = build(CASES["local decode"], HEADS, LAYOUT, native, "cpu").meta
    full = build(CASES["local decode"], HEADS, replace(LAYOUT, table="full"), native, "cpu").meta
    assert ring.chunk == full.chunk
    assert ring.chunk is not None
    assert ring.block_table.shape[1] == 2 * 64 // 16
    for b, length in enumerate(ring.seq_lens.tolist()):
        index = (length - 1) // 16
        assert ring.block_table[b, index % 8] == full.block_table[b, index] != 0


def test_without_empty_rows_a_border_is_met_by_rows() -> None:
    """The shape core gives such a backend: one-row decodes, none of them empty."""
    meta = build(CASES["verify at a border"], HEADS, LAYOUT, replace(USABLE, empty_rows=False), "cpu").meta
    assert meta.phase == "decode"
    assert meta.max_seqlen_q == 1
    assert meta.num_seqs == 6 * (DRAFTS + 1)
    assert meta.seq_lens.min() > 0


def test_a_finite_tail_is_large() -> None:
    problem = build(CASES["long decode"], HEADS, LAYOUT, replace(USABLE, finite_tail=True), "cpu")
    page = problem.meta.block_table[1, 0]  # of the sequence of 3 keys
    assert problem.kv.k[page, 3:].eq(400.0).all()


def test_fp8_scales_differ_and_are_in_the_answer() -> None:
    layout = replace(LAYOUT, q_dtype=torch.bfloat16, kv_dtype=torch.float8_e4m3fn)
    problem = build(CASES["one token"], HEADS, layout, USABLE, "cpu")
    assert (problem.kv.k_scale, problem.kv.v_scale) == (torch.tensor(K_SCALE), torch.tensor(V_SCALE))
    assert K_SCALE != V_SCALE
    page = problem.meta.block_table[0, 0]
    value = problem.kv.v.float()[page, 0].repeat_interleave(2, 0) * V_SCALE  # one key: its value is the output
    assert torch.allclose(problem.expected[0], value.double())


def test_far_pages_are_the_last_ones() -> None:
    problem = build(CASES["long decode"], HEADS, replace(LAYOUT, num_pages=500, fill=False), USABLE, "cpu")
    assert len(problem.memory) == 500
    assert problem.meta.block_table[0, : 700 // 16].min() > 500 - 90


# ---------------------------------------------------------------- combinations


class Everything(Kit):
    __test__ = False
    plugin, backend = "l4core.builtin_plugins", "reference"


def test_all_pairs_of_dtype_and_page_and_all_heads_are_tried() -> None:
    grid = list(Everything().grid())
    assert {(r.page_size, r.kv_dtype) for r in grid} >= {(p, d) for p in Kit.page_sizes for _, d in Kit.dtypes}
    assert {Heads(num_q_heads=r.num_q_heads, num_kv_heads=r.num_kv_heads, head_dim=r.head_dim) for r in grid} == set(
        Kit.heads
    )


def test_cases_are_dealt_different_combinations() -> None:
    kit = Everything()
    dealt = [str(c) for name in CASE_NAMES for c in kit.dealt(kit.case(name))]
    assert len(dealt) == len(CASE_NAMES) * 4
    assert len(set(dealt)) >= 30
    assert {c.page_stride for name in CASE_NAMES for c in kit.dealt(kit.case(name))} == {"free", "dense"}


def test_what_a_case_needs_is_asked_for() -> None:
    """A tree case asks for trees, a verify case for its rows; a refusal skips with the backend and its reason."""
    kit = Everything()
    for c in kit.usable(kit.case("tree of 64 nodes")):
        assert (c.req.needs_tree, c.req.num_draft_tokens) == (True, 63)
    assert {c.req.num_draft_tokens for c in kit.usable(kit.case("chain verify"))} == {DRAFTS}
    with pytest.raises(pytest.skip.Exception, match=r"reference \(l4core .*\): graph capture is asked for"):
        kit.usable(needs_graph=True)


def test_the_quick_kit_is_the_same_kit_at_smaller_sizes() -> None:
    tests = [name for name in dir(Kit) if name.startswith("test_")]
    assert [name for name in dir(QuickAttentionConformance) if name.startswith("test_")] == tests
    assert all(size <= 64 for size in QuickAttentionConformance.page_sizes)


def test_a_level_is_claimed_truly() -> None:
    """R is for the machine itself; a double of another one is D or less, and no other letters exist."""
    double: dict[str, object] = {"platform": lambda self: fake_platform("sm90", {})}
    type("Double", (Everything,), {**double, "level": "D"})().test_the_level_is_one_and_is_true()
    with pytest.raises(AssertionError, match="level R on a fake platform"):
        type("Double", (Everything,), double)().test_the_level_is_one_and_is_true()
    with pytest.raises(AssertionError, match="level is 'A'; wanted one of R, S, V, X, D, P"):
        type("Odd", (Everything,), {"level": "A"})().test_the_level_is_one_and_is_true()


# ---------------------------------------------------------------- graphs


@pytest.mark.parametrize("name", GRAPHED)
@pytest.mark.parametrize("native", [True, False])
def test_a_graphs_two_problems_have_the_same_shapes(name: str, native: bool) -> None:
    """So the second can be copied into what the first was captured with, and its lengths are others."""
    kit, verdict = Everything(), replace(USABLE, native_chunk=native)
    (req, *_) = kit.grid()
    c = Combination(req=replace(req, page_size=16), verdict=verdict, page_stride="free", table="ring")
    first, second = kit.case(name), _other_lengths(kit.case(name))
    assert first.q_lens == second.q_lens
    assert sum(a != b for a, b in zip(first.seq_lens, second.seq_lens, strict=True)) >= len(first.seq_lens) - 1
    captured, later = kit._same_shapes(first, second, c)
    assert (captured.meta.max_seqlen_k, captured.meta.max_seqlen_q) == (
        later.meta.max_seqlen_k,
        later.meta.max_seqlen_q,
    )
    _copy_into(captured, later)
    for x, y in zip(_tensors(captured), _tensors(later), strict=True):
        assert torch.equal(x.nan_to_num(5.0), y.nan_to_num(5.0))


def test_what_is_captured_and_watched_exists() -> None:
    assert set(GRAPHED) <= set(SYNCED) <= set(CASE_NAMES)
