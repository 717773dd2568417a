from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest
import torch

from l4core.kv.blocks import KVGroup
from l4core.kv.memory import KVMemory
from l4core.kv.planner import KVPlan

GROUPS = (
    KVGroup(name="global", layer_ids=(3,), chunk_size=None),
    KVGroup(name="local", layer_ids=(0, 1, 2), chunk_size=64),
)


def plan(page_size: int = 16, **num_pages: int) -> KVPlan:
    return KVPlan(
        page_size=page_size,
        num_pages=num_pages,
        bytes_per_page={},
        max_context=1,
        largest_context=1,
        max_running=1,
        bytes_total=0,
    )


@pytest.fixture
def memory() -> KVMemory:
    return KVMemory(GROUPS, plan(**{"global": 7, "local": 5}), 2, 8, torch.float32, "cpu")


def test_views_have_the_shape_backends_are_promised(memory: KVMemory) -> None:
    for layer, name, pages in ((0, "local", 5), (1, "local", 5), (2, "local", 5), (3, "global", 7)):
        view = memory.view(layer)
        assert memory.group_of(layer) == name
        assert view.k.shape == view.v.shape == (pages, 16, 2, 8)
        assert view.k.stride()[1:] == view.v.stride()[1:] == (16, 8, 1)
        assert view.k_scale is None
        assert view.v_scale is None


def test_a_page_holds_all_layers_of_its_group(memory: KVMemory) -> None:
    """The page stride is that of a superpage to come: layers × (k, v) × one page."""
    assert memory.view(0).k.stride(0) == 3 * 2 * 16 * 2 * 8
    assert memory.view(3).k.stride(0) == 1 * 2 * 16 * 2 * 8
    assert memory.num_bytes == (7 * 1 + 5 * 3) * 2 * 16 * 2 * 8 * 4


def test_dense_units_are_the_same_bytes() -> None:
    """Page p of a table, scaled, names the same keys and values through the unit views as through the pages."""
    memory = KVMemory(GROUPS, plan(**{"global": 7, "local": 5}), 2, 8, torch.float32, "cpu", dense=True)
    for layer in range(4):
        pages, view = memory.pages(layer), memory.view(layer)
        pages.copy_(torch.arange(pages.numel()).view(pages.shape))
        assert view.k.is_contiguous()
        assert view.v.is_contiguous()
        scale = memory.table_scale[memory.group_of(layer)]
        for page in range(len(pages)):
            assert torch.equal(view.k[page * scale], pages[page, 0])
            assert torch.equal(view.v[page * scale], pages[page, 1])


def test_no_two_layers_keys_or_values_overlap(memory: KVMemory) -> None:
    for layer in range(4):
        memory.view(layer).k.fill_(10 * layer + 1)
        memory.view(layer).v.fill_(10 * layer + 2)
    for layer in range(4):
        assert memory.view(layer).k.unique().tolist() == [10 * layer + 1]
        assert memory.view(layer).v.unique().tolist() == [10 * layer + 2]
        assert memory.pages(layer)[:, 0].unique().tolist() == [10 * layer + 1]
        assert memory.pages(layer)[:, 1].unique().tolist() == [10 * layer + 2]


def test_the_null_page_is_zero(memory: KVMemory) -> None:
    for layer in range(4):
        assert memory.view(layer).k[0].count_nonzero() == 0
        assert memory.view(layer).v[0].count_nonzero() == 0


def test_poison_fills_all_layers_of_the_named_pages_only(memory: KVMemory) -> None:
    for layer in range(4):
        memory.pages(layer).zero_()
    memory.poison("local", [2, 4])
    for layer in range(3):
        assert memory.view(layer).k.isnan().flatten(1).all(1).tolist() == [False, False, True, False, True]
        assert memory.view(layer).v.isnan().flatten(1).any(1).tolist() == [False, False, True, False, True]
    assert memory.view(3).k.isfinite().all()
    memory.poison("local", [])


def test_the_null_page_is_never_poisoned(memory: KVMemory) -> None:
    with pytest.raises(ValueError, match="page 0 is the null page"):
        memory.poison("global", [3, 0])


def test_memory_is_reserved_not_touched() -> None:
    """1 GiB of KV costs no resident memory before tokens are written."""
    process = psutil.Process()
    before = process.memory_info().rss
    memory = KVMemory(GROUPS, plan(64, **{"global": 8192, "local": 8192}), 2, 64, torch.float32, "cpu")
    assert memory.num_bytes == 2**31
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
    memory = KVMemory(GROUPS, plan(4, **{"global": 3, "local": 2}), 2, 8, torch.float32, "cpu", clear=clear)
    for layer in range(4):
        pages = memory.pages(layer)
        assert not pages[0].any()
        assert pages[1:].isnan().all() if not clear else not pages.any()
