"""Rows of sequences that have equally large shares of a step: where they lie, and what is carried from one step's layout to another's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from l4core.engine.run.fixed_step import StepShape
from l4core.engine.run.padding import AuxRows, find_padded, places_in, spread

LENGTHS = st.lists(st.integers(1, 5), min_size=1, max_size=6)


def shares(lengths: list[int], num_tokens: int) -> list[list[int]]:
    """Of each sequence: 0 for padding, then its rows, which count from 1."""
    row, found = 0, []
    for n in lengths:
        found.append([0] * (num_tokens - n) + list(range(row + 1, row + n + 1)))
        row += n
    return found


@given(LENGTHS, st.integers(0, 3))
def test_rows_come_last_in_their_share(lengths: list[int], more: int) -> None:
    num_tokens, own = max(lengths) + more, np.array(lengths)
    wanted = np.array(shares(lengths, num_tokens))
    assert spread(np.arange(1, own.sum() + 1), num_tokens, own).tolist() == wanted.tolist()
    assert places_in(num_tokens, own).tolist() == np.flatnonzero(wanted).tolist()


@given(LENGTHS, st.integers(0, 2), st.one_of(st.none(), st.integers(0, 2)))
def test_hidden_states_go_from_one_layout_to_another(lengths: list[int], more: int, before: int | None) -> None:
    """Rows behind the last sequence's are nobody's, in either."""
    own, num_tokens = np.array(lengths), max(lengths) + more
    rows = list(range(1, sum(lengths) + 1))
    share = None if before is None else max(lengths) + before
    laid_out = rows if share is None else [row for one in shares(lengths, share) for row in one]
    aux = AuxRows(values=torch.tensor([[float(row)] * 2 for row in [*laid_out, -1]]), num_tokens=share)
    assert aux.packed(lengths)[:, 1].tolist() == rows
    out = torch.zeros(len(lengths) * num_tokens + 2, 2)
    aux.kept().write_to(out, num_tokens, own)
    assert out[:, 0].tolist() == [row for one in shares(lengths, num_tokens) for row in one] + [0, 0]


def test_a_sequence_shorter_than_its_share_is_not_padded() -> None:
    step: Any = SimpleNamespace(shape=StepShape(4, 4))
    graphs: Any = SimpleNamespace(find=lambda num_seqs, num_tokens: step if num_tokens <= 4 else None)
    for starts, lengths, fits in (([9, 3], [2, 1], True), ([9, 2], [2, 1], False), ([0, 9], [4, 1], True)):
        assert (find_padded(graphs, np.array(starts), np.array(lengths)) is step) is fits
    assert find_padded(graphs, np.array([9]), np.array([5])) is None
