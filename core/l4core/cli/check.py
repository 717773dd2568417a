"""`l4 check`: can L4 serve this checkpoint? Reads config, tokenizer and shard headers only, so it takes seconds at any size."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from l4core.cli.command import L4Command
from l4core.cli.log import configure_logging
from l4core.config import EngineConfig
from l4core.errors import L4Error

if TYPE_CHECKING:
    from l4core.model.check import CheckReport
    from l4core.model.safetensors_index import Problem


@click.command(cls=L4Command, short_help="Check a checkpoint's tensors from shard headers.")
@click.argument("model", metavar="MODEL")
@click.option(
    "--tp", type=click.IntRange(min=1), default=1, metavar="N", help="check the slices of N tensor-parallel ranks [1]"
)
@click.option("--revision", metavar="TEXT", help="branch, tag or commit of a hub id")
@click.option("--download-dir", metavar="DIR", help="where hub files are kept (default: HF_HOME)")
@click.option("--json", "as_json", is_flag=True, help="an object instead of text")
@click.pass_context
def check(
    ctx: click.Context, /, model: str, tp: int, revision: str | None, download_dir: str | None, as_json: bool
) -> None:
    """Check every tensor of MODEL (a folder or a hub id): name, shape, dtype, and that each is used exactly once; and that tokenizer, chat template
    and generation defaults can be used.

    Of a hub id only the small files and the headers of the shards are fetched. Exits with 1 when something is wrong.
    """
    from l4core.model.check import check_folder
    from l4core.model.hub_headers import folder_of_headers

    configure_logging("error")
    config = EngineConfig(model=model, revision=revision, download_dir=download_dir)
    with folder_of_headers(config) as folder:
        report = check_folder(folder, tp=tp)
        problems = (*report.problems, *text_problems(report, folder))
    report = dataclasses.replace(report, folder=model, problems=tuple(_under(model, folder, p) for p in problems))
    click.echo(json.dumps(report.as_json(), indent=2) if as_json else report.text())
    ctx.exit(0 if report.ok else 1)


def text_problems(report: CheckReport, folder: Path) -> Iterator[Problem]:
    """What keeps the server's front end from starting, found by making one. Nothing where what it needs is missing already."""
    from l4core.engine.frontend import Frontend
    from l4core.model.config import ModelConfig
    from l4core.model.safetensors_index import Problem
    from l4core.plugin_manager import load_plugins

    if report.architecture is None or not report.has_tokenizer or any(p.kind == "template" for p in report.problems):
        return
    try:
        config = EngineConfig(model=str(folder))
        Frontend.from_plugins(config, ModelConfig.from_folder(folder), folder, load_plugins())
    except L4Error as error:
        yield Problem(kind="text", name=str(folder), text=error.message)


def _under(model: str, folder: Path, problem: Problem) -> Problem:
    """With the model as the user named it, where the folder is a temporary one."""
    name, text = (text.replace(str(folder), model) for text in (problem.name, problem.text))
    return dataclasses.replace(problem, name=name, text=text)
