"""`l4 generate`: continue prompts offline, in this process."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import click

from l4core.cli.command import L4Command
from l4core.cli.log import configure_logging
from l4core.cli.options import table_options
from l4core.cli.sampling import sampling_changes, sampling_options
from l4core.cli.settings import given_options, read_configs
from l4core.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from l4core.request import RequestOutput


@click.command(cls=L4Command, short_help="Continue prompts, offline.")
@table_options(server=("log_level",), model_argument=False)
@sampling_options(max_tokens=128)
@click.option("--json", "as_json", is_flag=True, help="one JSON object a prompt instead of text")
@click.argument("words", nargs=-1, metavar="[MODEL] PROMPT...")
@click.pass_context
def generate(ctx: click.Context, /, words: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Continue each PROMPT with MODEL and print the text.

    Plain text in, plain text out: no chat template is applied (see `l4 chat`).
    """
    prompts = list(words)
    model = None if "model" in given_options(ctx) else next(iter(words), None)
    if model is not None:
        prompts = prompts[1:]
    engine, server = read_configs(ctx, model=model)
    if not prompts:
        raise ConfigError("no prompt is given", fix=f'{ctx.command_path} {engine.model} "Once upon a time"')
    configure_logging(server.log_level)
    from l4core.engine.llm import LLM

    with LLM(**dataclasses.asdict(engine)) as llm:
        outputs = llm.generate(prompts, llm.default_sampling_params(**sampling_changes(options)))
    for output in outputs:
        click.echo(as_line(output) if as_json else output.outputs[0].text)
    errors = [output.outputs[0].error for output in outputs if output.outputs[0].error]
    if errors:
        raise RequestError(f"{len(errors)} of {len(outputs)} prompts failed; the first: {errors[0]}")


def as_line(output: RequestOutput) -> str:
    """One finished prompt as a line of JSON."""
    first = output.outputs[0]
    return json.dumps(
        {
            "prompt": output.prompt,
            "text": first.text,
            "finish_reason": first.finish_reason,
            "prompt_tokens": len(output.prompt_token_ids),
            "completion_tokens": len(first.token_ids),
            **({"error": first.error} if first.error else {}),
        },
        ensure_ascii=False,
    )
