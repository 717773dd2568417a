"""Arithmetic on boxes: hyper-rectangles of a tensor, one (start, stop) pair a dimension. Torch-free; units are elements."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

Range = tuple[int, int]
Box = tuple[Range, ...]
Shape = tuple[int, ...]


def whole(shape: Shape) -> Box:
    """The box of a whole tensor."""
    return tuple((0, size) for size in shape)


def extent(box: Box) -> Shape:
    """Size of the box in each dimension."""
    return tuple(stop - start for start, stop in box)


def volume(box: Box) -> int:
    """Number of elements."""
    return math.prod(extent(box))


def replace(box: Box, dim: int, new: Range) -> Box:
    """The box with another range in one dimension."""
    return (*box[:dim], new, *box[dim + 1 :])


def joined(first: Box, second: Box) -> tuple[int, Box] | None:
    """(dim, box) of both together where `second` begins exactly where `first` ends in one dimension and all others agree; else None."""
    differ = [dim for dim, (a, b) in enumerate(zip(first, second, strict=True)) if a != b]
    if len(differ) != 1 or first[differ[0]][1] != second[differ[0]][0]:
        return None
    return differ[0], replace(first, differ[0], (first[differ[0]][0], second[differ[0]][1]))


def tiles(boxes: Iterable[Box], shape: Shape) -> bool:
    """True iff the boxes cover every element of `shape` exactly once and can be told apart dimension by dimension, in dimension order.

    All layouts here are such grids (parts stacked along one dimension, experts along the first); anything else answers False.
    """
    return _tiles(sorted(boxes), shape, 0)


def _tiles(boxes: Sequence[Box], shape: Shape, dim: int) -> bool:
    if dim == len(shape):
        return len(boxes) == 1
    position = 0
    for (start, stop), group in groupby(boxes, key=lambda box: box[dim]):
        if start != position or stop <= start or not _tiles(list(group), shape, dim + 1):
            return False
        position = stop
    return position == shape[dim]


def strides(shape: Shape) -> Shape:
    """Strides of a row-major tensor."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def span(box: Box, shape: Shape) -> Range:
    """First element of the box and one past its last, counted in the row-major order of the tensor it lies in."""
    steps = strides(shape)
    first = sum(start * step for (start, _), step in zip(box, steps, strict=True))
    last = sum((stop - 1) * step for (_, stop), step in zip(box, steps, strict=True))
    return first, last + 1


def pieces(box: Box, shape: Shape, limit: int) -> Iterator[Box]:
    """The box cut along its leading dimensions into boxes whose span is at most `limit` elements (or a single row, if that is longer)."""
    first, last = span(box, shape)
    dim = next((d for d, size in enumerate(extent(box)) if size > 1), None)
    if last - first <= limit or dim is None or dim == len(box) - 1:
        yield box
        return
    start, stop = box[dim]
    rows = max(1, limit // strides(shape)[dim])
    for row in range(start, stop, rows):
        yield from pieces(replace(box, dim, (row, min(row + rows, stop))), shape, limit)
