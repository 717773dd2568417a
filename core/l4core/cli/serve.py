"""`l4 serve`: an OpenAI endpoint for one model. `python -m l4core.launch_server` is the same command."""

from __future__ import annotations

import click

from l4core.cli.command import L4Command
from l4core.cli.options import table_options
from l4core.cli.settings import read_configs


@click.command(cls=L4Command, short_help="Serve a model over HTTP, OpenAI's API.")
@table_options(server=None)
@click.pass_context
def serve(ctx: click.Context, /, **_: object) -> None:
    """Serve MODEL (a checkpoint folder or a hub id) over HTTP until SIGTERM or Ctrl-C.

    SGLang's and vLLM's spellings are accepted; - and _ are the same.
    """
    engine, server = read_configs(ctx)
    from l4core.server import serve as run_server

    run_server(engine, server)
