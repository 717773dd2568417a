"""docs/metrics.md is generated from the table of series."""

from __future__ import annotations

from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from l4core.server.metrics import TABLE, Metrics
from l4core.server.metrics_page import LABELS, render

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


def test_the_page_is_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run: make docs"


def test_every_family_of_a_scrape_is_on_it_under_its_own_name() -> None:
    """Those served under vLLM's names too."""
    page, families = render(), list(text_string_to_metric_families(Metrics("m").render().decode()))
    assert len(families) == sum(1 + len(row.aliases) for row in TABLE)
    for family in families:
        name = f"{family.name}_total" if family.type == "counter" else family.name
        assert f"`{name}`" in page


def test_every_label_is_explained() -> None:
    assert set(LABELS) == {"model_name", *(label for row in TABLE for label in row.labels)}
