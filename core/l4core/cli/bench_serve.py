"""`l4 bench serve`: load on any OpenAI server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from l4core.cli.bench_options import POSITIVE, deliver, lengths, lengths_of, output_options
from l4core.cli.command import L4Command
from l4core.cli.settings import API_KEY
from l4core.cli.table import text_table
from l4core.errors import ConfigError, L4Error


@click.command(cls=L4Command, short_help="Load any OpenAI server: latencies, throughput, goodput.")
@click.option("--url", default="http://127.0.0.1:30000", show_default=True, help="the server, with or without /v1")
@click.option("--model", default="", metavar="NAME", help="[the first the server lists]")
@click.option(
    "--endpoint",
    type=click.Choice(["completions", "chat"]),
    default="completions",
    show_default=True,
    help="route that is asked",
)
@click.option(
    "--api-key", envvar=API_KEY, default="", metavar="KEY", help=f"the server's, if it wants one (env: {API_KEY})"
)
@click.option("--rates", metavar="R,R,…", help="requests a second, Poisson arrivals; inf = all at once")
@click.option("--concurrency", metavar="N,N,…", help="requests in flight [1,8,32 when no rates are given]")
@click.option(
    "--num-prompts",
    type=POSITIVE,
    metavar="N",
    default=100,
    show_default=True,
    help="requests of each rate or concurrency",
)
@click.option(
    "--dataset",
    type=click.Choice(["random", "shared-prefix", "sharegpt"]),
    default="random",
    show_default=True,
    help="where prompts come from",
)
@click.option(
    "--dataset-path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="sharegpt: its JSON file",
)
@lengths(1000, 1000)
@click.option(
    "--prefix-len",
    type=click.IntRange(min=0),
    metavar="N",
    default=0,
    help="shared-prefix: tokens that prompts begin with in common",
)
@click.option(
    "--num-prefixes",
    type=POSITIVE,
    metavar="N",
    default=1,
    show_default=True,
    help="shared-prefix: different beginnings",
)
@click.option(
    "--token-ids",
    default="256:30000",
    show_default=True,
    metavar="LOW:HIGH",
    help="ids that random prompts are made of",
)
@click.option(
    "--sla",
    metavar="NAME=MS,…",
    help="limits of ttft, tpot, itl, e2e: goodput counts the requests that keep all of them",
)
@click.option(
    "--intrude",
    type=click.IntRange(min=0),
    default=0,
    metavar="TOKENS",
    help="one prompt of this length comes in halfway",
)
@click.option(
    "--ignore-eos/--no-ignore-eos", default=True, help="answers of the full length, whatever the model says [yes]"
)
@click.option(
    "--temperature", type=click.FloatRange(min=0), metavar="X", default=0.0, show_default=True, help="of the requests"
)
@click.option(
    "--warmup",
    type=click.IntRange(min=0),
    metavar="N",
    default=1,
    show_default=True,
    help="requests before the first load",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0.001),
    metavar="SECONDS",
    default=3600.0,
    show_default=True,
    help="longest request",
)
@click.option("--seed", type=int, metavar="N", default=0, show_default=True, help="of prompts, lengths and arrivals")
@click.option(
    "--floor",
    "floor_model",
    metavar="DIR|scout|maverick",
    help="also print the least time of a decode step of this model …",
)
@click.option("--bandwidth", type=click.FloatRange(min=0.001), metavar="GB/S", help="… on a device that copies so fast")
@click.option(
    "--floor-weights",
    type=click.Choice(["bfloat16", "fp8", "int4"]),
    default="bfloat16",
    show_default=True,
    help="… with weights so kept",
)
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
    from l4core.engine.start.capacity import load_config

    if (floor_model is None) != (bandwidth is None):
        raise ConfigError("a floor needs a model and a copy rate", fix="--floor scout --bandwidth 3030")
    if floor_model is not None:
        load_config(
            floor_model, option="--floor"
        )  # what is wrong with it is told before the load, not after hours of it
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
        lengths=lengths_of(input_len, output_len, spread),
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
    deliver(found, text_table(*serve_table(points)), serve_charts(points), **output)
    for line in notes(points):
        click.echo(line, err=True)
    if not any(point["ok"] for point in points):
        raise L4Error("no request ended well")
