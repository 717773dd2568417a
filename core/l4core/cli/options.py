"""Turns the option table of config.py into click options, one for each row and spelling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from l4core.cli.command import GroupedOption
from l4core.config import EngineConfig, ServerConfig
from l4core.option import Option, allowed_types, options

F = TypeVar("F", bound=Callable[..., Any])

TYPES: dict[type[Any], click.ParamType[Any]] = {
    int: click.INT,
    float: click.FLOAT,
    str: click.STRING,
    tuple: click.STRING,
}


class AutoInt(click.ParamType[Any]):
    """A whole number, or the word auto."""

    name = "integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "auto" else click.INT.convert(value, param, ctx)


class Word(click.Choice[str]):
    """One of some words; they are told as they are spelled, not with - for _."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        return f"{value!r} is not one of {', '.join(self.choices)}"


METAVARS = {int: "N", float: "X", str: "TEXT", tuple: "TEXT"}


class TableOption(GroupedOption):
    """One row of the table. A boolean is a flag with a hidden `--no-…` that takes back what a file sets."""

    def __init__(self, name: str, hint: Any, row: Option, default: Any) -> None:
        kind = value_type(hint)
        spellings = ["--" + s.replace("_", "-") for s in (name, *row.aliases)]
        given: dict[str, Any] = {"help": describe(row, default), "group": row.group, "default": None}
        if kind is bool:
            spellings = [f"{s}/--no-{s[2:]}" for s in spellings]
        else:
            given |= {
                "type": Word((*row.choices, *row.later)) if row.choices else AutoInt() if row.auto else TYPES[kind],
                "multiple": kind is tuple,
                "metavar": metavar(row, kind),
            }
        super().__init__([name, *spellings], **given)

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        value = f" {self.metavar}" if self.metavar else ""
        return ", ".join(self.opts) + value, self.help or ""


def value_type(hint: Any) -> type[Any]:
    """The type of one value of a field: int for `int | None`."""
    return next(t for t in allowed_types(hint) if t is not type(None))


def metavar(row: Option, kind: type[Any]) -> str | None:
    if row.choices:
        return "[" + "|".join(row.choices) + "]"
    return (row.metavar or row.unit.upper() or METAVARS[kind]) + ("|auto" if row.auto else "")


def describe(row: Option, default: Any) -> str:
    """Help text with the default, or with the note that the option is refused for now."""
    if row.not_built:
        return f"{row.help} (not built yet)"
    shown = default not in (None, False, "", ())
    return f"{row.help} [{default}]" if shown else row.help


def table_options(*, server: tuple[str, ...] | None, model_argument: bool = True) -> Callable[[F], F]:
    """Decorator that adds MODEL, `--config`, all options of the engine and the named ones of the server (None = all)."""

    def decorate(function: F) -> F:
        params: list[click.Parameter] = []
        if model_argument:
            params.append(click.Argument(["model_argument"], metavar="[MODEL]", required=False))
        params += [_config_option(), *_rows(EngineConfig, None), *_rows(ServerConfig, server)]
        found: list[click.Parameter] = getattr(function, "__click_params__", [])
        function.__click_params__ = found + params[::-1]  # type: ignore[attr-defined]  # click reverses the list
        return function

    return decorate


def _rows(cls: type[Any], only: tuple[str, ...] | None) -> list[click.Parameter]:
    defaults = cls()
    return [
        TableOption(name, hint, row, getattr(defaults, name))
        for name, hint, row in options(cls)
        if only is None or name in only
    ]


def _config_option() -> click.Option:
    return GroupedOption(
        ["config_file", "--config"],
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        metavar="FILE",
        help="YAML file with any of these options by name; flags override it",
    )
