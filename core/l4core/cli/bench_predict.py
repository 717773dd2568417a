"""`l4 bench predict`: tokens a second of several devices, from one of their ranks on the device that is here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from l4core.cli.bench_options import POSITIVE, deliver, out_option
from l4core.cli.command import L4Command
from l4core.cli.log import configure_logging
from l4core.cli.options import table_options
from l4core.cli.settings import read_configs
from l4core.cli.table import text_table
from l4core.errors import ConfigError

if TYPE_CHECKING:
    from l4core.bench.predict import Measured, Prediction, Published

LATENCIES_US = (10, 40)
"""Other latencies of a sum over ranks, to see what hangs on the one that is assumed."""


@click.command(cls=L4Command, short_help="Tokens a second of several devices, from one of them.")
@table_options(server=("log_level",))
@click.option("--ranks", type=POSITIVE, metavar="N", default=8, show_default=True, help="devices that share the model")
@click.option("--gpu", default="H100-80GB,H200", show_default=True, metavar="NAME,…", help="cards to predict for")
@click.option("--concurrency", type=POSITIVE, metavar="N", default=64, show_default=True, help="requests at once")
@click.option("--input-len", type=POSITIVE, metavar="N", default=1000, show_default=True, help="tokens of a prompt")
@click.option(
    "--output-len", type=click.IntRange(min=2), metavar="N", default=1000, show_default=True, help="tokens of an answer"
)
@click.option("--layers", type=POSITIVE, metavar="N", help="run the first N layers only, for a small device [all]")
@click.option(
    "--link-gbs", type=click.FloatRange(min=0.001), metavar="X", help="GB/s between devices, each way [370, NVLink 4]"
)
@click.option(
    "--all-reduce-us", type=click.FloatRange(min=0), metavar="X", help="least time of a sum over ranks, µs [20]"
)
@out_option
@click.option("--json", "as_json", is_flag=True, help="results as JSON instead of a table")
@click.pass_context
def predict(
    ctx: click.Context,
    /,
    ranks: int,
    gpu: str,
    concurrency: int,
    input_len: int,
    output_len: int,
    layers: int | None,
    link_gbs: float | None,
    all_reduce_us: float | None,
    out: Path | None,
    as_json: bool,
    **_: Any,
) -> None:
    """Runs the shapes of one rank of --ranks with random weights (MODEL: a folder with config.json, scout or maverick), adds the sums over ranks as
    bytes over a link, and sets the result beside what others have published. --quantization counts. All that is assumed is printed."""
    from l4core.bench.predict import NVLINK, Link, Load, assumptions, published
    from l4core.bench.predict import predict as predicted
    from l4core.bench.rank import measure

    engine, server = read_configs(ctx)
    configure_logging(server.log_level)
    if engine.tp > 1:
        raise ConfigError("one rank is run, by itself", fix=f"--ranks {engine.tp} instead of --tp {engine.tp}")
    cards = _cards(gpu)
    load = Load(concurrency=concurrency, input=input_len, output=output_len)
    link = Link(
        bandwidth=NVLINK.bandwidth if link_gbs is None else link_gbs * 1e9,
        latency=NVLINK.latency if all_reduce_us is None else all_reduce_us / 1e6,
    )
    made, measured, ran, whole = measure(engine, load, ranks=ranks, layers=layers)
    weights = engine.quantization or "bfloat16"
    rows, results = [], []
    for card in cards:
        found = predicted(measured, ran, whole, load, card, link)
        others = [
            predicted(measured, ran, whole, load, card, dataclasses.replace(link, latency=us / 1e6)).tokens_per_s
            for us in LATENCIES_US
        ]
        theirs = published(engine.model, card, ranks, weights, load)
        rows.append(_row(found, ranks, others, theirs))
        results.append(_json(found, others, theirs))
    said = assumptions(measured, whole, load, link, weights)
    result = {
        "kind": "predict",
        "model": engine.model,
        "ranks": ranks,
        "weights": weights,
        "load": dataclasses.asdict(load),
        "link": dataclasses.asdict(link),
        "measured": {**dataclasses.asdict(measured), "device": str(made.device), "report": list(made.report)},
        "predictions": results,
        "assumptions": said,
    }
    title = f"{engine.model} in {weights} on {ranks} devices, {load.name}"
    sources = sorted({each["published"]["source"] for each in results if each["published"]})
    text = [*made.report, "", title, _here(measured), "", text_table(_HEAD, rows), ""]
    text += ["Assumed:", *(f"  - {line}" for line in said), *(f"Published: {source}" for source in sources)]
    deliver(result, "\n".join(text), {}, out=out, plot=None, as_json=as_json)


def _cards(text: str) -> list[str]:
    from l4core.bench.predict import CARDS

    cards = [card.strip() for card in text.split(",")]
    if unknown := [card for card in cards if card not in CARDS]:
        raise ConfigError(f"--gpu has {unknown[0]!r}; known are {', '.join(CARDS)}", fix=f"--gpu {','.join(CARDS)}")
    return cards


def _here(measured: Measured) -> str:
    return (
        f"measured here: a decode step {measured.decode_ms:.3f} ms, all prompts {measured.prefill_ms:.0f} ms "
        f"(copy {measured.rates.copy / 1e12:.2f} TB/s, products {measured.rates.matmul / 1e12:.0f} TFLOP/s)"
    )


def _json(found: Prediction, others: list[float], theirs: Published | None) -> dict[str, Any]:
    return {
        **dataclasses.asdict(found),
        "step_ms": found.step_ms,
        "if_all_reduce_us": dict(zip(map(str, LATENCIES_US), others, strict=True)),
        "published": None if theirs is None else {"tokens_per_s": theirs.tokens_per_s, "source": theirs.source},
    }


_HEAD = (
    "",
    "decode ms",
    "sums ms",
    "prompts ms",
    "of it sums",
    "tok/s predicted",
    f"at {LATENCIES_US[0]} / {LATENCIES_US[1]} µs a sum",
    "at the floor",
    "published",
    "ratio",
)


def _row(found: Prediction, ranks: int, others: list[float], theirs: Published | None) -> tuple[str, ...]:
    return (
        f"{ranks} × {found.card}",
        f"{found.decode_ms:.2f}",
        f"{found.sums_ms:.2f}",
        f"{found.prefill_ms:.0f}",
        f"{found.prefill_sums_ms:.0f}",
        f"{found.tokens_per_s:,.0f}",
        " / ".join(f"{rate:,.0f}" for rate in others),
        f"{found.floor_tokens_per_s:,.0f}",
        f"{theirs.tokens_per_s:,.0f}" if theirs else "–",
        f"{found.tokens_per_s / theirs.tokens_per_s:.2f}" if theirs else "–",
    )
