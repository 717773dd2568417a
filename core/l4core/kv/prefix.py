"""Finding computed tokens again: pages named by a hash of all tokens up to their end. Torch-free.

The hash of page i covers the salt and every token of pages 0 … i (SHA-256, chained), so equal hashes mean equal contents: keys and values of a
token depend on the tokens before it and nothing else. A salt of its own keeps a tenant's pages from being found, or probed for, by another.
A draft that reads each position with the token after it (EAGLE3) keeps its entries in the same pages: then a page's hash covers that token too.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from hashlib import sha256


class PageHashes:
    """The chain of one sequence, computed as far as someone asked. Tokens of finished pages never change.

    num_ahead: tokens behind a page that its contents depend on.
    num_found: the first pages, as many as the last search found in every group that keeps all; some may have been evicted since.
    """

    __slots__ = ("_chain", "_page_size", "_seed", "_tokens", "num_ahead", "num_found")

    def __init__(
        self, salt: str, page_size: int, tokens: Callable[[int, int], Sequence[int]], *, num_ahead: int = 0
    ) -> None:
        """tokens(begin, end): the sequence's own."""
        self.num_ahead = num_ahead
        self._seed = sha256(b"l4 page" + salt.encode()).digest()
        self._page_size = page_size
        self._tokens = tokens
        self._chain: list[bytes] = []
        self.num_found = 0

    def __getitem__(self, index: int) -> bytes:
        """Hash of page `index`, whose tokens must all be known, and `num_ahead` behind them."""
        while len(self._chain) <= index:
            begin = len(self._chain) * self._page_size
            size = self._page_size + self.num_ahead
            tokens = array("q", self._tokens(begin, begin + size))
            assert len(tokens) == size, "a page is hashed when all that it depends on is known"
            self._chain.append(sha256((self._chain[-1] if self._chain else self._seed) + tokens.tobytes()).digest())
        return self._chain[index]


class PrefixIndex:
    """hash → page and back, for one group."""

    __slots__ = ("_hash_of", "_page_of")

    def __init__(self) -> None:
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._page_of)

    def find(self, key: bytes) -> int | None:
        """The page that holds these tokens, None when there is none."""
        return self._page_of.get(key)

    def add(self, key: bytes, page: int) -> bool:
        """→ whether the page can be found by this hash from now on; False where another page has the same contents already."""
        if key in self._page_of:
            return self._page_of[key] == page
        self._page_of[key] = page
        self._hash_of[page] = key
        return True

    def drop(self, page: int) -> None:
        """The page's contents are gone."""
        key = self._hash_of.pop(page, None)
        if key is not None:
            del self._page_of[key]
