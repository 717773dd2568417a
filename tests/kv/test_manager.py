"""Finding, reserving, dropping and freeing pages of two groups: pages of 2 tokens, chunks of 4, a superpage is 3 global pages or 1 local one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from l4core.errors import ConfigError
from l4core.kv.blocks import KVGroup
from l4core.kv.manager import KVManager
from l4core.kv.prefix import PageHashes
from l4core.kv.tables import NEVER, PageTables

GLOBAL = KVGroup(name="global", layer_ids=(3,), chunk_size=None)
LOCAL = KVGroup(name="local", layer_ids=(0, 1, 2), chunk_size=4)
COUNT = list(range(1000))


class Emptied(list[tuple[str, list[int]]]):
    def note(self, group: str, pages: Sequence[int]) -> None:
        self.append((group, list(pages)))


@pytest.fixture
def emptied() -> Emptied:
    return Emptied()


def manager(
    superpages: int = 8,
    *,
    note: Emptied | None = None,
    prefix_cache: bool = True,
    max_local: int | None = None,
    hybrid: bool = True,
) -> KVManager:
    """With so many usable superpages."""
    on_empty = note.note if note is not None else None
    groups = [GLOBAL, replace(LOCAL, keep_all=not hybrid)]
    return KVManager(groups, 2, superpages + 1, prefix_cache=prefix_cache, max_local=max_local, on_empty=on_empty)


def hashes(tokens: Sequence[int] = COUNT, salt: str = "") -> PageHashes:
    return PageHashes(salt, 2, lambda begin, end: tokens[begin:end])


def pages(tables: PageTables) -> list[list[int]]:
    return [table.pages for table in tables.tables]


def grow(kv: KVManager, tables: PageTables, length: int, chain: PageHashes) -> None:
    """One token a step, from the capacity on, as a decode grows."""
    for upto in range(tables.capacity + 1, length + 1):
        assert kv.reserve(tables, upto) is not None
        kv.commit(tables, upto, chain)
    kv.commit(tables, length, chain)


def test_a_reservation_reports_only_what_is_new() -> None:
    kv = manager()
    tables = kv.new_tables()
    assert kv.reserve(tables, 3) == {"global": (0, [3, 4]), "local": (0, [2, 3])}
    assert kv.reserve(tables, 4) == {}
    assert tables.capacity == 4
    kv.commit(tables, 4, hashes())
    assert kv.reserve(tables, 5) == {"global": (2, [5]), "local": (2, [4])}
    assert kv.num_available == 8 - 2  # superpage 1 and the new local one are held; the two local ones before are cached


def test_what_cannot_be_given_whole_is_not_given() -> None:
    kv = manager(5)
    first, second = kv.new_tables(), kv.new_tables()
    assert kv.reserve(first, 4) is not None
    assert kv.num_available == 2
    assert kv.reserve(second, 3) is None
    assert kv.num_available == 2
    assert pages(second) == [[], []]
    assert second.capacity == 0
    assert kv.reserve(second, 2) is not None
    kv.check_integrity([first, second])


@pytest.mark.parametrize(("length", "dropped"), [(3, []), (4, [4, 3]), (5, [4, 3]), (8, [6, 5, 4, 3])])
def test_local_pages_go_when_the_committed_length_enters_a_new_chunk(
    emptied: Emptied, length: int, dropped: list[int]
) -> None:
    kv = manager(note=emptied, prefix_cache=False)
    tables = kv.new_tables()
    assert kv.reserve(tables, 8) is not None  # two chunks, as a verify across a border holds
    kv.commit(tables, length, hashes())
    assert emptied == [("local", [page]) for page in dropped]
    assert pages(tables)[1] == [page for page in [3, 4, 5, 6] if page not in dropped]
    assert tables.tables[1].first_index == len(dropped)
    kv.check_integrity([tables])


def test_a_reservation_alone_drops_nothing(emptied: Emptied) -> None:
    """Drafts may be thrown away, so a chunk stays until tokens behind it are committed."""
    kv = manager(note=emptied, prefix_cache=False)
    tables = kv.new_tables()
    assert kv.reserve(tables, 3) is not None
    kv.commit(tables, 3, hashes())
    assert kv.reserve(tables, 7) is not None
    kv.commit(tables, 3, hashes())
    assert emptied == []


def test_drafts_take_no_memory_that_others_need() -> None:
    kv = manager(5)
    tables = kv.new_tables()
    assert kv.reserve(tables, 3) is not None  # one global superpage and two local ones
    assert kv.reserve(tables, 6, leave=2) is None
    assert (tables.capacity, kv.num_available) == (4, 2)
    assert kv.reserve(tables, 6, leave=1) == {"global": (2, [5]), "local": (2, [4])}
    assert kv.reserve(tables, 6, leave=5) == {}, "it has the slots already"


def test_slots_of_refused_drafts_are_written_again(emptied: Emptied) -> None:
    """Four guesses at 3 tokens, over the border at 4; one is accepted, then all."""
    kv = manager(note=emptied)
    tables, tokens = kv.new_tables(), list(COUNT)
    grow(kv, tables, 3, hashes(tokens))
    assert kv.reserve(tables, 8) is not None
    held = list(pages(tables)[1])
    kv.commit(tables, 4, hashes(tokens))
    assert pages(tables)[1] == held[2:], "the chunk before is over, the next one's slots are still there"
    assert kv.find_prefix(hashes(tokens), 8) == 4, "pages of refused drafts are nobody's prefix"
    assert kv.reserve(tables, 8) == {}
    kv.commit(tables, 8, hashes(tokens))
    assert kv.find_prefix(hashes(tokens), 8) == 8
    assert emptied == []
    kv.check_integrity([tables])


def test_a_third_chunk_has_no_column_in_the_ring() -> None:
    kv = manager()
    with pytest.raises(ValueError, match="more than two chunks of 4"):
        kv.reserve(kv.new_tables(), 9)
    assert kv.num_available == 8


def test_more_than_was_reserved_cannot_be_committed() -> None:
    kv = manager()
    tables = kv.new_tables()
    assert kv.reserve(tables, 4) is not None
    with pytest.raises(ValueError, match="9 tokens committed, but slots are reserved for 4"):
        kv.commit(tables, 9, hashes())


def test_release_frees_all_and_the_tables_start_anew(emptied: Emptied) -> None:
    kv = manager(note=emptied, prefix_cache=False)
    tables = kv.new_tables()
    grow(kv, tables, 6, hashes())
    emptied.clear()
    kv.release(tables)
    assert emptied == [("local", [2]), ("global", [5]), ("global", [4]), ("global", [3])]
    assert tables == kv.new_tables()
    assert kv.num_available == 8
    assert kv.pages_used == {"global": 0, "local": 0}
    assert kv.pages_total == {"global": 24, "local": 8}


def test_a_long_request_holds_one_chunk_of_local_pages_at_most() -> None:
    kv = manager(10)
    tables, chain = kv.new_tables(), hashes()
    for length in range(1, 25):
        assert kv.reserve(tables, length) is not None
        assert len(tables.tables[1].pages) <= 2
        kv.commit(tables, length, chain)
        assert len(tables.tables[1].pages) == -(-(length % 4) // 2)
        assert kv.held(tables) == [math.ceil(length / 6), math.ceil(length % 4 / 2)]
        kv.check_integrity([tables])


def test_needed_counts_what_is_missing_at_the_peak() -> None:
    kv = manager(prefix_cache=False)
    tables = kv.new_tables()
    assert kv.needed(tables, 0, 3) == [1, 2]
    assert kv.needed(tables, 0, 16) == [3, 2]
    assert kv.reserve(tables, 3) is not None
    kv.commit(tables, 3, hashes())
    assert kv.needed(tables, 3, 4) == [0, 0]
    assert kv.needed(tables, 3, 6) == [0, 0]
    assert kv.needed(tables, 3, 16) == [2, 0]


def test_a_plain_cache_keeps_every_chunk_until_the_end(emptied: Emptied) -> None:
    """--disable-hybrid-swa-memory: a local page costs what a global one costs in tokens."""
    kv = manager(20, note=emptied, hybrid=False, prefix_cache=False)
    tables = kv.new_tables()
    grow(kv, tables, 19, hashes())
    assert emptied == []
    assert [len(held) for held in pages(tables)] == [10, 10]
    assert kv.held(tables) == [4, 10]
    assert kv.needed(kv.new_tables(), 0, 19) == [4, 10]
    assert kv.largest_alone() == 31  # 5 superpages of global pages and 15 local ones; the last token needs no slot
    kv.check_integrity([tables])
    kv.release(tables)
    assert kv.num_available == 20


def test_local_pages_stop_at_their_cap() -> None:
    kv = manager(10, max_local=3)
    first, second = kv.new_tables(), kv.new_tables()
    assert kv.reserve(first, 4) is not None
    assert not kv.has_room([0, 2])
    assert kv.has_room([6, 1])
    assert not kv.has_room([8, 0])
    assert kv.reserve(second, 4) is None, "it would be the fourth local superpage"
    assert kv.reserve(second, 2) is not None
    assert kv.pages_total == {"global": 30, "local": 3}
    kv.check_integrity([first, second])
    kv.release(first)
    assert kv.reserve(second, 4) is not None
    assert not manager(10, max_local=1).could_finish_alone(9)
    assert manager(10, max_local=2).could_finish_alone(9)


def test_could_finish_alone_is_exact() -> None:
    """Two local superpages, the rest global: 3 of them hold 9 pages, 18 tokens, and the 19th needs no slot."""
    kv = manager(5)
    assert kv.largest_alone() == 19
    assert kv.could_finish_alone(19)
    assert not kv.could_finish_alone(20)
    narrow = manager(2)  # one local page: less than a chunk
    assert narrow.largest_alone() == 3
    local_only = KVManager([LOCAL], 2, 3)
    assert local_only.largest_alone() == NEVER
    assert local_only.could_finish_alone(10**7)


def test_what_is_found_is_what_the_rule_says() -> None:
    """Global pages up to L, local ones from L's last border on."""
    kv = manager(20)
    tables, chain = kv.new_tables(), hashes()
    grow(kv, tables, 11, chain)  # pages 0 … 4 are full; the chunk [8, 12) has one full local page
    for limit, length in ((0, 0), (1, 0), (2, 2), (5, 4), (8, 8), (9, 8), (10, 10), (11, 10), (500, 10)):
        assert kv.find_prefix(hashes(), limit) == length
    assert kv.find_prefix(hashes([0, 1, 2, 3, 9, 9, 9, 9]), 8) == 4
    assert kv.find_prefix(hashes([9, *COUNT]), 8) == 0
    assert kv.find_prefix(hashes(salt="another tenant"), 8) == 0


def test_a_prefix_without_its_local_tail_ends_at_the_border() -> None:
    """Local pages of a chunk are evicted from its end, so what is left of it is still a prefix."""
    kv = manager(6)
    tables, chain = kv.new_tables(), hashes()
    grow(kv, tables, 8, chain)  # two superpages of global pages; four local pages, all cached
    kv.release(tables)
    assert kv.find_prefix(hashes(), 7) == 6
    other = kv.new_tables()
    grow(kv, other, 1, hashes([99, 98]))  # takes two superpages: evicts pages 3 and 2 … of the chunk that ended first
    assert kv.find_prefix(hashes(), 8) == 8
    assert kv.find_prefix(hashes(), 3) == 0


def test_a_taken_prefix_is_shared_until_both_are_gone(emptied: Emptied) -> None:
    kv = manager(20, note=emptied)
    first, chain = kv.new_tables(), hashes()
    grow(kv, first, 7, chain)
    second = kv.new_tables()
    kv.take_prefix(second, hashes(), 6)
    assert pages(second) == [pages(first)[0][:3], pages(first)[1][:1]]
    assert (second.capacity, second.tables[1].first_index) == (6, 2)
    new = kv.reserve(second, 7)
    assert new is not None
    assert new["global"][0] == new["local"][0] == 3
    assert not set(new["global"][1]) & set(pages(first)[0])
    kv.check_integrity([first, second])
    kv.release(first)
    kv.check_integrity([second])
    kv.release(second)
    kv.flush()
    assert kv.num_available == 20
    assert kv.pages_cached == {"global": 0, "local": 0}
    assert kv.find_prefix(hashes(), 6) == 0


def test_a_scattered_prefix_may_not_fit_alone() -> None:
    """Three requests found and continued each other's pages: a fourth holds one page in each superpage, and could not grow in so little memory."""
    kv = manager(6)
    assert kv.could_finish_alone(19)
    chain = hashes()
    for length in (2, 4, 6):
        tables = kv.new_tables()
        kv.take_prefix(tables, chain, kv.find_prefix(chain, length - 1))
        assert kv.reserve(tables, length) is not None
        kv.commit(tables, length, chain)
        kv.release(tables)
    tables = kv.new_tables()
    kv.take_prefix(tables, chain, 4)
    assert kv.held(tables) == [2, 0]
    assert kv.fits_alone(tables, 4, 16)
    assert not kv.fits_alone(tables, 4, 22)


def test_without_the_prefix_cache_nothing_is_found() -> None:
    kv = manager(prefix_cache=False)
    tables = kv.new_tables()
    grow(kv, tables, 8, hashes())
    assert kv.find_prefix(hashes(), 8) == 0
    kv.release(tables)
    assert kv.pages_cached == {"global": 0, "local": 0}


def test_a_model_without_chunks_has_one_group() -> None:
    kv = KVManager([GLOBAL], 2, 9)
    tables = kv.new_tables()
    assert kv.reserve(tables, 16) == {"global": (0, [1, 2, 3, 4, 5, 6, 7, 8])}
    kv.commit(tables, 16, hashes())
    assert kv.find_prefix(hashes(), 15) == 14
    assert kv.chunk_size is None


def test_wrong_groups_and_page_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="does not divide"):
        KVManager([LOCAL], 3, 5)
    with pytest.raises(ValueError, match="one chunk size"):
        KVManager([LOCAL, KVGroup(name="wide", layer_ids=(5,), chunk_size=8)], 2, 5)


def test_two_tables_with_one_page_are_found() -> None:
    kv = manager()
    first, second = kv.new_tables(), kv.new_tables()
    assert kv.reserve(first, 2) is not None
    second.tables[0].pages.append(first.tables[0].pages[0])
    with pytest.raises(RuntimeError, match="1 users in the books and 2 in the tables"):
        kv.check_integrity([first, second])
