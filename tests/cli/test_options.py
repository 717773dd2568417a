"""Every row of the option table is a flag, under each of its spellings, with - and with _."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest

from l4core.cli.options import value_type
from l4core.cli.serve import serve
from l4core.cli.settings import given_options
from l4core.config import EngineConfig, ServerConfig
from l4core.option import Option, options

ROWS = [(name, hint, row) for cls in (EngineConfig, ServerConfig) for name, hint, row in options(cls)]


def parse(*argv: str) -> dict[str, Any]:
    """Field → value of what stands on a `l4 serve` line; no config is built."""
    with serve.make_context("l4 serve", list(argv)) as context:
        return given_options(context)


def sample(hint: Any, row: Option) -> tuple[str, Any]:
    """A word for the command line and the value it must become."""
    kind = value_type(hint)
    if row.choices:
        return row.choices[-1], row.choices[-1]
    if kind is int:
        return "7", 7
    if kind is float:
        return "0.5", 0.5
    return "word", ("word",) if kind is tuple else "word"


@pytest.mark.parametrize(("name", "hint", "row"), ROWS, ids=[name for name, _, _ in ROWS])
def test_each_row_under_each_spelling(name: str, hint: Any, row: Option) -> None:
    for spelling in (name, *row.aliases):
        for flag in (f"--{spelling}", f"--{spelling.replace('_', '-')}"):
            if value_type(hint) is bool:
                assert parse(flag) == {name: True}
                assert parse(f"--no-{flag[2:]}") == {name: False}
            else:
                word, value = sample(hint, row)
                assert parse(flag, word) == {name: value}
                assert parse(f"{flag}={word}") == {name: value}


def test_only_what_is_given_is_reported() -> None:
    assert parse() == {}
    assert parse("--port", "30000") == {"port": 30000}  # the default, but said


def test_the_model_is_positional_or_a_flag() -> None:
    assert parse("folder") == parse("--model", "folder") == parse("--model-path=folder") == {"model": "folder"}


def test_attention_option_may_be_repeated() -> None:
    assert parse("--attention-option", "a=1", "--attention-option", "b=2") == {"attention_option": ("a=1", "b=2")}


def test_help_lists_every_flag_under_its_group() -> None:
    with click.Context(serve, info_name="l4 serve", terminal_width=100) as context:
        text = serve.get_help(context)
    at = -1
    for group in dict.fromkeys(row.group for _, _, row in ROWS):
        assert text.index(f"{group}:") > at
        at = text.index(f"{group}:")
    for name, _, row in ROWS:
        for spelling in (name, *row.aliases):
            assert f"--{spelling.replace('_', '-')}" in text
    assert text.count("(not built yet)") == sum(bool(row.not_built) for _, _, row in ROWS)


def test_help_shows_defaults() -> None:
    with click.Context(serve, info_name="l4 serve", terminal_width=100) as context:
        text = " ".join(serve.get_help(context).split())
    assert f"port; 0 = any free one [{ServerConfig().port}]" in text
    assert f"sequences in one step [{EngineConfig().max_running_requests}]" in text


def test_config_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(click.UsageError, match="does not exist"):
        parse("--config", str(tmp_path / "none.yaml"))
