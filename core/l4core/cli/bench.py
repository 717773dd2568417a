"""`l4 bench`: how fast a server, an engine or a kernel is, as a table, as JSON and as charts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import click

from l4core.cli.bench_options import POSITIVE, deliver, lengths, lengths_of, output_options
from l4core.cli.bench_predict import predict
from l4core.cli.bench_serve import serve
from l4core.cli.command import CONTEXT, L4Command, write_options
from l4core.cli.errors import nearest
from l4core.cli.log import configure_logging
from l4core.cli.options import table_options
from l4core.cli.settings import read_configs
from l4core.cli.table import text_table
from l4core.errors import ConfigError, L4Error


class BenchGroup(click.Group):
    """A misspelt kind of measurement gets the nearest one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            fix = nearest(args[0], self.commands, "l4 bench --help")
            raise ConfigError(f"l4 bench does not know {args[0]!r}", fix=fix)
        return super().resolve_command(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self.format_commands(ctx, formatter)
        write_options(self, ctx, formatter)


@click.group(cls=BenchGroup, context_settings=CONTEXT, short_help="Measure a server, an engine, its kernels.")
def bench() -> None:
    """How fast is it, and what would the device's memory allow?

    `serve` loads any OpenAI server; `latency`, `throughput` and `kernels` run a model in this process; `predict`
    estimates several devices from one. See docs/benchmarks.md.
    """


@bench.command(cls=L4Command, short_help="Times of decode steps and prefills, in this process.")
@table_options(server=("log_level",))
@click.option("--batch", default="1,8,32", show_default=True, metavar="N,N,…", help="requests at once")
@lengths(1024, 64, spread=False)
@click.option(
    "--prefill",
    default="1x1024",
    show_default=True,
    metavar="NxLEN,…",
    help='N prompts of LEN tokens at once; "" = none',
)
@click.option(
    "--repeats", type=POSITIVE, metavar="N", default=3, show_default=True, help="of each prefill; the best counts"
)
@output_options
@click.pass_context
def latency(
    ctx: click.Context,
    /,
    batch: str,
    input_len: int,
    output_len: int,
    prefill: str,
    repeats: int,
    **options: Any,
) -> None:
    """Decode steps at a context of --input-len tokens, the mean of --output-len; and whole prefills. Beside each its floor: the bytes it must read
    at the copy rate of this device, measured now."""
    from l4core.bench.report import steps_charts, steps_table

    batches, prefills = _whole_numbers("--batch", batch), _shapes(prefill)
    made, head = _bench(ctx)
    rows = [made.decode(size, input_len, output_len) for size in batches]
    rows += [made.prefill(size, length, repeats) for size, length in prefills]
    text = "\n".join([*made.report, _rates(head), "", text_table(*steps_table(rows))])
    deliver({"kind": "latency", **head, "rows": rows}, text, steps_charts(rows), **_output(options))


@bench.command(cls=L4Command, short_help="Tokens a second of many requests, in this process.")
@table_options(server=("log_level",))
@click.option("--num-prompts", type=POSITIVE, metavar="N", default=100, show_default=True, help="requests, all at once")
@lengths(1000, 1000)
@output_options
@click.pass_context
def throughput(
    ctx: click.Context, /, num_prompts: int, input_len: int, output_len: int, spread: float, **options: Any
) -> None:
    """All requests at once, random tokens, answers of the full length."""
    from l4core.bench.datasets import random_tokens

    made, head = _bench(ctx)
    samples = random_tokens(
        num_prompts, lengths_of(input_len, output_len, spread), range(made.config.vocab_size), made.seed
    )
    found = made.throughput(samples)
    rows = [(name, f"{value:,.2f}" if isinstance(value, float) else str(value)) for name, value in found.items()]
    shown = [row for row in rows if row[0] not in ("step_ms", "first_error")]
    text = "\n".join([*made.report, "", text_table(("", ""), shown)])
    deliver({"kind": "throughput", **head, **found}, text, {}, **_output(options))
    if found["failed"]:
        raise L4Error(f"{found['failed']} of {found['requests']} requests failed; the first: {found['first_error']}")


@bench.command(cls=L4Command, short_help="Times of a layer's parts, in this process.")
@table_options(server=("log_level",))
@click.option("--tokens", default="1,32,512", show_default=True, metavar="N,N,…", help="rows of a call")
@click.option(
    "--input-len",
    type=POSITIVE,
    metavar="N",
    default=1024,
    show_default=True,
    help="tokens in the KV cache of attention",
)
@output_options
@click.pass_context
def kernels(ctx: click.Context, /, tokens: str, input_len: int, **options: Any) -> None:
    """The products of a layer, its experts, attention of each kind and the head, as this engine would run them, beside what they must read or
    compute."""
    from l4core.bench.report import kernels_table

    counts = _whole_numbers("--tokens", tokens)
    made, head = _bench(ctx)
    rows = made.kernels(counts, input_len)
    text = "\n".join([*made.report, _rates(head), "", text_table(*kernels_table(rows))])
    deliver({"kind": "kernels", **head, "rows": rows}, text, {}, **_output(options))


def _bench(ctx: click.Context) -> tuple[Any, dict[str, Any]]:
    """The engine that the command line asks for, and what a result says of it."""
    import torch

    from l4core import __version__
    from l4core.bench.steps import Bench

    engine, server = read_configs(ctx)
    configure_logging(server.log_level)
    made = Bench(engine)
    head = {
        "model": engine.model,
        "device": str(made.device),
        "dtype": made.rates.dtype,
        "versions": {"l4core": __version__, "torch": torch.__version__},
        "report": list(made.report),
        "ready_s": made.ready_s,
        "rates": dataclasses.asdict(made.rates),
    }
    return made, head


def _rates(head: Mapping[str, Any]) -> str:
    rates = head["rates"]
    return (
        f"{'copy rate':<16}{rates['copy'] / 1e9:,.0f} GB/s, read and written\n"
        f"{'matrix rate':<16}{rates['matmul'] / 1e12:,.2f} TFLOP/s in {rates['dtype']}\n"
        f"{'ready':<16}{head['ready_s']:.1f} s"
    )


def _output(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("out", "plot", "as_json")}


def _whole_numbers(option: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() and int(part) for part in parts):
        raise ConfigError(f"{option} is {text!r}; wanted whole numbers ≥ 1", fix=f"{option} 1,8,32")
    return [int(part) for part in parts]


def _shapes(text: str) -> list[tuple[int, int]]:
    """ "8x2048,1x2048" → (prompts, tokens)."""
    shapes = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        count, _, length = part.partition("x")
        if not (count.isdigit() and length.isdigit() and int(count) and int(length)):
            raise ConfigError(f"--prefill has {part!r}; wanted PROMPTSxTOKENS", fix="--prefill 8x2048,1x2048")
        shapes.append((int(count), int(length)))
    return shapes


for kind in (predict, serve):
    bench.add_command(kind)
