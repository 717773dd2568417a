"""What the kinds of `l4 bench` share: lengths of made-up prompts, and where results go."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from l4core.errors import ConfigError

if TYPE_CHECKING:
    from l4core.bench.datasets import Lengths

F = TypeVar("F", bound=Callable[..., Any])
POSITIVE = click.IntRange(min=1)


def lengths(input_len: int, output_len: int, *, spread: bool = True) -> Callable[[F], F]:
    """Options of made-up prompts. spread: whether they may differ."""

    def decorate(function: F) -> F:
        made = [
            click.option(
                "--input-len",
                type=POSITIVE,
                metavar="N",
                default=input_len,
                show_default=True,
                help="tokens of a prompt",
            ),
            click.option(
                "--output-len",
                type=POSITIVE,
                metavar="N",
                default=output_len,
                show_default=True,
                help="tokens of an answer",
            ),
        ]
        if spread:
            share = click.FloatRange(0, 1)
            text = "lengths are drawn from n·(1±X)"
            made.append(click.option("--spread", type=share, metavar="X", default=0.0, show_default=True, help=text))
        for option in reversed(made):
            function = option(function)
        return function

    return decorate


def _makes_room(_: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    """Folders are made, and what cannot be written is told, before the measurement and not after it. ConfigError."""
    if path is not None:
        folder = path if param.name == "plot" else path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{param.opts[0]} {path}: {error.strerror}", fix="a folder that can be written"
            ) from error
        if not os.access(path if path.exists() else folder, os.W_OK):
            raise ConfigError(f"{param.opts[0]} {path} cannot be written", fix="a folder that can be written")
    return path


out_option = click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=_makes_room,
    metavar="FILE",
    help="results as JSON, too",
)


def output_options(function: F) -> F:
    """Where results go."""
    for option in (
        click.option(
            "--plot",
            type=click.Path(file_okay=False, path_type=Path),
            callback=_makes_room,
            metavar="DIR",
            help="charts as SVG",
        ),
        out_option,
        click.option("--json", "as_json", is_flag=True, help="results as JSON instead of a table"),
    ):
        function = option(function)
    return function


def lengths_of(input_len: int, output_len: int, spread: float) -> Lengths:
    from l4core.bench.datasets import Lengths

    return Lengths(input=input_len, output=output_len, spread=spread)


def deliver(
    found: dict[str, Any], text: str, charts: Mapping[str, str], *, out: Path | None, plot: Path | None, as_json: bool
) -> None:
    """Print the table or the JSON; write the files that were asked for."""
    from l4core.bench.serve import as_json as encode

    click.echo(encode(found) if as_json else text, nl=not as_json)
    if out is not None:
        out.write_text(encode(found), encoding="utf-8")
    if plot is not None:
        for name, svg in charts.items():
            (plot / name).write_text(svg, encoding="utf-8")
