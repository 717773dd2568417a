"""One buffer, two page shapes: a superpage is one local page of three layers or three global pages of one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import psutil
import pytest
import torch

from l4core.kv.blocks import KVGroup
from l4core.kv.memory import KVMemory
from l4core.kv.planner import KVPlan
from l4core.kv.superpages import superpage_shape

GROUPS = (
    KVGroup(name="global", layer_ids=(3,), chunk_size=None),
    KVGroup(name="local", layer_ids=(0, 1, 2), chunk_size=64),
)
PAGE = 16 * 2 * 8
"""Elements of one page of one layer's keys."""


def plan(num_superpages: int, page_size: int = 16) -> KVPlan:
    shape = superpage_shape(GROUPS)
    return cast(KVPlan, SimpleNamespace(page_size=page_size, shape=shape, num_superpages=num_superpages))


@pytest.fixture(params=[False, True], ids=["free", "dense"])
def memory(request: pytest.FixtureRequest) -> KVMemory:
    """Five superpages, the null one among them."""
    return KVMemory(GROUPS, plan(5), 2, 8, torch.float32, "cpu", dense=request.param)


def pages_of(layer: int, superpages: range) -> list[int]:
    return [*superpages] if layer < 3 else [3 * s + slot for s in superpages for slot in range(3)]


def test_views_have_the_shape_backends_are_promised() -> None:
    memory = KVMemory(GROUPS, plan(5), 2, 8, torch.float32, "cpu")
    for layer, name, pages in ((0, "local", 5), (1, "local", 5), (2, "local", 5), (3, "global", 15)):
        view = memory.view(layer)
        assert memory.group_of(layer) == name
        assert view.k.shape == view.v.shape == (pages, 16, 2, 8)
        assert view.k.stride()[1:] == view.v.stride()[1:] == (16, 8, 1)
        assert view.k.stride(0) == (6 if layer < 3 else 2) * PAGE
        assert view.k_scale is None
        assert view.v_scale is None
    assert memory.num_bytes == 5 * 6 * PAGE * 4
    assert memory.table_scale == {"global": 1, "local": 1}


def test_dense_units_are_the_same_bytes() -> None:
    """Page p of a table, scaled, names the same keys and values through the unit views as through the pages."""
    memory = KVMemory(GROUPS, plan(5), 2, 8, torch.float32, "cpu", dense=True)
    assert memory.table_scale == {"global": 2, "local": 6}
    for layer in range(4):
        pages, view = memory.pages(layer), memory.view(layer)
        pages.copy_(torch.arange(pages.numel()).view(pages.shape))
        assert view.k.is_contiguous()
        assert view.v.is_contiguous()
        scale = memory.table_scale[memory.group_of(layer)]
        for page in range(len(pages)):
            assert torch.equal(view.k[page * scale], pages[page, 0])
            assert torch.equal(view.v[page * scale], pages[page, 1])


def test_a_superpage_in_one_use_touches_no_other(memory: KVMemory) -> None:
    """Superpages 1 and 3 are local, 2 and 4 global: every layer's keys and values stay what they were."""
    used = {
        layer: [p for s in ((1, 3) if layer < 3 else (2, 4)) for p in pages_of(layer, range(s, s + 1))]
        for layer in range(4)
    }
    for layer, pages in used.items():
        for page in pages:
            memory.pages(layer)[page, 0] = 10 * layer + 1
            memory.pages(layer)[page, 1] = 10 * layer + 2
    for layer, pages in used.items():
        scale = memory.table_scale[memory.group_of(layer)]
        for page in pages:
            assert memory.view(layer).k[page * scale].unique().tolist() == [10 * layer + 1]
            assert memory.view(layer).v[page * scale].unique().tolist() == [10 * layer + 2]


@pytest.mark.parametrize("dense", [False, True])
def test_a_drafts_layer_lies_beside_the_global_ones(dense: bool) -> None:
    """Layer 4 is the draft's: the same page numbers, keys and values of its own, also where local pages are the larger use."""
    groups = (replace(GROUPS[0], layer_ids=(3, 4)), GROUPS[1])
    shape = superpage_shape(groups)
    made = cast(KVPlan, SimpleNamespace(page_size=16, shape=shape, num_superpages=4))
    memory = KVMemory(groups, made, 2, 8, torch.float32, "cpu", dense=dense)
    per = shape.pages["global"]
    assert memory.group_of(4) == "global"
    for layer in (0, 1, 2, 3, 4):
        superpage = 1 if layer < 3 else 2
        count = shape.pages[memory.group_of(layer)]
        memory.pages(layer)[superpage * count : (superpage + 1) * count] = float(layer + 1)
    for layer in (3, 4):
        view, scale = memory.view(layer), memory.table_scale["global"]
        for page in range(2 * per, 3 * per):
            assert view.k[page * scale].unique().tolist() == view.v[page * scale].unique().tolist() == [layer + 1]
    for layer in (0, 1, 2):
        assert memory.pages(layer)[shape.pages["local"]].unique().tolist() == [layer + 1]


def test_the_null_superpage_is_zero(memory: KVMemory) -> None:
    for layer in range(4):
        for page in pages_of(layer, range(1)):
            assert memory.pages(layer)[page].count_nonzero() == 0


def test_poison_fills_all_layers_of_the_named_pages_only(memory: KVMemory) -> None:
    for layer in range(4):
        memory.pages(layer).zero_()
    memory.poison("local", [2, 4])
    memory.poison("global", [9, 11])
    for layer in range(3):  # the first and last third of superpage 3 are what layers 0 and 2 would keep there
        spoilt = memory.pages(layer).isnan().flatten(1).all(1).nonzero().flatten().tolist()
        assert spoilt == ([2, 4] if layer == 1 else [2, 3, 4])
    assert memory.pages(3).isnan().flatten(1).any(1).nonzero().flatten().tolist() == [6, 7, 8, 9, 11, 12, 13, 14]
    memory.poison("local", [])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.bfloat16])
def test_poison_is_nan_in_every_dtype(dtype: torch.dtype) -> None:
    memory = KVMemory(GROUPS, plan(5), 2, 8, dtype, "cpu", clear=True, scales={3: (0.5, 2.0)})
    memory.poison("global", [6])
    assert memory.pages(3).float().isnan().flatten(1).all(1).nonzero().flatten().tolist() == [6]
    view = memory.view(3)
    scales = [scale if scale is None else scale.item() for scale in (view.k_scale, view.v_scale)]
    assert scales == ([0.5, 2.0] if dtype.itemsize == 1 else [None, None])


def test_the_null_page_is_never_poisoned(memory: KVMemory) -> None:
    with pytest.raises(ValueError, match="page 0 is the null page"):
        memory.poison("global", [3, 0])


def test_memory_is_reserved_not_touched() -> None:
    """3 GiB of KV cost no resident memory before tokens are written."""
    process = psutil.Process()
    before = process.memory_info().rss
    memory = KVMemory(GROUPS, plan(16_384, 64), 2, 64, torch.float32, "cpu")
    assert memory.num_bytes == 3 * 2**30
    assert process.memory_info().rss - before < 2**26


@pytest.fixture
def empty_is_nan() -> Iterator[None]:
    """torch.empty gives NaN, as memory that others used before may."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("empty_is_nan")
@pytest.mark.parametrize("clear", [True, False])
def test_memory_is_cleared_for_who_reads_past_a_sequences_end(clear: bool) -> None:
    memory = KVMemory(GROUPS, plan(3, 4), 2, 8, torch.float32, "cpu", clear=clear)
    for layer in range(4):
        pages = memory.pages(layer)
        null, rest = pages[pages_of(layer, range(1))], pages[pages_of(layer, range(1, 3))]
        assert not null.any()
        assert rest.isnan().all() if not clear else not rest.any()
