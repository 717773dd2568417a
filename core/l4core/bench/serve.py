"""A sweep over loads against any OpenAI server: one point for each rate or concurrency, all in one result."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from l4core.bench.client import Record, Target, ask, first_model
from l4core.bench.datasets import Lengths, Sample, conversations, random_tokens, shared_prefix
from l4core.bench.floor import decode_bytes, weights_by_config
from l4core.bench.load import LIMITS, Load, Run, point, run
from l4core.engine.start.capacity import load_config
from l4core.errors import ConfigError, L4Error

DATASETS = ("random", "shared-prefix", "sharegpt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is sent. dataset: one of DATASETS.  ids: token ids of made-up prompts.  limits: ms by name (LIMITS), for goodput.
    intrude: tokens of one long prompt that comes in halfway, 0 = none."""

    loads: Sequence[Load]
    dataset: Literal["random", "shared-prefix", "sharegpt"] = "random"
    path: Path | None = None
    lengths: Lengths = field(default_factory=Lengths)
    ids: range = range(256, 30_000)
    prefix: int = 0
    num_prefixes: int = 1
    num_prompts: int = 100
    warmup: int = 1
    limits: Mapping[str, float] = field(default_factory=dict)
    intrude: int = 0
    seed: int = 0

    def samples(self, index: int) -> list[Sample]:
        """Of the load with that index; no two loads have a prompt in common, so a prefix cache finds in one nothing of another."""
        seed = self.seed * 1_000_003 + index
        if self.dataset == "sharegpt":
            if self.path is None:
                raise ConfigError("--dataset sharegpt reads a file", fix="--dataset-path FILE")
            return conversations(self.path, self.num_prompts, seed)
        if self.dataset == "shared-prefix":
            if self.prefix < 1:
                raise ConfigError("--dataset shared-prefix has a prefix of 0 tokens", fix="--prefix-len N")
            return shared_prefix(
                self.num_prompts, self.lengths, self.ids, seed, prefix=self.prefix, num_prefixes=self.num_prefixes
            )
        return random_tokens(self.num_prompts, self.lengths, self.ids, seed)

    def intruder(self, index: int) -> Sample | None:
        if not self.intrude:
            return None
        lengths = Lengths(input=self.intrude, output=1)
        return random_tokens(1, lengths, self.ids, ~(self.seed * 1_000_003 + index))[0]


def sweep(target: Target, plan: Plan, told: Callable[[Mapping[str, Any]], None] = lambda _: None) -> dict[str, Any]:
    """Every load of the plan in turn. told: is given each point when it is done. Raises L4Error when already the first request fails."""
    return asyncio.run(_sweep(target, plan, told))


async def _sweep(target: Target, plan: Plan, told: Callable[[Mapping[str, Any]], None]) -> dict[str, Any]:
    if not target.model:
        target = replace(target, model=await first_model(target))
    await _warm_up(target, plan)
    points = []
    for index, load in enumerate(plan.loads):
        done: Run = await run(target, plan.samples(index), load, plan.seed + index, plan.intruder(index))
        points.append(point(done, load, plan.limits))
        told(points[-1])
    return {"kind": "serve", "target": _public(target), "plan": _described(plan), "points": points}


async def _warm_up(target: Target, plan: Plan) -> None:
    for sample in plan.samples(len(plan.loads))[: plan.warmup]:
        record: Record = await ask(target, replace(sample, max_tokens=min(sample.max_tokens, 8)), 0.0, lambda: 0.0)
        if record.error:
            raise L4Error(f"{target.url} did not answer the first request: {record.detail}", fix=_fix(record, target))


def _fix(record: Record, target: Target) -> str:
    if record.error == "wrong length":
        return "--no-ignore-eos, if the server does not know ignore_eos"
    if record.error == "HTTP 404" and target.endpoint == "completions":
        return "--endpoint chat, if the server has no /v1/completions"
    if record.error == "HTTP 401":
        return "--api-key KEY, or export L4_API_KEY=KEY"
    if record.error == "HTTP 400":
        return "--token-ids LOW:HIGH within the model's vocabulary, --input-len and --output-len within its context"
    return ""


def _public(target: Target) -> dict[str, Any]:
    shown = {name: getattr(target, name) for name in ("url", "model", "endpoint", "ignore_eos", "temperature")}
    return {**shown, "extra": dict(target.extra)}


def _described(plan: Plan) -> dict[str, Any]:
    return {
        "dataset": plan.dataset if plan.path is None else f"{plan.dataset} {plan.path.name}",
        "input": plan.lengths.input,
        "output": plan.lengths.output,
        "spread": plan.lengths.spread,
        "prefix": plan.prefix,
        "num_prefixes": plan.num_prefixes,
        "num_prompts": plan.num_prompts,
        "seed": plan.seed,
        "limits_ms": dict(plan.limits),
        "intrude": plan.intrude,
    }


def parse_loads(rates: str | None, concurrency: str | None) -> list[Load]:
    """("1,2,inf", "8") → loads, rates first; 1, 8 and 32 at once when neither is given. Raises ConfigError."""
    loads = []
    for text in _parts(rates):
        try:
            rate = float(text)
        except ValueError:
            rate = 0.0
        if not rate > 0:
            raise ConfigError(f"--rates has {text!r}; wanted requests a second, or inf", fix="--rates 1,2,4,inf")
        loads.append(Load(rate=rate))
    for text in _parts(concurrency):
        if not text.isdigit() or int(text) < 1:
            raise ConfigError(f"--concurrency has {text!r}; wanted whole numbers ≥ 1", fix="--concurrency 1,8,32")
        loads.append(Load(concurrency=int(text)))
    return loads or [Load(concurrency=count) for count in (1, 8, 32)]


def parse_limits(text: str | None) -> dict[str, float]:
    """ "ttft=500,tpot=50" → ms by name. Raises ConfigError."""
    limits = {}
    for part in _parts(text):
        name, _, value = part.partition("=")
        try:
            limit = float(value)
        except ValueError:
            limit = 0.0
        if name not in LIMITS or not limit > 0:
            raise ConfigError(
                f"--sla has {part!r}; wanted NAME=MS of {', '.join(LIMITS)}", fix="--sla ttft=500,tpot=50"
            )
        limits[name] = limit
    return limits


def parse_ids(text: str) -> range:
    """ "256:30000" → token ids from 256 to 29,999. Raises ConfigError."""
    low, _, high = text.partition(":")
    if not (low.isdigit() and high.isdigit() and int(low) < int(high)):
        raise ConfigError(f"--token-ids is {text!r}; wanted LOW:HIGH", fix="--token-ids 256:30000")
    return range(int(low), int(high))


def _parts(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def with_floor(result: dict[str, Any], model: str, copy: float, weights: str) -> dict[str, Any]:
    """The same result with `floor_ms` in each point: what a decode step of as many requests as were in flight must read, at `copy` bytes/s.
    model: a folder or a released one's name.  weights: how they are stored (engine.capacity.WEIGHTS)."""
    config = load_config(model)
    sizes = weights_by_config(config, weights)
    for each in result["points"]:
        context = round((each["input_tokens"] + each["output_tokens"] / 2) / max(1, each["ok"]))
        batch = max(1, round(each["mean_in_flight"]))
        each["floor_ms"] = decode_bytes(config, sizes, batch=batch, context=max(1, context)) / copy * 1e3
    result["floor"] = {"model": model, "weights": weights, "copy_bytes_per_s": copy}
    return result


def as_json(result: Mapping[str, Any]) -> str:
    """Infinite rates are the word "inf": JSON has no number for them."""
    return json.dumps(_finite(result), indent=1, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return "inf" if value == float("inf") else value
