"""Page accounting shared by all of kv/: the KV group record and the page pool. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from l4core.errors import ConfigError

NULL_PAGE = 0
"""Valid, finite memory that no request owns: padding rows read and write it, so it is never handed out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVGroup:
    """Layers that share one block table. name: "global" or "local".  chunk_size: tokens, None = every earlier token is visible."""

    name: str
    layer_ids: tuple[int, ...]
    chunk_size: int | None

    def peak_pages(self, begin: int, end: int, page_size: int) -> int:
        """Most pages one request holds at once while its length grows from `begin` to `end` tokens (0 ≤ begin ≤ end).

        Without chunks: all pages of `end` tokens.  With chunks: those of the current chunk, which is full once `end` lies behind a border.
        """
        if self.chunk_size is None:
            return -(-end // page_size)
        tokens = end - begin // self.chunk_size * self.chunk_size
        return -(-min(tokens, self.chunk_size) // page_size)


def check_page_size(groups: Iterable[KVGroup], page_size: int) -> None:
    """Raises ConfigError unless `page_size` (tokens) divides the chunk of every chunked group: a page never holds two chunks."""
    if page_size < 1:
        raise ConfigError(f"page size is {page_size}; wanted at least 1 token", fix="--page-size 64")
    for group in groups:
        chunk = group.chunk_size
        if chunk is not None and chunk % page_size:
            near = max(size for size in range(1, min(page_size, chunk) + 1) if chunk % size == 0)
            raise ConfigError(
                f"page size {page_size} does not divide the attention chunk of {chunk} tokens",
                fix=f"--page-size {near}",
            )


class BlockPool:
    """Hands out page ids 1 … num_pages − 1 and counts their users. Every call is O(1) per page and deterministic.

    A fresh page has one user, who alone may write it. `retain` adds readers (a shared prefix); the last `release` frees the page.
    """

    __slots__ = ("_free", "_users", "num_pages")

    def __init__(self, num_pages: int) -> None:
        """num_pages: pages in memory, the null page among them; at least 2."""
        if num_pages < 2:
            raise ValueError(f"a pool of {num_pages} pages holds nothing; wanted the null page and at least one more")
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, NULL_PAGE, -1))  # a stack: the page freed last is the warmest in cache
        self._users = [0] * num_pages

    @property
    def num_usable(self) -> int:
        """Pages that can be handed out in all."""
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        """Pages that can be handed out now."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages with at least one user."""
        return self.num_usable - len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages with one user each, or None, and nothing taken, when fewer are free."""
        if count > len(self._free):
            return None
        if count == 0:
            return []
        pages = self._free[: -count - 1 : -1]
        del self._free[-count:]
        for page in pages:
            self._users[page] = 1
        return pages

    def retain(self, pages: Sequence[int]) -> None:
        """One more user for each page. Raises ValueError for a page that nobody holds."""
        for page in pages:
            self._check_held(page)
            self._users[page] += 1

    def release(self, pages: Sequence[int]) -> list[int]:
        """One user less for each page → those that nobody holds any more. Raises ValueError for a page that nobody holds."""
        freed = []
        for page in pages:
            self._check_held(page)
            self._users[page] -= 1
            if not self._users[page]:
                freed.append(page)
        self._free.extend(reversed(freed))  # so that a request's pages come back in their order
        return freed

    def users(self, page: int) -> int:
        """How many hold this page."""
        return self._users[page]

    def check_integrity(self, held: Iterable[Sequence[int]]) -> None:
        """Compare the books with `held`, the pages of every live table. Raises RuntimeError naming the first difference."""
        free = set(self._free)
        if len(free) != len(self._free) or NULL_PAGE in free or any(self._users[page] for page in free):
            raise RuntimeError("the free list holds a page twice, a page in use or the null page")
        counted = Counter(page for pages in held for page in pages)
        for page in range(1, self.num_pages):
            if self._users[page] != counted[page]:
                raise RuntimeError(
                    f"page {page} has {self._users[page]} users in the books and {counted[page]} in the tables"
                )
            if not self._users[page] and page not in free:
                raise RuntimeError(f"page {page} leaked: nobody holds it and it is not free")
        if counted[NULL_PAGE]:
            raise RuntimeError("a table holds the null page")

    def _check_held(self, page: int) -> None:
        if not 0 < page < self.num_pages or not self._users[page]:
            raise ValueError(f"page {page} of {self.num_pages} is not held by anyone")
