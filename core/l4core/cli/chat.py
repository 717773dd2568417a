"""`l4 chat`: talk to a model in the terminal, in this process or through a running server."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import click

from l4core.cli.chat_remote import RemoteChat
from l4core.cli.command import GroupedOption, L4Command
from l4core.cli.log import configure_logging
from l4core.cli.options import table_options
from l4core.cli.sampling import sampling_changes, sampling_options
from l4core.cli.settings import API_KEY, given_options, read_configs
from l4core.errors import ConfigError, RequestError

Message = dict[str, str]
Answer = Callable[[Sequence[Message]], Iterator[str]]
HELP = "/clear forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer"


@click.command(cls=L4Command, short_help="Talk to a model in the terminal.")
@click.option("--url", cls=GroupedOption, metavar="URL", help="talk to this server instead of loading MODEL")
@click.option("--system", cls=GroupedOption, group="Answer", metavar="TEXT", help="system message")
@sampling_options(max_tokens=512)
@table_options(server=("api_key", "log_level"))
@click.pass_context
def chat(ctx: click.Context, /, url: str | None, system: str | None, **options: Any) -> None:
    """Chat with MODEL, or with the server at --url, in the terminal.

    Lines from a pipe are taken as turns, one each.
    """
    changes = sampling_changes(options)
    answer = _remote(ctx, url, changes) if url is not None else _local(ctx, changes)
    first = [{"role": "system", "content": system}] if system else []
    converse(answer, first, interactive=sys.stdin.isatty())


def _remote(ctx: click.Context, url: str, changes: dict[str, Any]) -> Answer:
    given = given_options(ctx)
    unused = sorted(set(given) - {"api_key", "log_level"})
    if unused:
        raise ConfigError(
            f"--url talks to a running server, so {unused[0]!r} has no effect", fix="leave one of them out"
        )
    configure_logging(given.get("log_level", "warning"))
    return RemoteChat(url, given.get("api_key") or os.environ.get(API_KEY), changes).answer


def _local(ctx: click.Context, changes: dict[str, Any]) -> Answer:
    engine, server = read_configs(ctx)
    configure_logging(server.log_level if "log_level" in given_options(ctx) else "warning")
    from l4core.cli.chat_local import LocalChat

    local = LocalChat(engine, changes)
    click.echo("\n".join(local.report), err=True)
    return local.answer


def converse(answer: Answer, messages: list[Message], *, interactive: bool) -> None:
    """Read turns and stream answers until the input ends. An answer that was stopped stays in the conversation as far as it came."""
    first = list(messages)
    if interactive:
        click.echo(HELP, err=True)
    for text in _turns(interactive):
        if text == "/clear":
            messages[:] = first
            continue
        messages.append({"role": "user", "content": text})
        try:
            messages.append({"role": "assistant", "content": _print_answer(answer(messages))})
        except RequestError as error:  # this turn is refused (too long, say); the conversation goes on without it
            click.echo(f"error: {error}", err=True)
            messages.pop()


def _turns(interactive: bool) -> Iterator[str]:
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line == "/exit":
            return
        if line:
            yield line


def _print_answer(pieces: Iterator[str]) -> str:
    text = ""
    with suppress(KeyboardInterrupt):
        for piece in pieces:
            click.echo(piece, nl=False)
            sys.stdout.flush()
            text += piece
    click.echo()
    return text
