"""One rank of several as an engine by itself: its shapes, dummy weights, no sums over ranks. For times, not for answers."""

from __future__ import annotations

import dataclasses

from l4core.bench.floor import weights_by_config
from l4core.bench.predict import Load, Measured, Rank
from l4core.bench.steps import WARMUP, Bench
from l4core.config import EngineConfig
from l4core.engine.start.capacity import load_config
from l4core.errors import ConfigError
from l4core.model.config import ModelConfig
from l4core.model.slicing import rank_config

STEPS = 48
SLACK = WARMUP + STEPS + 2 * 64
"""Tokens of a request beyond those that are asked for; two pages of them are what admission wants free."""


def cut(config: ModelConfig, layers: int) -> ModelConfig:
    """The first `layers` layers. ConfigError unless their kinds recur as in the whole model."""
    kinds = tuple(zip(config.moe_layers, config.rope_layers, config.chunked_layers, strict=True))
    period = next(n for n in range(1, len(kinds) + 1) if kinds[: len(kinds) - n] == kinds[n:])
    if not 0 < layers <= config.num_layers or layers % period:
        raise ConfigError(
            f"{layers} of {config.num_layers} layers; their kinds recur every {period}", fix=f"--layers {2 * period}"
        )
    parts = {name: getattr(config, name)[:layers] for name in ("moe_layers", "rope_layers", "chunked_layers")}
    return dataclasses.replace(config, num_layers=layers, **parts)


def engine_config(asked: EngineConfig, load: Load) -> EngineConfig:
    """What is asked, with dummy weights and room for the load and no more, so that graphs and tables are those the load needs."""
    length = load.input + load.output + SLACK
    return dataclasses.replace(
        asked,
        load_format="dummy",
        disable_radix_cache=True,
        context_length=length,
        max_running_requests=load.concurrency,
    )


def measure(
    asked: EngineConfig, load: Load, *, ranks: int, layers: int | None = None
) -> tuple[Bench, Measured, Rank, Rank]:
    """→ (the engine, its times, the rank it is, the rank of the whole model). asked.model: a preset or a folder with config.json."""
    config = load_config(asked.model)
    whole = rank_config(config, ranks)
    part = whole if layers is None else cut(whole, layers)
    made = Bench(engine_config(asked, load), progress=False, model_config=part)
    prefill = made.prefill(load.concurrency, load.input, 2)
    steps = min(STEPS, load.output)
    decode = made.decode(load.concurrency, load.middle - steps // 2, steps)
    measured = Measured(
        decode_ms=decode["ms"],
        prefill_ms=prefill["ms"],
        experts=decode["experts"],
        layers=part.num_layers,
        rates=made.rates,
    )

    def rank(of: ModelConfig) -> Rank:
        kept = asked.quantization or "bfloat16"
        return Rank(
            ranks=ranks,
            config=of,
            weights=weights_by_config(of, kept),
            kv_bytes=made.kv_bytes,
            step_tokens=asked.chunked_prefill_size,
        )

    return made, measured, rank(part), rank(whole)
