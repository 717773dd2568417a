"""`l4 plan`: what a model holds on a device, before it is launched."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from l4core.cli.command import L4Command
from l4core.cli.table import text_table
from l4core.errors import ConfigError

if TYPE_CHECKING:
    from l4core.engine.capacity import Capacity, Setup
    from l4core.model.config import ModelConfig

GIB = 1 << 30
NOT_BUILT = "fp8 and int4 weights and fp8 KV are not built yet; their figures are arithmetic only."


@click.command(cls=L4Command, short_help="What fits on a device: weights, KV, the largest context.")
@click.option(
    "--model", required=True, metavar="DIR|scout|maverick", help="a folder with config.json, or a released model"
)
@click.option("--gpu", metavar="NAME", help="H100-80GB, H200, B200, MI300X, … (see an unknown one's error for all)")
@click.option("--memory", type=click.FloatRange(min=0.1), metavar="GIB", help="memory of one device, instead of --gpu")
@click.option("--tp", type=click.IntRange(min=1), default=1, metavar="N", help="tensor-parallel devices [1]")
@click.option(
    "--quantization", type=click.Choice(["none", "fp8", "int4"]), default="none", help="of the weights [none]"
)
@click.option(
    "--kv-cache-dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "fp8"]),
    default="auto",
    help="[auto: bfloat16]",
)
@click.option("--page-size", type=click.IntRange(min=1), default=64, metavar="N", help="tokens [64]")
@click.option(
    "--context-length", type=click.IntRange(min=1), metavar="N", help="tokens that one request must be able to have"
)
@click.option("--max-running-requests", type=click.IntRange(min=1), default=256, metavar="N", help="[256]")
@click.option(
    "--mem-fraction-static",
    type=click.FloatRange(0.01, 1.0),
    metavar="F",
    help="weights + KV, share of the device [0.88]",
)
@click.option(
    "--swa-full-tokens-ratio",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="R",
    help="cap on local KV, by SGLang's arithmetic [none]",
)
@click.option("--disable-hybrid-swa-memory", is_flag=True, help="local KV of finished chunks is kept")
@click.option("--json", "as_json", is_flag=True, help="an object instead of text")
def plan(
    model: str,
    gpu: str | None,
    memory: float | None,
    tp: int,
    quantization: str,
    kv_cache_dtype: str,
    page_size: int,
    context_length: int | None,
    max_running_requests: int,
    mem_fraction_static: float | None,
    swa_full_tokens_ratio: float | None,
    disable_hybrid_swa_memory: bool,
    as_json: bool,
) -> None:
    """What a model holds on a device: weights, KV memory, the largest context, requests at once, and what each flag would change.

    The same arithmetic sizes the engine at start-up. Text half only: the vision encoder is not loaded yet.
    """
    from l4core.engine.capacity import Setup, capacity, load_config

    config = load_config(model)
    setup = Setup(
        memory_bytes=memory_of(gpu, memory),
        tp=tp,
        weights="bfloat16" if quantization == "none" else quantization,
        kv_bytes=1 if kv_cache_dtype == "fp8" else 2,
        page_size=page_size,
        context_length=context_length,
        max_running=max_running_requests,
        fraction=mem_fraction_static,
        local_ratio=swa_full_tokens_ratio,
        hybrid=not disable_hybrid_swa_memory,
    )
    found = capacity(config, setup)
    if as_json:
        click.echo(json.dumps(found.json(), indent=2))
        return
    click.echo(f"{model} on {tp} × {gpu or f'{memory:g} GiB'}\n")
    click.echo(text_table(("each device", "", ""), list(_rows(found))))
    click.echo("\n" + text_table(("requests of", "at once"), [(f"{n:,} tokens", f"{k:,}") for n, k in found.at_once]))
    click.echo("\n" + text_table(("with", "largest context"), list(_changes(config, setup))))
    click.echo("\n" + NOT_BUILT)


def memory_of(gpu: str | None, memory: float | None) -> int:
    """Bytes of one device. ConfigError unless just one of the two is given and known."""
    from l4core.engine.capacity import DEVICES

    if (gpu is None) == (memory is None):
        raise ConfigError(
            "give the device with --gpu or its memory with --memory, one of the two", fix="--gpu H100-80GB"
        )
    if memory is not None:
        return int(memory * GIB)
    assert gpu is not None
    if gpu not in DEVICES:
        raise ConfigError(f"--gpu is {gpu!r}; known are {', '.join(DEVICES)}", fix="--memory GIB takes any device")
    return int(DEVICES[gpu] * GIB)


def _rows(found: Capacity) -> Iterator[tuple[str, str, str]]:
    kv, setup = found.kv, found.setup
    rest = setup.memory_bytes - found.weight_bytes - found.kv_budget
    cut = " or ".join(f"{count} {name}" for name, count in kv.shape.pages.items())
    yield "memory", _gib(setup.memory_bytes), ""
    yield "weights", _gib(found.weight_bytes), setup.weights
    yield (
        "KV",
        _gib(found.kv_budget),
        f"superpages of {cut} pages, {kv.superpage_bytes:,} bytes, {max(kv.waste.values()):.1%} waste at most",
    )
    yield "the rest", _gib(rest), "activations, graphs, runtime"
    yield "largest context", f"{kv.largest_context:,}", "tokens, prompt and answer"


def _changes(config: ModelConfig, setup: Setup) -> Iterator[tuple[str, str]]:
    """The largest context as asked, and with one flag changed at a time."""
    from l4core.engine.capacity import largest_context

    free = dataclasses.replace(setup, context_length=None)
    variants = {
        "what was asked": free,
        "--kv-cache-dtype fp8": dataclasses.replace(free, kv_bytes=1),
        "--quantization fp8": dataclasses.replace(free, weights="fp8"),
        "--quantization int4": dataclasses.replace(free, weights="int4"),
        "--mem-fraction-static 0.92": dataclasses.replace(free, fraction=0.92),
    }
    for name, variant in variants.items():
        if variant != free or name == "what was asked":
            tokens = largest_context(config, variant)
            yield name, f"{tokens:,}" if tokens else "the weights do not fit"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB"
