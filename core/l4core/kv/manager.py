"""Who holds which page: reserves slots before a step, drops local pages of finished chunks after it, frees all at the end. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

from l4core.kv.blocks import BlockPool, KVGroup, check_page_size
from l4core.kv.tables import NEVER, PageTable, PageTables

NewEntries = Mapping[str, tuple[int, Sequence[int]]]
"""Group name → (first page index, pages) that a reservation added."""
NOTHING: NewEntries = MappingProxyType({})


class KVManager:
    """Page accounting of all requests over one pool per KV group."""

    def __init__(
        self,
        groups: Sequence[KVGroup],
        page_size: int,
        num_pages: Mapping[str, int],
        *,
        on_freed: Callable[[str, Sequence[int]], None] | None = None,
    ) -> None:
        """num_pages: group name → pages, the null page among them.  on_freed(group name, pages) is told of every page nobody holds any more
        (tests poison them). Raises ConfigError for a page size that does not divide a chunk."""
        check_page_size(groups, page_size)
        if not groups or set(num_pages) != {group.name for group in groups} or len(num_pages) != len(groups):
            raise ValueError(
                f"pools are given for {sorted(num_pages)}; wanted one for each of {[g.name for g in groups]}"
            )
        self.groups = tuple(groups)
        self.page_size = page_size
        chunks = {group.chunk_size for group in groups if group.chunk_size is not None}
        if len(chunks) > 1:
            raise ValueError(f"groups have chunks of {sorted(chunks)} tokens; wanted one chunk size")
        self.chunk_size = chunks.pop() if chunks else None
        self._pools = [BlockPool(num_pages[group.name]) for group in groups]
        self._on_freed = on_freed

    def new_tables(self) -> PageTables:
        """Empty tables of a request that has computed nothing."""
        return PageTables(tables=[PageTable() for _ in self.groups], next_drop=self.chunk_size or NEVER)

    def reserve(self, tables: PageTables, upto_len: int) -> NewEntries | None:
        """Slots for the request's first `upto_len` tokens → the entries that are new, or None, and nothing taken, when a pool cannot give.

        Raises ValueError when a local table would hold more than two chunks: its ring has no column for a third.
        """
        if upto_len <= tables.capacity:
            return NOTHING
        end = -(-upto_len // self.page_size)
        missing = [max(0, end - table.end_index) for table in tables.tables]
        self._check_ring(tables, end)
        if any(count > pool.num_free for count, pool in zip(missing, self._pools, strict=True)):
            return None
        new: dict[str, tuple[int, Sequence[int]]] = {}
        for group, pool, table, count in zip(self.groups, self._pools, tables.tables, missing, strict=True):
            pages = pool.allocate(count)
            assert pages is not None
            if pages:
                new[group.name] = (table.end_index, pages)
                table.pages.extend(pages)
        tables.capacity = end * self.page_size
        return new

    def commit(self, tables: PageTables, length: int) -> None:
        """The first `length` tokens are computed and stay (drafts do not count): local pages of chunks that end there or before are dropped.

        The next query stands at position `length` or later, so it reads no key before ⌊length / C⌋ · C.
        """
        if length < tables.next_drop:
            return
        if length > tables.capacity:
            raise ValueError(f"{length} tokens committed, but slots are reserved for {tables.capacity}")
        assert self.chunk_size is not None
        border = length // self.chunk_size * self.chunk_size
        tables.next_drop = border + self.chunk_size
        for number, (group, table) in enumerate(zip(self.groups, tables.tables, strict=True)):
            if group.chunk_size is not None:
                dead = table.pages[: border // self.page_size - table.first_index]
                del table.pages[: len(dead)]
                table.first_index = border // self.page_size
                self._free(number, dead)

    def release(self, tables: PageTables) -> None:
        """The request ended or is preempted: all its pages go, and the tables are as new."""
        for number, table in enumerate(tables.tables):
            self._free(number, table.pages)
            table.first_index, table.pages = 0, []
        tables.capacity = 0
        tables.next_drop = self.chunk_size or NEVER

    def needed_pages(self, tables: PageTables, begin: int, end: int) -> tuple[int, ...]:
        """Pages per group that a request with `begin` tokens computed still lacks to grow to `end` tokens, at its peak. Never negative."""
        return tuple(
            max(0, group.peak_pages(begin, end, self.page_size) - len(table.pages))
            for group, table in zip(self.groups, tables.tables, strict=True)
        )

    def held_pages(self, tables: PageTables) -> tuple[int, ...]:
        """Pages per group that the request holds."""
        return tuple(len(table.pages) for table in tables.tables)

    def could_finish_alone(self, max_total_tokens: int) -> bool:
        """Whether empty pools hold a request of that many tokens (prompt + output). Nothing is computed after the last token, so it needs no slot."""
        needed = (group.peak_pages(0, max_total_tokens - 1, self.page_size) for group in self.groups)
        return all(count <= pool.num_usable for count, pool in zip(needed, self._pools, strict=True))

    def largest_alone(self) -> int:
        """Most total tokens that one request in empty pools can have; NEVER when no group keeps everything."""
        limits = [
            pool.num_usable * self.page_size + 1
            for group, pool in zip(self.groups, self._pools, strict=True)
            if group.chunk_size is None or pool.num_usable * self.page_size < group.chunk_size
        ]
        return min(limits, default=NEVER)

    @property
    def num_free(self) -> tuple[int, ...]:
        """Free pages per group, in the groups' order."""
        return tuple(pool.num_free for pool in self._pools)

    @property
    def pages_used(self) -> dict[str, int]:
        """Group name → pages in use."""
        return {group.name: pool.num_used for group, pool in zip(self.groups, self._pools, strict=True)}

    @property
    def pages_total(self) -> dict[str, int]:
        """Group name → pages that can be in use at once (without the null page)."""
        return {group.name: pool.num_usable for group, pool in zip(self.groups, self._pools, strict=True)}

    def check_integrity(self, live: Iterable[PageTables]) -> None:
        """Compare the pools with the tables of all live requests. Raises RuntimeError naming what leaked or is held twice."""
        everyone = list(live)
        for number, pool in enumerate(self._pools):
            pool.check_integrity(tables.tables[number].pages for tables in everyone)

    def _free(self, number: int, pages: Sequence[int]) -> None:
        freed = self._pools[number].release(pages)
        if freed and self._on_freed is not None:
            self._on_freed(self.groups[number].name, freed)

    def _check_ring(self, tables: PageTables, end: int) -> None:
        for group, table in zip(self.groups, tables.tables, strict=True):
            if group.chunk_size is not None and (end - table.first_index) * self.page_size > 2 * group.chunk_size:
                raise ValueError(
                    f"local pages {table.first_index} … {end - 1} of {self.page_size} tokens span more than two chunks of {group.chunk_size}"
                )
