"""What all commands share: help in groups, spellings with - or _, and an error for an option that is given twice."""

from __future__ import annotations

from typing import Any

import click

from l4core.errors import ConfigError

GENERAL = "General"
CONTEXT: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda token: token.replace("_", "-"),
    "max_content_width": 110,
}


class GroupedOption(click.Option):
    """An option with the heading it stands under in the help."""

    def __init__(self, *args: Any, group: str = GENERAL, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


class L4Command(click.Command):
    """A command whose help lists options by group, and which takes no option twice."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["context_settings"] = {**CONTEXT, **kwargs.get("context_settings", {})}
        super().__init__(*args, **kwargs)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        _, _, order = self.make_parser(ctx).parse_args(list(args))
        seen: set[str] = set()
        for param in order:
            repeats = isinstance(param, click.Option) and (param.multiple or param.count)
            if param.name in seen and not repeats:
                raise ConfigError(f"option {param.opts[0]} is given twice", fix="keep one of them")
            seen.add(param.name or "")
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_options(self, ctx, formatter)


def write_options(command: click.Command, ctx: click.Context, formatter: click.HelpFormatter) -> None:
    """A command's options under the headings of their groups."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for param in command.get_params(ctx):
        record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
        if record is not None:
            groups.setdefault(getattr(param, "group", GENERAL), []).append(record)
    for name, records in groups.items():
        with formatter.section(name):
            formatter.write_dl(records)
