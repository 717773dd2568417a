"""`l4 env`: what to paste into a bug report. Holds no secrets: of environment variables only the names are shown."""

from __future__ import annotations

import json

import click

from l4core.cli.command import L4Command


@click.command(cls=L4Command, short_help="Print versions and devices for a bug report.")
@click.option("--json", "as_json", is_flag=True, help="one object instead of text")
def env(as_json: bool) -> None:
    """Print versions, platform and plugins for a bug report."""
    from l4core.cli.environment import report

    found = report()
    click.echo(json.dumps(found.as_json(), indent=2) if as_json else found.text())
