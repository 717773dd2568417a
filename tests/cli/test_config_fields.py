"""No option is silently ignored: each config field is either refused when set, or read by code outside config.py."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import l4core
from l4core.cli.options import value_type
from l4core.config import EngineConfig, ServerConfig
from l4core.errors import ConfigError, NotBuiltError
from l4core.option import options

ROOT = Path(l4core.__file__).parent
ROWS = [(cls, name, hint) for cls in (EngineConfig, ServerConfig) for name, hint, _ in options(cls)]


def owner(node: ast.expr) -> str:
    """The last name of `config` in `self._config.port` or `config.port`."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def fields_read(source: str) -> set[str]:
    """Attributes read from a name that holds one of the two configs. `config` alone is one only where its class is named: other rooms call
    their own records so."""
    sure, here = {"engine_config", "server_config", "_engine_config", "_server_config"}, set[str]()
    if "EngineConfig" in source or "ServerConfig" in source:
        here = {"config", "_config", "engine", "server"}
    return {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and owner(node.value) in sure | here
    }


def all_reads() -> set[str]:
    sources = [p.read_text(encoding="utf-8") for p in ROOT.rglob("*.py") if p != ROOT / "config.py"]
    return set().union(*map(fields_read, sources))


@pytest.fixture(scope="module")
def reads() -> set[str]:
    return all_reads()


def is_refused(cls: type[EngineConfig] | type[ServerConfig], name: str, hint: object) -> bool:
    """Whether any value but the default is turned down."""
    value: object = {bool: True, int: 2, float: 0.5, str: "x"}[value_type(hint)]
    try:
        cls(**{name: value})  # type: ignore[arg-type]
    except ConfigError as error:
        return isinstance(error, NotBuiltError)
    return False


@pytest.mark.parametrize(("cls", "name", "hint"), ROWS, ids=[name for _, name, _ in ROWS])
def test_each_field_is_read_or_refused(cls: type[EngineConfig], name: str, hint: object, reads: set[str]) -> None:
    assert name in reads or is_refused(cls, name, hint)


def test_the_scan_can_fail() -> None:
    assert fields_read("EngineConfig\nself._config.port\nconfig.tp\nx.device\nmodel_config.dtype\nconfig.host = 1") == {
        "port",
        "tp",
    }
    assert fields_read("config.port\nself.server_config.host") == {"host"}
