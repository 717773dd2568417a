"""Charts are well-formed, and points lie where the axes say."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4core.bench.svg import HEIGHT, WIDTH, Axis, Series, _log_ticks, _ticks, line_chart, short

NAMESPACE = "{http://www.w3.org/2000/svg}"
positive = st.floats(1e-6, 1e12)


def test_a_chart_is_xml_with_a_dot_for_each_measured_point_and_escaped_text() -> None:
    lines = [
        Series(name="a < b & c", points=[(1, 2), (10, 4), (100, 3)]),
        Series(name="floor", points=[(1, 1), (100, 1)], dashed=True),
    ]
    root = ElementTree.fromstring(line_chart("ITL & load", Axis(label="rate", log=True), Axis(label="ms"), lines))
    assert len(root.findall(f"{NAMESPACE}circle")) == 3
    assert len(root.findall(f"{NAMESPACE}polyline")) == 2
    assert "a < b & c" in {text.text for text in root.iter(f"{NAMESPACE}text")}


def test_larger_values_lie_further_right_and_higher() -> None:
    root = ElementTree.fromstring(
        line_chart("t", Axis(label="x"), Axis(label="y"), [Series(name="s", points=[(1, 1), (2, 5)])])
    )
    first, second = root.findall(f"{NAMESPACE}circle")
    assert float(first.attrib["cx"]) < float(second.attrib["cx"]) < WIDTH
    assert HEIGHT > float(first.attrib["cy"]) > float(second.attrib["cy"])


@given(low=positive, factor=st.floats(1, 1e6))
def test_ticks_cover_the_range_in_order(low: float, factor: float) -> None:
    high = low * factor
    for ticks in (_ticks(low, high), _log_ticks(low, high)):
        assert ticks == sorted(set(ticks))
        assert len(ticks) >= 2
        assert ticks[0] <= low * (1 + 1e-6)
        assert ticks[-1] >= high * (1 - 1e-6)
        assert len(ticks) <= 12


@pytest.mark.parametrize("points", [[], [(0.0, 1.0)], [(1.0, float("nan"))]])
def test_what_cannot_be_drawn_is_refused(points: list[tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match=r"no point|above 0|finite"):
        line_chart("t", Axis(label="x", log=True), Axis(label="y"), [Series(name="s", points=points)])


def test_short_numbers() -> None:
    assert [short(v) for v in (0.25, 1500, 2e9, 8192)] == ["0.25", "1.5k", "2G", "8.192k"]
