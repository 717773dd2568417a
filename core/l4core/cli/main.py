"""`l4`: the list of commands. Each is imported when it is asked for, so `l4 --help` does not wait for torch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import click

from l4core import __version__
from l4core.cli.command import CONTEXT
from l4core.cli.errors import nearest, run
from l4core.errors import ConfigError

COMMANDS = {
    "serve": "l4core.cli.serve:serve",
    "generate": "l4core.cli.generate:generate",
    "chat": "l4core.cli.chat:chat",
    "check": "l4core.cli.check:check",
    "backends": "l4core.cli.backends:backends",
    "plugins": "l4core.cli.plugins:plugins",
    "demo-model": "l4core.cli.demo_model:demo_model",
    "bench": "l4core.cli.bench:bench",
    "plan": "l4core.cli.plan:plan",
    "env": "l4core.cli.env:env",
}


class LazyGroup(click.Group):
    """A group whose commands live in modules that are imported on first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        name = cmd_name.replace("_", "-")
        if name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[name].partition(":")
        found: click.Command = getattr(importlib.import_module(module), attribute)
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            raise ConfigError(f"unknown command {args[0]!r}", fix=nearest(args[0], COMMANDS, "l4 --help"))
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="l4")
def l4() -> None:
    """L4 serves Llama 4 checkpoints over an OpenAI endpoint, on any machine.

    A first try: `l4 demo-model DIR`, then `l4 serve DIR`.
    """


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `l4` program; exits with 0, 1 (failed), 2 (wrong usage) or 130 (interrupted)."""
    sys.exit(run(l4, sys.argv[1:] if argv is None else argv, program="l4"))
