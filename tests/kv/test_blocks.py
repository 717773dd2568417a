"""The page pool's books, and how many pages a request holds at its peak."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from l4core.errors import ConfigError
from l4core.kv.blocks import NULL_PAGE, BlockPool, KVGroup, check_page_size

GLOBAL = KVGroup(name="global", layer_ids=(3,), chunk_size=None)
LOCAL = KVGroup(name="local", layer_ids=(0, 1, 2), chunk_size=8)


def test_every_page_but_the_null_page_is_handed_out_once() -> None:
    pool = BlockPool(6)
    pages = pool.allocate(5)
    assert pages is not None
    assert sorted(pages) == [1, 2, 3, 4, 5]
    assert NULL_PAGE not in pages
    assert (pool.num_free, pool.num_used, pool.num_usable) == (0, 5, 5)


def test_an_allocation_that_does_not_fit_takes_nothing() -> None:
    pool = BlockPool(4)
    assert pool.allocate(4) is None
    assert pool.num_free == 3
    assert pool.allocate(0) == []


def test_a_shared_page_is_freed_by_its_last_user() -> None:
    pool = BlockPool(4)
    pages = pool.allocate(2)
    assert pages is not None
    pool.retain(pages[:1])
    assert pool.users(pages[0]) == 2
    assert pool.release(pages) == pages[1:]
    assert pool.release(pages[:1]) == pages[:1]
    assert pool.num_free == 3


@pytest.mark.parametrize("page", [NULL_PAGE, 1, 4, -1])
def test_a_page_that_nobody_holds_cannot_be_released_or_retained(page: int) -> None:
    pool = BlockPool(4)
    with pytest.raises(ValueError, match="not held"):
        pool.release([page])
    with pytest.raises(ValueError, match="not held"):
        pool.retain([page])


def test_a_pool_of_the_null_page_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="holds nothing"):
        BlockPool(1)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ([], "has 1 users in the books and 0 in the tables"),
        ([[1, 1]], "1 users in the books and 2"),
        ([[1], [0]], "null page"),
    ],
)
def test_books_that_differ_from_the_tables_are_named(held: list[list[int]], message: str) -> None:
    pool = BlockPool(3)
    assert pool.allocate(1) == [1]
    pool.check_integrity([[1]])
    with pytest.raises(RuntimeError, match=message):
        pool.check_integrity(held)


@given(st.lists(st.tuples(st.sampled_from(["allocate", "retain", "release"]), st.integers(0, 5)), max_size=60))
def test_books_agree_after_any_calls(calls: list[tuple[str, int]]) -> None:
    pool, held = BlockPool(9), list[int]()
    for call, number in calls:
        if call == "allocate":
            held += pool.allocate(number) or []
        elif held:
            page = held[number % len(held)]
            if call == "retain":
                pool.retain([page])
                held.append(page)
            else:
                held.remove(page)
                assert pool.release([page]) == ([] if page in held else [page])
    pool.check_integrity([[page] for page in held])


@given(st.integers(0, 60), st.integers(0, 30), st.sampled_from([1, 2, 4, 8]))
def test_peak_pages_is_the_most_held_at_any_length_on_the_way(begin: int, more: int, page_size: int) -> None:
    def held(group: KVGroup, length: int) -> int:
        """Pages in use just before `length` is committed: the token before still holds its chunk."""
        first = 0 if group.chunk_size is None or length == 0 else (length - 1) // group.chunk_size * group.chunk_size
        return -(-(length - first) // page_size)

    for group in (GLOBAL, LOCAL):
        grown = [held(group, length) for length in range(begin + 1, begin + more + 1)]
        assert group.peak_pages(begin, begin + more, page_size) == max(
            grown, default=group.peak_pages(begin, begin, page_size)
        )


def test_a_page_never_holds_two_chunks() -> None:
    for page_size in (1, 2, 4, 8):
        check_page_size([GLOBAL, LOCAL], page_size)
    check_page_size([GLOBAL], 3)
    with pytest.raises(ConfigError, match="page size 3 does not divide the attention chunk of 8") as error:
        check_page_size([GLOBAL, LOCAL], 3)
    assert error.value.fix == "--page-size 2"
    with pytest.raises(ConfigError, match="page size 16"):
        check_page_size([LOCAL], 16)
    with pytest.raises(ConfigError, match="at least 1"):
        check_page_size([LOCAL], 0)
