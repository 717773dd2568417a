"""The sampling flags of `l4 generate` and `l4 chat`. What is not given stays at the checkpoint's own default."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from l4core.cli.command import GroupedOption

F = TypeVar("F", bound=Callable[..., Any])
NAMES = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "stop")


def sampling_options(*, max_tokens: int) -> Callable[[F], F]:
    """Decorator. max_tokens: the command's default length of an answer."""

    def option(flag: str, kind: Any, metavar: str, text: str, **more: Any) -> Callable[[F], F]:
        return click.option(flag, cls=GroupedOption, group="Answer", type=kind, metavar=metavar, help=text, **more)

    def decorate(function: F) -> F:
        for add in reversed(
            [
                option("--max-tokens", int, "TOKENS", f"longest answer [{max_tokens}]", default=max_tokens),
                option("--temperature", float, "X", "0 = always the likeliest token"),
                option("--top-p", float, "X", "smallest set of tokens with this probability"),
                option("--top-k", int, "N", "the N likeliest tokens"),
                option("--min-p", float, "X", "tokens of at least X × the best probability"),
                option("--stop", str, "TEXT", "end before this text; may be repeated", multiple=True),
            ]
        ):
            function = add(function)
        return function

    return decorate


def sampling_changes(options: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that were given, as fields of SamplingParams."""
    return {name: options[name] for name in NAMES if options[name] not in (None, ())}
