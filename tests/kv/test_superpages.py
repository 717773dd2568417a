"""How superpages are cut, who gets one, and which is evicted."""

from __future__ import annotations

import pytest

from l4core.kv.blocks import KVGroup
from l4core.kv.superpages import SuperpagePool, superpage_shape


def groups(num_global: int, num_local: int) -> list[KVGroup]:
    """In the planner's order; 0 layers = no such group."""
    full = KVGroup(name="global", layer_ids=tuple(range(num_global)), chunk_size=None)
    local = KVGroup(name="local", layer_ids=tuple(range(num_local)), chunk_size=64)
    return [group for group in (full, local) if group.layer_ids]


@pytest.mark.parametrize(
    ("layers", "pages", "units", "waste"),
    [
        ((12, 36), {"global": 3, "local": 1}, 72, {"global": 0.0, "local": 0.0}),  # Scout and Maverick
        (
            (13, 36),
            {"global": 3, "local": 1},
            78,
            {"global": 0.0, "local": 0.0769},
        ),  # a draft layer beside the global ones
        ((1, 1), {"global": 1, "local": 1}, 2, {"global": 0.0, "local": 0.0}),
        ((12, 0), {"global": 1}, 24, {"global": 0.0}),
        ((0, 5), {"local": 1}, 10, {"local": 0.0}),
        ((2, 3), {"global": 3, "local": 2}, 12, {"global": 0.0, "local": 0.0}),
    ],
)
def test_the_smallest_cut_of_little_waste(
    layers: tuple[int, int], pages: dict[str, int], units: int, waste: dict[str, float]
) -> None:
    shape = superpage_shape(groups(*layers))
    assert (dict(shape.pages), shape.units) == (pages, units)
    for group in groups(*layers):
        assert shape.waste(group) == pytest.approx(waste[group.name], abs=1e-4)
        assert shape.page_stride(group.name) * shape.pages[group.name] == shape.units
        assert shape.page_stride(group.name) >= 2 * len(group.layer_ids)


class Pool(SuperpagePool):
    """Group 0 has three pages in a superpage, group 1 one; remembers what became empty."""

    def __init__(self, num_superpages: int) -> None:
        self.emptied: list[tuple[int, list[int]]] = []
        super().__init__(num_superpages, (3, 1), lambda group, pages: self.emptied.append((group, pages)))


def test_a_superpage_goes_to_whoever_takes_it() -> None:
    pool = Pool(4)
    assert [pool.take(0), pool.take(1), pool.take(0), pool.take(1)] == [1, 2, 3, None]


def test_it_is_free_again_when_its_last_page_goes() -> None:
    pool = Pool(2)
    assert pool.take(0) == 1
    for page in (3, 4):
        pool.retain(0, page)
    pool.release(0, 3)
    assert pool.num_available == 0
    pool.release(0, 4)
    assert pool.num_available == 1
    assert pool.emptied == [(0, [3]), (0, [4])]
    pool.check_integrity(0, {})
    assert pool.take(1) == 1


def test_kept_pages_stay_until_their_memory_is_needed_and_the_oldest_goes_first() -> None:
    pool = Pool(4)
    for superpage in (1, 2, 3):
        assert pool.take(0) == superpage
        pool.retain(0, 3 * superpage)
        pool.keep(0, 3 * superpage)
    for superpage in (2, 1, 3):
        pool.release(0, 3 * superpage)
    assert pool.emptied == []
    assert (pool.held_pages, pool.cached_pages) == ([0, 0], [3, 0])
    pool.retain(0, 6)  # found again: in use, so not to be evicted
    assert pool.num_available == 2
    assert pool.take(1) == 1
    assert pool.emptied == [(0, [3])]
    pool.release(0, 6)
    assert pool.take(1) == 3
    assert pool.take(1) == 2
    assert pool.emptied == [(0, [3]), (0, [9]), (0, [6])]
    assert pool.cached_pages == [0, 0]


def test_a_free_superpage_is_taken_before_one_is_evicted() -> None:
    pool = Pool(3)
    pool.take(0)
    pool.retain(0, 3)
    pool.keep(0, 3)
    pool.release(0, 3)
    assert pool.take(1) == 2
    assert pool.emptied == []


def test_a_group_at_its_most_takes_only_its_own_cached_ones() -> None:
    """Group 1 may have two of four superpages."""
    pool = SuperpagePool(5, (3, 1), lambda group, pages: None, [None, 2])
    for page in (pool.take(1), pool.take(1)):
        assert page is not None
        pool.retain(1, page)
        pool.keep(1, page)
    assert (pool.take(1), pool.allowance(1), pool.num_available, pool.most(1)) == (None, 0, 2, 2)
    pool.release(1, 2)
    assert (pool.allowance(1), pool.num_available) == (1, 3)
    assert pool.take(1) == 2, "though others are free"
    pool.retain(1, 2)
    assert [pool.take(0), pool.take(0), pool.take(0)] == [3, 4, None]
    for page in (9, 12):
        pool.retain(0, page)
    pool.check_integrity(1, {1: 1, 2: 1})


def test_what_was_left_behind_goes_first_unless_it_was_found() -> None:
    pool = Pool(6)
    for page in range(1, 6):
        assert pool.take(1) == page
        pool.retain(1, page)
        pool.keep(1, page)
    pool.retain(1, 3)  # another finds page 3
    pool.release(1, 3)
    pool.release(1, 1)
    for page in (3, 5, 4):
        pool.release(1, page, left_behind=True)
    pool.check_integrity(1, {2: 1})
    assert [pool.take(0) for _ in range(5)] == [5, 4, 1, 3, None]


def test_flush_forgets_what_nobody_holds() -> None:
    pool = Pool(3)
    for superpage in (1, 2):
        pool.take(0)
        pool.retain(0, 3 * superpage)
        pool.keep(0, 3 * superpage)
    pool.release(0, 3)
    assert pool.flush() == 1
    assert pool.emptied == [(0, [3])]
    assert pool.num_available == 1
    assert pool.users(0, 6) == 1


def test_two_users_of_one_page() -> None:
    pool = Pool(2)
    pool.take(1)
    pool.retain(1, 1)
    pool.retain(1, 1)
    pool.release(1, 1)
    assert pool.users(1, 1) == 1
    pool.check_integrity(1, {1: 1})
    with pytest.raises(RuntimeError, match="1 users in the books and 2 in the tables"):
        pool.check_integrity(1, {1: 2})


def test_wrong_calls_are_refused() -> None:
    pool = Pool(2)
    with pytest.raises(ValueError, match="not held by anyone"):
        pool.release(0, 3)
    pool.take(1)
    with pytest.raises(ValueError, match="not that group's"):
        pool.retain(0, 3)
    with pytest.raises(ValueError, match="holds nothing"):
        Pool(1)
