from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4core.model.boxes import Box, extent, joined, pieces, span, strides, tiles, volume, whole

shapes = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)


def elements(box: Box) -> set[tuple[int, ...]]:
    return set(itertools.product(*(range(start, stop) for start, stop in box)))


@st.composite
def boxes_in(draw: st.DrawFn) -> tuple[Box, tuple[int, ...]]:
    shape = draw(shapes)
    box = []
    for size in shape:
        start = draw(st.integers(0, size - 1))
        box.append((start, draw(st.integers(start + 1, size))))
    return tuple(box), shape


@given(boxes_in(), st.integers(1, 60))
def test_pieces_cover_the_box_once_within_the_limit(case: tuple[Box, tuple[int, ...]], limit: int) -> None:
    box, shape = case
    cut = list(pieces(box, shape, limit))
    covered = [e for piece in cut for e in elements(piece)]
    assert len(covered) == len(set(covered)) == volume(box)
    assert set(covered) == elements(box)
    for piece in cut:
        first, last = span(piece, shape)
        one_row = all(size == 1 for size in extent(piece)[:-1])
        assert last - first <= limit or one_row


@given(boxes_in())
def test_span_is_first_and_last_element_in_row_major_order(case: tuple[Box, tuple[int, ...]]) -> None:
    box, shape = case
    flat = [sum(i * step for i, step in zip(e, strides(shape), strict=True)) for e in elements(box)]
    assert span(box, shape) == (min(flat), max(flat) + 1)


@given(boxes_in(), st.data())
def test_tiles_accepts_a_cut_and_refuses_a_hole_or_an_overlap(
    case: tuple[Box, tuple[int, ...]], data: st.DataObject
) -> None:
    _, shape = case
    cut = list(pieces(whole(shape), shape, data.draw(st.integers(1, math.prod(shape)))))
    shuffled = data.draw(st.permutations(cut))
    assert tiles(shuffled, shape)
    victim = data.draw(st.sampled_from(cut))
    assert not tiles([box for box in cut if box != victim], shape)
    assert not tiles([*cut, victim], shape)


def test_tiles_refuses_boxes_beyond_the_shape() -> None:
    assert tiles([((0, 2), (0, 3))], (2, 3))
    assert not tiles([((0, 2), (0, 4))], (2, 3))
    assert not tiles([((0, 3), (0, 3))], (2, 3))


@pytest.mark.parametrize(
    ("first", "second", "wanted"),
    [
        (((0, 2), (0, 3)), ((0, 2), (3, 6)), (1, ((0, 2), (0, 6)))),
        (((0, 2), (0, 3)), ((2, 3), (0, 3)), (0, ((0, 3), (0, 3)))),
        (((0, 2), (0, 3)), ((0, 2), (4, 6)), None),
        (((0, 2), (0, 3)), ((2, 4), (3, 6)), None),
        (((0, 2), (3, 6)), ((0, 2), (0, 3)), None),
    ],
)
def test_joined(first: Box, second: Box, wanted: tuple[int, Box] | None) -> None:
    assert joined(first, second) == wanted
