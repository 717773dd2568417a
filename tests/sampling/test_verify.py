"""Which rows count: chains and trees against a walk written down from the definition."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import given

from l4core.sampling.verify import accepted_path, depths, paths


@pytest.mark.parametrize(
    ("guesses", "drawn", "rows"),
    [
        ([], [5], [0]),
        ([5, 6], [5, 6, 7], [0, 1, 2]),
        ([5, 6], [5, 9, 7], [0, 1]),
        ([5, 6], [4, 6, 7], [0]),
        ([5, 6], [5, None, 7], [0, 1]),
        ([5], [None, 5], [0]),
    ],
)
def test_a_chain_is_accepted_up_to_the_first_difference(
    guesses: list[int], drawn: list[int | None], rows: list[int]
) -> None:
    assert accepted_path(guesses, (), drawn) == rows
    assert accepted_path(guesses, list(range(-1, len(guesses) - 1)), drawn) == rows


def test_a_tree_goes_on_in_the_branch_that_was_drawn() -> None:
    guesses, parents = [5, 6, 7, 8, 9], [-1, -1, 0, 1, 1]  # 5 → 7 and 6 → 8, 9
    assert accepted_path(guesses, parents, [6, 0, 9, 0, 0, 3]) == [0, 2, 5]
    assert accepted_path(guesses, parents, [5, 7, 9, 3, 0, 0]) == [0, 1, 3]
    assert paths(guesses, parents) == [[], [5], [6], [5, 7], [6, 8], [6, 9]]
    assert depths(5, parents) == [0, 1, 1, 2, 2, 2]


@st.composite
def trees(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    count = draw(st.integers(0, 8))
    parents = [draw(st.integers(-1, i - 1)) for i in range(count)]
    token = st.integers(0, 2)
    return [draw(token) for _ in range(count)], parents, [draw(token) for _ in range(count + 1)]


@given(trees())
def test_every_accepted_guess_was_drawn_where_it_stands(tree: tuple[list[int], list[int], list[int]]) -> None:
    guesses, parents, drawn = tree
    path = accepted_path(guesses, parents, drawn)
    assert path[0] == 0
    for before, row in itertools.pairwise(path):
        assert parents[row - 1] + 1 == before
        assert guesses[row - 1] == drawn[before]
    last = path[-1]
    children = [g for g, parent in zip(guesses, parents, strict=True) if parent + 1 == last]
    assert drawn[last] not in children, "it could have gone on"
    assert paths(guesses, parents)[last] == [drawn[row] for row in path[:-1]]
