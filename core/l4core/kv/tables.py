"""One request's block tables: which page holds page index i = position // page_size, per KV group. Torch-free.

A global table keeps every page of the request. A local table keeps the chunks that may still be read: one between steps, two at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

NEVER = 1 << 62
"""A length no request reaches."""


@dataclass(slots=True, kw_only=True)
class PageTable:
    """Pages of page indices first_index, first_index + 1, … of one group. next_page: the page to use next, in the superpage that this table
    took last; num_spare: how many are left there."""

    first_index: int = 0
    pages: list[int] = field(default_factory=list)
    next_page: int = 0
    num_spare: int = 0

    @property
    def end_index(self) -> int:
        """The page index after the last one held."""
        return self.first_index + len(self.pages)


@dataclass(slots=True, kw_only=True)
class PageTables:
    """One table per KV group, in the groups' order.

    capacity: tokens whose slots are reserved in every group.  num_hashed: pages whose contents were offered to the prefix cache.
    chunk_begin: first token of the chunk that the next query lies in, by the committed length.
    next_commit: committed length at which something is to be done next (a page is full, a chunk is over), so that a decode step in the middle of
    a page costs two comparisons.
    """

    tables: Sequence[PageTable]
    capacity: int = 0
    num_hashed: int = 0
    chunk_begin: int = 0
    next_commit: int = NEVER
