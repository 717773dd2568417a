"""`l4 plugins`: what is installed, what each brings, and why one failed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from l4core.cli.command import L4Command
from l4core.cli.table import text_table

if TYPE_CHECKING:
    from l4core.plugin_manager import PluginRow


@click.command(cls=L4Command, short_help="List plugins and what each brings.")
@click.option("--json", "as_json", is_flag=True, help="a list of objects instead of a table")
def plugins(as_json: bool) -> None:
    """List the plugins of this environment.

    L4_DISABLE_PLUGINS (a comma list) leaves some out; L4_STRICT_PLUGINS=1 makes every failure an error.
    """
    from l4core.plugin_manager import load_plugins

    rows = load_plugins().rows
    click.echo(json.dumps([dataclasses.asdict(row) for row in rows], indent=2) if as_json else plugin_table(rows))


def plugin_table(rows: Sequence[PluginRow]) -> str:
    """One line a plugin; what it brings, or the reason it failed, stands in the last column."""
    lines = [(row.name, row.version, row.status, row.reason or ", ".join(row.offers)) for row in rows]
    return text_table(("plugin", "version", "status", "brings"), lines)
