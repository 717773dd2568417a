"""Who holds which page: finds computed prefixes, reserves slots before a step, drops local pages of finished chunks after it. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

from l4core.kv.blocks import NULL_PAGE, KVGroup, check_page_size
from l4core.kv.prefix import PageHashes, PrefixIndex
from l4core.kv.superpages import NULL_SUPERPAGE, SuperpagePool, superpage_shape
from l4core.kv.tables import NEVER, PageTable, PageTables

NewEntries = Mapping[str, tuple[int, Sequence[int]]]
"""Group name → (first page index, pages) that a reservation added."""
NOTHING: NewEntries = MappingProxyType({})
Superpages = Sequence[int]
"""Counts by group, in the groups' order."""


class KVManager:
    """Page accounting of all requests. Memory is counted in superpages (kv.superpages), which every group can use."""

    def __init__(
        self,
        groups: Sequence[KVGroup],
        page_size: int,
        num_superpages: int,
        *,
        prefix_cache: bool = True,
        num_ahead: int = 0,
        max_local: int | None = None,
        on_empty: Callable[[str, Sequence[int]], None] | None = None,
    ) -> None:
        """num_superpages: in memory, the null one among them.  prefix_cache: whether computed pages can be found again.
        num_ahead: tokens behind a page that its contents depend on: 1 with a draft that reads each position with the token after it.
        max_local: superpages of local pages at most, cached ones among them; None = as many as there are.
        on_empty(group name, pages) is told of every page whose contents nobody can reach any more (tests poison them).
        Raises ConfigError for a page size that does not divide a chunk."""
        check_page_size(groups, page_size)
        chunks = {group.chunk_size for group in groups if group.chunk_size is not None}
        if len(chunks) > 1 or not groups:
            raise ValueError(f"groups have chunks of {sorted(chunks)} tokens; wanted one chunk size and a group")
        self.groups = tuple(groups)
        self.page_size = page_size
        self.chunk_size = chunks.pop() if chunks else None
        self.prefix_cache = prefix_cache
        self.num_ahead = num_ahead
        self._on_empty = on_empty
        shape = superpage_shape(groups)
        self._pages_per = tuple(shape.pages[group.name] for group in groups)
        most = [None if group.chunk_size is None else max_local for group in groups]
        self._pool = SuperpagePool(num_superpages, self._pages_per, self._empty, most)
        self._index = [PrefixIndex() for _ in groups]

    # --- one request's life -----------------------------------------------------------------------------------------------------------

    def new_tables(self) -> PageTables:
        """Empty tables of a request that has computed nothing."""
        tables = PageTables(tables=[PageTable() for _ in self.groups])
        self._set_next_commit(tables, 0)
        return tables

    def find_prefix(self, hashes: PageHashes, limit: int, *, from_last: bool = False) -> int:
        """Tokens, at most `limit`, whose pages can be used as they are: a whole number of pages. Takes nothing.

        Length L is usable when global pages cover [0, L) and local pages [⌊L / C⌋ · C, L): at a border no local page is needed.
        from_last: go on where the last search for these hashes ended, so that asking again costs nothing for what was found before. What was
        evicted since still counts then: an upper bound.
        """
        if not self.prefix_cache:
            return 0
        most = limit // self.page_size
        count = min(hashes.num_found, most) if from_last else 0
        locals_ = [index for group, index in zip(self.groups, self._index, strict=True) if group.chunk_size is not None]
        globals_ = [index for group, index in zip(self.groups, self._index, strict=True) if group.chunk_size is None]
        if not globals_:
            return 0
        while count < most and all(index.find(hashes[count]) is not None for index in globals_):
            count += 1
        hashes.num_found = count
        if self.chunk_size is None:
            return count * self.page_size
        found = count * self.page_size // self.chunk_size * self.chunk_size // self.page_size  # the last border
        while found < count and all(index.find(hashes[found]) is not None for index in locals_):
            found += 1
        return found * self.page_size

    def take_prefix(self, tables: PageTables, hashes: PageHashes, length: int) -> None:
        """The first `length` tokens, as `find_prefix` found them, become the request's own. The tables must be empty."""
        end = length // self.page_size
        for number, (group, table) in enumerate(zip(self.groups, tables.tables, strict=True)):
            table.first_index = self._first_needed(group, length)
            for index in range(table.first_index, end):
                page = self._index[number].find(hashes[index])
                assert page is not None, "find_prefix said it is here"
                self._pool.retain(number, page)
                table.pages.append(page)
        tables.capacity = length
        tables.num_hashed = end
        self._set_next_commit(tables, length)

    def reserve(self, tables: PageTables, upto_len: int, *, leave: int = 0) -> NewEntries | None:
        """Slots for the request's first `upto_len` tokens → the entries that are new, or None, and nothing taken, when memory cannot give.

        Drafts: reserve for the committed tokens and all k + 1 in flight, then `commit` what was accepted. Until then both sides of a border are
        held. There is nothing to roll back: no later page is offered to the prefix cache, no chunk dropped, and slots behind the committed length
        stay the request's, to be written again by the tokens that do come; `release` gives back all of them.
        leave: superpages that must stay available to others afterwards, so that guesses do not take what their next tokens need.

        Raises ValueError when a local table would hold more than two chunks: its ring has no column for a third.
        """
        if upto_len <= tables.capacity:
            return NOTHING
        end = -(-upto_len // self.page_size)
        self._check_ring(tables, end)
        wanted = [self._superpages_for(n, table, end) for n, table in enumerate(tables.tables)]
        if any(wanted) and not self.has_room(wanted, leave=leave):
            return None
        new: dict[str, tuple[int, Sequence[int]]] = {}
        for number, (group, table) in enumerate(zip(self.groups, tables.tables, strict=True)):
            first = table.end_index
            if first < end:
                pages = [self._new_page(number, table, index) for index in range(first, end)]
                new[group.name] = (first, pages)
        tables.capacity = end * self.page_size
        return new

    def commit(self, tables: PageTables, length: int, hashes: PageHashes) -> None:
        """The first `length` tokens are computed and stay (drafts do not count): full pages can be found from now on, and local pages of chunks
        that end there or before are dropped.

        The next query stands at position `length` or later, so it reads no key before ⌊length / C⌋ · C.
        """
        if length < tables.next_commit:
            return
        if length > tables.capacity:
            raise ValueError(f"{length} tokens committed, but slots are reserved for {tables.capacity}")
        if self.prefix_cache:
            self._publish(tables, length // self.page_size, hashes)
        for number, (group, table) in enumerate(zip(self.groups, tables.tables, strict=True)):
            first = 0 if group.keep_all else self._first_needed(group, length)
            if first > table.first_index:
                dead = table.pages[: first - table.first_index]
                del table.pages[: len(dead)]
                table.first_index = first
                self._release(number, dead, left_behind=True)
        self._set_next_commit(tables, length)

    def release(self, tables: PageTables) -> None:
        """The request ended or is preempted: all its pages go, and the tables are as new.

        Local pages first, so that they are evicted first: they save a later request one chunk at most, global ones all that went before.
        """
        for number in sorted(range(len(self.groups)), key=lambda n: self.groups[n].chunk_size is None):
            table = tables.tables[number]
            self._release(number, table.pages)
            table.first_index, table.pages, table.next_page, table.num_spare = 0, [], 0, 0
        tables.capacity = tables.num_hashed = 0
        self._set_next_commit(tables, 0)

    # --- what there is and what is needed ----------------------------------------------------------------------------------------------

    def needed(self, tables: PageTables, begin: int, end: int) -> Superpages:
        """Superpages that a request with `begin` tokens computed still lacks to grow to `end` tokens, at its peak. Never negative.

        Exact for a request that shares nothing; a shared local page is not free when this request drops it, which only a later step can tell.
        """
        return [self._peak(number, table, begin, end) for number, table in enumerate(tables.tables)]

    def held(self, tables: PageTables) -> Superpages:
        """Superpages in which the request holds a page; the most that its end can free."""
        return [
            len({page // per for page in table.pages})
            for table, per in zip(tables.tables, self._pages_per, strict=True)
        ]

    def has_room(self, wanted: Superpages, *, leave: int = 0) -> bool:
        """Whether so many superpages can be taken now, and `leave` more by anyone after that."""
        if sum(wanted) + leave > self._pool.num_available:
            return False
        return all(count <= self._pool.allowance(number) for number, count in enumerate(wanted))

    def fits_alone(self, tables: PageTables, begin: int, end: int) -> bool:
        """Whether a request that holds these pages could grow to `end` tokens if all others were gone."""
        needed = self.needed(tables, begin, end)
        whole = [held + more for held, more in zip(self.held(tables), needed, strict=True)]
        if sum(whole) > self._pool.num_usable:
            return False
        return all(count <= self._pool.most(number) for number, count in enumerate(whole))

    def could_finish_alone(self, max_total_tokens: int) -> bool:
        """Whether empty memory holds a request of that many tokens (prompt + output). Nothing is computed after the last token."""
        return self.fits_alone(self.new_tables(), 0, max_total_tokens - 1)

    def largest_alone(self) -> int:
        """Most total tokens that one request in empty memory can have; NEVER when no group keeps everything."""
        low, high = 1, self._pool.num_usable * max(self._pages_per) * self.page_size + 2
        if self.could_finish_alone(high):
            return NEVER
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.could_finish_alone(middle) else (low, middle)
        return low

    @property
    def num_available(self) -> int:
        """Superpages that can be taken now, those of cached prefixes among them."""
        return self._pool.num_available

    @property
    def pages_used(self) -> dict[str, int]:
        """Group name → pages that requests hold."""
        return {group.name: held for group, held in zip(self.groups, self._pool.held_pages, strict=True)}

    @property
    def pages_cached(self) -> dict[str, int]:
        """Group name → pages that nobody holds and a prefix can still be found in."""
        return {group.name: cached for group, cached in zip(self.groups, self._pool.cached_pages, strict=True)}

    @property
    def pages_total(self) -> dict[str, int]:
        """Group name → pages, had it all superpages that it may have (without the null one)."""
        return {
            group.name: self._pool.most(number) * self._pages_per[number] for number, group in enumerate(self.groups)
        }

    def flush(self) -> None:
        """Forget all cached prefixes; pages that requests hold stay theirs, and findable."""
        self._pool.flush()

    def check_integrity(self, live: Iterable[PageTables]) -> None:
        """Compare the pool with the tables of all live requests. Raises RuntimeError naming what leaked or is held twice."""
        everyone = list(live)
        for number, group in enumerate(self.groups):
            counted = Counter(page for tables in everyone for page in tables.tables[number].pages)
            if any(page // self._pages_per[number] == NULL_SUPERPAGE for page in counted):
                raise RuntimeError(f"a {group.name} table holds the null page {NULL_PAGE} or a neighbour of it")
            self._pool.check_integrity(number, counted)

    # --- inside ------------------------------------------------------------------------------------------------------------------------

    def _first_needed(self, group: KVGroup, length: int) -> int:
        """First page index that a query at position `length` or later may read."""
        if group.chunk_size is None:
            return 0
        return length // group.chunk_size * group.chunk_size // self.page_size

    def _set_next_commit(self, tables: PageTables, length: int) -> None:
        after = NEVER
        if self.prefix_cache:
            after = (length // self.page_size + 1) * self.page_size
        elif self.chunk_size is not None:
            after = (length // self.chunk_size + 1) * self.chunk_size
        tables.next_commit = after
        tables.chunk_begin = length // self.chunk_size * self.chunk_size if self.chunk_size is not None else 0

    def _publish(self, tables: PageTables, count: int, hashes: PageHashes) -> None:
        """Offer the contents of pages num_hashed … count − 1 to later requests."""
        for index in range(tables.num_hashed, count):
            key = hashes[index]
            for number, table in enumerate(tables.tables):
                if index >= table.first_index:
                    page = table.pages[index - table.first_index]
                    if self._index[number].add(key, page):
                        self._pool.keep(number, page)
        tables.num_hashed = max(count, tables.num_hashed)

    def _new_page(self, number: int, table: PageTable, index: int) -> int:
        if not table.num_spare or self._starts_chunk(number, index):
            superpage = self._pool.take(number)
            assert superpage is not None, "reserve counted what is needed"
            per = self._pages_per[number]
            table.next_page, table.num_spare = superpage * per, per
        page = table.next_page
        table.next_page, table.num_spare = page + 1, table.num_spare - 1
        self._pool.retain(number, page)
        table.pages.append(page)
        return page

    def _starts_chunk(self, number: int, index: int) -> bool:
        """A local superpage holds pages of one chunk, so that it is free as soon as the chunk is over."""
        chunk = self.groups[number].lifetime
        return chunk is not None and index * self.page_size % chunk == 0

    def _superpages_for(self, number: int, table: PageTable, end: int) -> int:
        """New superpages for the page indices from the table's end up to `end`."""
        per, chunk = self._pages_per[number], self.groups[number].lifetime
        index, spare, count = table.end_index, table.num_spare, 0
        if chunk is None:
            return -(-max(0, end - index - spare) // per)
        per_chunk = chunk // self.page_size
        while index < end:
            stop = min(end, (index // per_chunk + 1) * per_chunk)
            spare = 0 if index % per_chunk == 0 else spare
            count += -(-max(0, stop - index - spare) // per)
            index = stop
        return count

    def _peak(self, number: int, table: PageTable, begin: int, end: int) -> int:
        chunk = self.groups[number].lifetime
        if chunk is None:
            return self._superpages_for(number, table, max(table.end_index, -(-end // self.page_size)))
        border = (begin // chunk + 1) * chunk
        now = self._superpages_for(number, table, max(table.end_index, -(-min(end, border) // self.page_size)))
        if end <= border:
            return now
        per = self._pages_per[number]
        later = -(-min(end - border, chunk) // self.page_size)
        whole = -(-later // per) - len({page // per for page in table.pages})
        return max(now, whole)

    def _release(self, number: int, pages: Sequence[int], *, left_behind: bool = False) -> None:
        """Last page first: what is evicted first is the end of a prefix, whose beginning stays useful."""
        for page in reversed(pages):
            self._pool.release(number, page, left_behind=left_behind)

    def _empty(self, number: int, pages: Sequence[int]) -> None:
        for page in pages:
            self._index[number].drop(page)
        if self._on_empty is not None:
            self._on_empty(self.groups[number].name, pages)

    def _check_ring(self, tables: PageTables, end: int) -> None:
        if self.chunk_size is not None and end * self.page_size - tables.chunk_begin > 2 * self.chunk_size:
            first = tables.chunk_begin // self.page_size
            raise ValueError(
                f"local pages {first} … {end - 1} of {self.page_size} tokens span more than two chunks of {self.chunk_size}"
            )
