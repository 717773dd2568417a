"""What all of kv/ shares: the KV group record, the null page, the rule for page sizes. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from l4core.errors import ConfigError

NULL_PAGE = 0
"""Valid, finite memory that no request owns: padding rows read and write it, so it is never handed out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVGroup:
    """Layers that share one block table. name: "global" or "local".  chunk_size: tokens, None = every earlier token is visible.
    keep_all: pages of finished chunks stay until the request ends all the same, as in a cache that knows nothing of chunks."""

    name: str
    layer_ids: tuple[int, ...]
    chunk_size: int | None
    keep_all: bool = False

    @property
    def lifetime(self) -> int | None:
        """A page is dropped when the chunk of so many tokens that it lies in is over; None: when the request ends."""
        return None if self.keep_all else self.chunk_size


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
