"""`l4 check`: does a checkpoint fit? Reads config and shard headers only, so it takes seconds at any size."""

from __future__ import annotations

import click

from l4core.cli.command import L4Command
from l4core.config import EngineConfig


@click.command(cls=L4Command, short_help="Check a checkpoint's tensors from shard headers.")
@click.argument("model", metavar="MODEL")
@click.option(
    "--tp", type=click.IntRange(min=1), default=1, metavar="N", help="check the slices of N tensor-parallel ranks [1]"
)
@click.option("--revision", metavar="TEXT", help="branch, tag or commit of a hub id")
@click.option("--download-dir", metavar="DIR", help="where hub files are kept (default: HF_HOME)")
@click.pass_context
def check(ctx: click.Context, /, model: str, tp: int, revision: str | None, download_dir: str | None) -> None:
    """Check every tensor of MODEL (a folder or a hub id): name, shape, dtype, and that each is used exactly once.

    Exits with 1 when something is missing, unknown or of the wrong shape.
    """
    from l4core.model.check import check_folder
    from l4core.model.repository import resolve_model

    folder = resolve_model(EngineConfig(model=model, revision=revision, download_dir=download_dir))
    report = check_folder(folder, tp=tp)
    click.echo(report.text())
    ctx.exit(0 if report.ok else 1)
