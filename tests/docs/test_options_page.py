"""docs/options.md is generated from the option table."""

from __future__ import annotations

from pathlib import Path

from l4core.cli.options_page import render
from l4core.config import EngineConfig, ServerConfig
from l4core.option import options

PAGE = Path(__file__).resolve().parents[2] / "docs" / "options.md"


def test_the_page_is_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run: make docs"


def test_every_name_and_spelling_is_on_it() -> None:
    page = render()
    for cls in (EngineConfig, ServerConfig):
        for name, _, row in options(cls):
            assert f"| `{name}` |" in page
            for alias in row.aliases:
                assert f"`--{alias.replace('_', '-')}`" in page


def test_units_ranges_and_choices_are_shown() -> None:
    page = render()
    assert "| `port` |  | N, 0 to 65535 | `30000` |" in page
    assert "| X, above 0, at most 1 |  | cap on local KV" in page  # 0 is refused
    assert "| `drain_seconds` |  | seconds, 0 to 86400 | `30.0` |" in page
    assert "`auto` `safetensors` `dummy`" in page
