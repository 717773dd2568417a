"""Hashes of pages cover everything before them; the index finds pages by them."""

from __future__ import annotations

import pytest

from l4core.kv.prefix import PageHashes, PrefixIndex


def hashes(tokens: list[int], salt: str = "", page_size: int = 2) -> PageHashes:
    return PageHashes(salt, page_size, lambda begin, end: tokens[begin:end])


def test_equal_beginnings_have_equal_hashes() -> None:
    a, b = hashes([1, 2, 3, 4, 5, 6]), hashes([1, 2, 3, 4, 7, 8])
    assert a[1] == b[1]
    assert a[2] != b[2]
    assert a[0] == b[0] != a[1]


def test_a_page_is_its_whole_past() -> None:
    a, b = hashes([1, 2, 9, 9]), hashes([3, 4, 9, 9])
    assert a[1] != b[1]


def test_salt_and_cut_matter() -> None:
    tokens = [1, 2, 3, 4]
    assert hashes(tokens)[0] != hashes(tokens, salt="tenant")[0]
    assert hashes([1, 2])[0] != hashes([1 << 32 | 2, 0])[0]
    assert hashes([7], page_size=1)[0] != hashes([7 << 8], page_size=1)[0]


def test_what_a_page_depends_on_behind_it_is_part_of_its_hash() -> None:
    """An EAGLE3 draft's last entry of a page was computed with the token after it."""

    def ahead(tokens: list[int]) -> PageHashes:
        return PageHashes("", 2, lambda begin, end: tokens[begin:end], num_ahead=1)

    a, b, c = ahead([1, 2, 3, 4, 5]), ahead([1, 2, 3, 4, 6]), ahead([1, 2, 9, 9, 5])
    assert a[0] == b[0] != c[0]
    assert a[1] != b[1]
    with pytest.raises(AssertionError, match="depends on is known"):
        ahead([1, 2])[0]


def test_only_what_is_asked_is_read() -> None:
    read: list[tuple[int, int]] = []

    def tokens(begin: int, end: int) -> list[int]:
        read.append((begin, end))
        return list(range(begin, end))

    chain = PageHashes("", 4, tokens)
    assert chain[1] == chain[1]
    assert read == [(0, 4), (4, 8)]


def test_the_first_page_of_equal_contents_is_the_one_found() -> None:
    index, key = PrefixIndex(), hashes([1, 2])[0]
    assert index.add(key, 5)
    assert not index.add(key, 6)
    assert index.add(key, 5)
    assert index.find(key) == 5
    index.drop(6)
    assert index.find(key) == 5
    index.drop(5)
    assert index.find(key) is None
    assert len(index) == 0
