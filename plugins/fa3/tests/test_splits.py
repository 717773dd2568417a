"""The captured number of splits, from host bounds alone."""

from __future__ import annotations

import pytest

from l4_fa3.probe import PARTIAL_BYTES
from l4_fa3.splits import num_splits


def splits(num_seqs: int, max_seqlen_q: int, heads: tuple[int, int] = (40, 8), multiprocessors: int = 132) -> int:
    return num_splits(
        num_seqs=num_seqs,
        max_seqlen_q=max_seqlen_q,
        num_q_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=128,
        multiprocessors=multiprocessors,
    )


@pytest.mark.parametrize("num_seqs", [1, 8, 32, 128])
def test_one_sequence_may_fill_the_device_whatever_the_batch(num_seqs: int) -> None:
    assert splits(num_seqs, 1) == 132 // 8
    assert splits(num_seqs, 1, heads=(5, 1)) == 64


@pytest.mark.parametrize(("rows", "wanted"), [(1, 16), (25, 16), (26, 8), (128, 3), (500, 1), (8192, 1)])
def test_more_query_rows_leave_less_to_split(rows: int, wanted: int) -> None:
    assert splits(1, rows) == wanted


@pytest.mark.parametrize("num_seqs", [1, 100, 512, 5000])
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_partial_results_stay_within_what_is_claimed(num_seqs: int, rows: int) -> None:
    found = splits(num_seqs, rows)
    assert found == 1 or found * num_seqs * rows * 40 * 129 * 4 <= PARTIAL_BYTES


def test_a_small_device_does_not_split() -> None:
    assert splits(1, 1, multiprocessors=1) == 1
