"""Reserving, dropping and freeing pages of two groups: pages of 2 tokens, chunks of 4."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from l4core.errors import ConfigError
from l4core.kv.blocks import KVGroup
from l4core.kv.manager import KVManager
from l4core.kv.tables import NEVER, PageTables

GLOBAL = KVGroup(name="global", layer_ids=(3,), chunk_size=None)
LOCAL = KVGroup(name="local", layer_ids=(0, 1, 2), chunk_size=4)


class Freed(list[tuple[str, list[int]]]):
    def note(self, group: str, pages: Sequence[int]) -> None:
        self.append((group, list(pages)))


@pytest.fixture
def freed() -> Freed:
    return Freed()


@pytest.fixture
def kv(freed: Freed) -> KVManager:
    return KVManager([GLOBAL, LOCAL], 2, {"global": 9, "local": 5}, on_freed=freed.note)


def pages(tables: PageTables) -> list[list[int]]:
    return [table.pages for table in tables.tables]


def test_a_reservation_reports_only_what_is_new(kv: KVManager) -> None:
    tables = kv.new_tables()
    assert kv.reserve(tables, 3) == {"global": (0, [1, 2]), "local": (0, [1, 2])}
    assert kv.reserve(tables, 4) == {}
    assert tables.capacity == 4
    kv.commit(tables, 3)
    assert kv.reserve(tables, 5) == {"global": (2, [3]), "local": (2, [3])}


def test_a_pool_that_cannot_give_makes_the_other_give_nothing_either(kv: KVManager) -> None:
    first, second = kv.new_tables(), kv.new_tables()
    assert kv.reserve(first, 4) is not None
    assert kv.reserve(second, 4) is not None
    assert kv.num_free == (4, 0)
    third = kv.new_tables()
    assert kv.reserve(third, 1) is None
    assert kv.num_free == (4, 0)
    assert pages(third) == [[], []]
    assert third.capacity == 0


@pytest.mark.parametrize(("length", "dropped"), [(3, []), (4, [1, 2]), (5, [1, 2]), (8, [1, 2, 3, 4])])
def test_local_pages_go_when_the_committed_length_enters_a_new_chunk(
    kv: KVManager, freed: Freed, length: int, dropped: list[int]
) -> None:
    tables = kv.new_tables()
    assert kv.reserve(tables, 8) is not None  # two chunks, as a verify across a border holds
    kv.commit(tables, length)
    assert freed == ([("local", dropped)] if dropped else [])
    assert pages(tables) == [[1, 2, 3, 4], [page for page in [1, 2, 3, 4] if page not in dropped]]
    assert tables.tables[1].first_index == len(dropped)
    kv.check_integrity([tables])


def test_a_reservation_alone_drops_nothing(kv: KVManager, freed: Freed) -> None:
    """Drafts may be thrown away, so a chunk stays until tokens behind it are committed."""
    tables = kv.new_tables()
    assert kv.reserve(tables, 3) is not None
    kv.commit(tables, 3)
    assert kv.reserve(tables, 7) is not None
    assert freed == []
    kv.commit(tables, 3)
    assert freed == []


def test_a_third_chunk_has_no_column_in_the_ring(kv: KVManager) -> None:
    tables = kv.new_tables()
    with pytest.raises(ValueError, match="more than two chunks of 4"):
        kv.reserve(tables, 9)
    assert kv.num_free == (8, 4)


def test_more_than_was_reserved_cannot_be_committed(kv: KVManager) -> None:
    tables = kv.new_tables()
    assert kv.reserve(tables, 4) is not None
    with pytest.raises(ValueError, match="9 tokens committed, but slots are reserved for 4"):
        kv.commit(tables, 9)


def test_release_frees_all_and_the_tables_start_anew(kv: KVManager, freed: Freed) -> None:
    tables = kv.new_tables()
    assert kv.reserve(tables, 4) is not None
    kv.commit(tables, 4)
    assert kv.reserve(tables, 6) is not None
    freed.clear()
    kv.release(tables)
    assert freed == [("global", [1, 2, 3]), ("local", [1])]
    assert tables == kv.new_tables()
    assert kv.num_free == (8, 4)
    assert kv.pages_used == {"global": 0, "local": 0}
    assert kv.pages_total == {"global": 8, "local": 4}
    again = kv.reserve(tables, 2)
    assert again is not None
    assert again["local"][0] == 0


def test_a_long_request_holds_one_chunk_of_local_pages_at_most(kv: KVManager) -> None:
    tables = kv.new_tables()
    for length in range(1, 17):
        assert kv.reserve(tables, length) is not None
        assert len(tables.tables[1].pages) <= 2
        kv.commit(tables, length)
        assert len(tables.tables[1].pages) == -(-(length % 4) // 2)
        assert kv.held_pages(tables) == (-(-length // 2), -(-(length % 4) // 2))
    kv.check_integrity([tables])


def test_needed_pages_counts_what_is_missing_at_the_peak(kv: KVManager) -> None:
    tables = kv.new_tables()
    assert kv.needed_pages(tables, 0, 3) == (2, 2)
    assert kv.needed_pages(tables, 0, 16) == (8, 2)
    assert kv.reserve(tables, 3) is not None
    kv.commit(tables, 3)
    assert kv.needed_pages(tables, 3, 4) == (0, 0)
    assert kv.needed_pages(tables, 3, 16) == (6, 0)


def test_could_finish_alone_is_exact() -> None:
    """8 global pages of 2 tokens hold 16, and the 17th token needs no slot."""
    kv = KVManager([GLOBAL, LOCAL], 2, {"global": 9, "local": 3})
    assert kv.largest_alone() == 17
    assert kv.could_finish_alone(17)
    assert not kv.could_finish_alone(18)
    narrow = KVManager([GLOBAL, LOCAL], 2, {"global": 9, "local": 2})  # one local page: less than a chunk
    assert narrow.largest_alone() == 3
    assert narrow.could_finish_alone(3)
    assert not narrow.could_finish_alone(4)
    local_only = KVManager([LOCAL], 2, {"local": 3})
    assert local_only.largest_alone() == NEVER
    assert local_only.could_finish_alone(10**7)


def test_a_model_without_chunks_has_one_group(freed: Freed) -> None:
    kv = KVManager([GLOBAL], 2, {"global": 9}, on_freed=freed.note)
    tables = kv.new_tables()
    assert kv.reserve(tables, 16) == {"global": (0, [1, 2, 3, 4, 5, 6, 7, 8])}
    kv.commit(tables, 16)
    assert freed == []
    assert kv.chunk_size is None


def test_wrong_pools_and_page_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="does not divide"):
        KVManager([LOCAL], 3, {"local": 5})
    with pytest.raises(ValueError, match="wanted one for each"):
        KVManager([GLOBAL, LOCAL], 2, {"global": 9})
    with pytest.raises(ValueError, match="one chunk size"):
        KVManager([LOCAL, KVGroup(name="wide", layer_ids=(5,), chunk_size=8)], 2, {"local": 5, "wide": 5})


def test_two_tables_with_one_page_are_found(kv: KVManager) -> None:
    first, second = kv.new_tables(), kv.new_tables()
    assert kv.reserve(first, 2) is not None
    second.tables[0].pages.append(first.tables[0].pages[0])
    with pytest.raises(RuntimeError, match="1 users in the books and 2 in the tables"):
        kv.check_integrity([first, second])
