"""`l4 bench`: how fast a server, an engine or a kernel is, as a table, as JSON and as charts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from l4core.cli.bench_predict import predict
from l4core.cli.command import CONTEXT, L4Command, write_options
from l4core.cli.errors import nearest
from l4core.cli.log import configure_logging
from l4core.cli.options import table_options
from l4core.cli.settings import API_KEY, read_configs
from l4core.cli.table import text_table
from l4core.errors import ConfigError, L4Error

if TYPE_CHECKING:
    from l4core.bench.datasets import Lengths

F = TypeVar("F", bound=Callable[..., Any])
POSITIVE = click.IntRange(min=1)


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

    `serve` loads any OpenAI server; `latency`, `throughput` and `kernels` run a model in this process; `predict` is
    for several devices from one. See docs/benchmarks.md.
    """


def lengths(input_len: int, output_len: int, *, spread: bool = True) -> Callable[[F], F]:
    """Options of made-up prompts. spread: whether they may differ."""

    def decorate(function: F) -> F:
        made = [
            click.option("--input-len", type=POSITIVE, default=input_len, show_default=True, help="tokens"),
            click.option("--output-len", type=POSITIVE, default=output_len, show_default=True, help="tokens"),
        ]
        if spread:
            share = click.FloatRange(0, 1)
            text = "lengths are drawn from n·(1±X)"
            made.append(click.option("--spread", type=share, default=0.0, show_default=True, help=text))
        for option in reversed(made):
            function = option(function)
        return function

    return decorate


def output_options(function: F) -> F:
    """Where results go."""
    for option in (
        click.option("--plot", type=click.Path(file_okay=False, path_type=Path), metavar="DIR", help="charts as SVG"),
        click.option(
            "--out", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="results as JSON, too"
        ),
        click.option("--json", "as_json", is_flag=True, help="results as JSON instead of a table"),
    ):
        function = option(function)
    return function


@bench.command(cls=L4Command, short_help="Load any OpenAI server: latencies, throughput, goodput.")
@click.option("--url", default="http://127.0.0.1:30000", show_default=True, help="the server, with or without /v1")
@click.option("--model", default="", metavar="NAME", help="[the first the server lists]")
@click.option("--endpoint", type=click.Choice(["completions", "chat"]), default="completions", show_default=True)
@click.option("--api-key", envvar=API_KEY, default="", help=f"(env: {API_KEY})")
@click.option("--rates", metavar="R,R,…", help="requests a second, Poisson arrivals; inf = all at once")
@click.option("--concurrency", metavar="N,N,…", help="requests in flight [1,8,32 when no rates are given]")
@click.option("--num-prompts", type=POSITIVE, default=100, show_default=True, help="for each rate or concurrency")
@click.option(
    "--dataset", type=click.Choice(["random", "shared-prefix", "sharegpt"]), default="random", show_default=True
)
@click.option("--dataset-path", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE")
@lengths(1000, 1000)
@click.option("--prefix-len", type=click.IntRange(min=0), default=0, help="shared-prefix: tokens of the beginning")
@click.option("--num-prefixes", type=POSITIVE, default=1, show_default=True, help="shared-prefix: beginnings")
@click.option("--token-ids", default="256:30000", show_default=True, metavar="LOW:HIGH", help="to make prompts of")
@click.option("--sla", metavar="NAME=MS,…", help="of ttft, tpot, itl, e2e: goodput counts requests that keep all")
@click.option(
    "--intrude", type=click.IntRange(min=0), default=0, metavar="TOKENS", help="one long prompt comes in halfway"
)
@click.option("--ignore-eos/--no-ignore-eos", default=True, help="answers of the full length [yes]")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True)
@click.option(
    "--warmup", type=click.IntRange(min=0), default=1, show_default=True, help="requests before the first load"
)
@click.option("--timeout", type=click.FloatRange(min=0.001), default=3600.0, show_default=True, help="s, of a request")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--floor", "floor_model", metavar="DIR|scout|maverick", help="adds the floor of a decode step of it …")
@click.option("--bandwidth", type=click.FloatRange(min=0.001), metavar="GB/s", help="… at this copy rate")
@click.option("--floor-weights", type=click.Choice(["bfloat16", "fp8", "int4"]), default="bfloat16", show_default=True)
@output_options
def serve(
    url: str,
    model: str,
    endpoint: str,
    api_key: str,
    rates: str | None,
    concurrency: str | None,
    num_prompts: int,
    dataset: Any,
    dataset_path: Path | None,
    input_len: int,
    output_len: int,
    spread: float,
    prefix_len: int,
    num_prefixes: int,
    token_ids: str,
    sla: str | None,
    intrude: int,
    ignore_eos: bool,
    temperature: float,
    warmup: int,
    timeout: float,
    seed: int,
    floor_model: str | None,
    bandwidth: float | None,
    floor_weights: str,
    **output: Any,
) -> None:
    """Send requests to a running server, at rates it must keep up with or so many at once, and sum up what came back.

    Failed requests are counted by kind and never left out. Latencies count from when a request was due.
    """
    from l4core.bench.client import Target
    from l4core.bench.report import notes, serve_charts, serve_table
    from l4core.bench.serve import Plan, parse_ids, parse_limits, parse_loads, sweep, with_floor

    if (floor_model is None) != (bandwidth is None):
        raise ConfigError("a floor needs a model and a copy rate", fix="--floor scout --bandwidth 3030")
    target = Target(
        url=url,
        model=model,
        endpoint=endpoint,
        api_key=api_key,
        ignore_eos=ignore_eos,
        temperature=temperature,
        timeout=timeout,
    )
    plan = Plan(
        loads=parse_loads(rates, concurrency),
        dataset=dataset,
        path=dataset_path,
        lengths=_lengths(input_len, output_len, spread),
        ids=parse_ids(token_ids),
        prefix=prefix_len,
        num_prefixes=num_prefixes,
        num_prompts=num_prompts,
        warmup=warmup,
        limits=parse_limits(sla),
        intrude=intrude,
        seed=seed,
    )
    found = sweep(target, plan, lambda point: click.echo(f"{point['load']} done in {point['seconds']:.1f} s", err=True))
    if floor_model is not None and bandwidth is not None:
        with_floor(found, floor_model, bandwidth * 1e9, floor_weights)
    points = found["points"]
    _deliver(found, text_table(*serve_table(points)), serve_charts(points), **output)
    for line in notes(points):
        click.echo(line, err=True)
    if not any(point["ok"] for point in points):
        raise L4Error("no request ended well")


@bench.command(cls=L4Command, short_help="Times of decode steps and prefills, in this process.")
@table_options(server=("log_level",))
@click.option("--batch", default="1,8,32", show_default=True, metavar="N,N,…", help="requests at once")
@lengths(1024, 64, spread=False)
@click.option("--prefill", default="1x1024", show_default=True, metavar="NxLEN,…", help='prompts at once; "" = none')
@click.option("--repeats", type=POSITIVE, default=3, show_default=True, help="of each prefill; the best counts")
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
    _deliver({"kind": "latency", **head, "rows": rows}, text, steps_charts(rows), **_output(options))


@bench.command(cls=L4Command, short_help="Tokens a second of many requests, in this process.")
@table_options(server=("log_level",))
@click.option("--num-prompts", type=POSITIVE, default=100, show_default=True)
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
        num_prompts, _lengths(input_len, output_len, spread), range(made.config.vocab_size), made.seed
    )
    found = made.throughput(samples)
    rows = [(name, f"{value:,.2f}" if isinstance(value, float) else str(value)) for name, value in found.items()]
    shown = [row for row in rows if row[0] not in ("step_ms", "first_error")]
    text = "\n".join([*made.report, "", text_table(("", ""), shown)])
    _deliver({"kind": "throughput", **head, **found}, text, {}, **_output(options))
    if found["failed"]:
        raise L4Error(f"{found['failed']} of {found['requests']} requests failed; the first: {found['first_error']}")


@bench.command(cls=L4Command, short_help="Times of a layer's parts, in this process.")
@table_options(server=("log_level",))
@click.option("--tokens", default="1,32,512", show_default=True, metavar="N,N,…", help="rows of a call")
@click.option("--input-len", type=POSITIVE, default=1024, show_default=True, help="tokens in the KV cache of attention")
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
    _deliver({"kind": "kernels", **head, "rows": rows}, text, {}, **_output(options))


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


def _deliver(
    found: dict[str, Any], text: str, charts: Mapping[str, str], *, out: Path | None, plot: Path | None, as_json: bool
) -> None:
    from l4core.bench.serve import as_json as encode

    click.echo(encode(found) if as_json else text, nl=not as_json)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(encode(found), encoding="utf-8")
    if plot is not None:
        plot.mkdir(parents=True, exist_ok=True)
        for name, svg in charts.items():
            (plot / name).write_text(svg, encoding="utf-8")


def _lengths(input_len: int, output_len: int, spread: float) -> Lengths:
    from l4core.bench.datasets import Lengths

    return Lengths(input=input_len, output=output_len, spread=spread)


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


bench.add_command(predict)
