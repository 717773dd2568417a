"""Sends requests at a rate (open loop) or so many at once (closed loop), and sums up what came back.

In an open loop a request is due at its own time, whatever became of the others, and its latencies count from then: a generator or a server that
falls behind cannot hide it.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from l4core.bench.client import Record, Target, ask
from l4core.bench.datasets import Sample
from l4core.bench.stats import summary

LIMITS = ("ttft", "tpot", "itl", "e2e")


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """rate: requests a second, arrivals a Poisson process (inf: all at once); or concurrency: requests in flight. One of the two."""

    rate: float | None = None
    concurrency: int | None = None

    def __post_init__(self) -> None:
        if (self.rate is None) == (self.concurrency is None):
            raise ValueError("wanted a rate or a concurrency")

    @property
    def name(self) -> str:
        return f"{self.rate:g}/s" if self.rate is not None else f"{self.concurrency} at once"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """records: one for each sample, in the samples' order.  intruder: the long prompt that came in between, if there was one."""

    records: Sequence[Record]
    intruder: Record | None = None


def arrivals(count: int, rate: float, seed: int) -> Iterator[float]:
    """Seconds after the start at which each of `count` requests is due; the first at once."""
    source, now = random.Random(seed), 0.0
    for _ in range(count):
        yield now
        now += source.expovariate(rate) if math.isfinite(rate) else 0.0


async def run(target: Target, samples: Sequence[Sample], load: Load, seed: int, intruder: Sample | None = None) -> Run:
    """All samples, each once. intruder: sent on top of them when half of them have been sent."""
    began = time.perf_counter()

    def clock() -> float:
        return time.perf_counter() - began

    halfway = asyncio.Event()
    extra = asyncio.create_task(_intrude(target, intruder, halfway, clock)) if intruder else None
    if load.rate is not None:
        records = await _open_loop(target, samples, arrivals(len(samples), load.rate, seed), halfway, clock)
    else:
        records = await _closed_loop(target, samples, load.concurrency or 1, halfway, clock)
    return Run(records=records, intruder=await extra if extra else None)


async def _intrude(target: Target, sample: Sample, halfway: asyncio.Event, clock: Callable[[], float]) -> Record:
    await halfway.wait()
    return await ask(target, sample, clock(), clock)


async def _open_loop(
    target: Target,
    samples: Sequence[Sample],
    times: Iterator[float],
    halfway: asyncio.Event,
    clock: Callable[[], float],
) -> list[Record]:
    tasks = []
    for index, (sample, due) in enumerate(zip(samples, times, strict=True)):
        if (wait := due - clock()) > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(ask(target, sample, due, clock)))
        if 2 * index >= len(samples) - 1:
            halfway.set()
    return list(await asyncio.gather(*tasks))


async def _closed_loop(
    target: Target, samples: Sequence[Sample], concurrency: int, halfway: asyncio.Event, clock: Callable[[], float]
) -> list[Record]:
    records: list[Record | None] = [None] * len(samples)
    left = iter(enumerate(samples))

    async def worker() -> None:
        for index, sample in left:
            if 2 * index >= len(samples) - 1:
                halfway.set()
            records[index] = await ask(target, sample, clock(), clock)

    await asyncio.gather(*(worker() for _ in range(min(concurrency, len(samples)))))
    return [record for record in records if record is not None]


def ttft(record: Record) -> float:
    """ms from when it was due to its first text."""
    return (record.times[0] - record.due) * 1e3


def tpot(record: Record) -> float:
    """ms a token after the first, until the end: tokens without text count too."""
    return (record.end - record.times[0]) * 1e3 / max(1, record.num_output - 1)


def gaps(record: Record) -> list[float]:
    """ms between events that follow one another."""
    return [(b - a) * 1e3 for a, b in pairwise(record.times)]


def e2e(record: Record) -> float:
    """ms from when it was due to its end."""
    return (record.end - record.due) * 1e3


def keeps(record: Record, limits: Mapping[str, float]) -> bool:
    """Whether a request that ended well kept every limit, in ms; itl: in its longest gap."""
    values = {"ttft": ttft(record), "tpot": tpot(record), "itl": max(gaps(record), default=0.0), "e2e": e2e(record)}
    return all(values[name] <= limit for name, limit in limits.items())


def point(run: Run, load: Load, limits: Mapping[str, float]) -> dict[str, Any]:
    """Plain numbers of one run: ms, tokens, seconds. Latencies are of requests that ended well; the others are counted by what went wrong."""
    good = [record for record in run.records if not record.error]
    errors: dict[str, int] = {}
    for record in run.records:
        if record.error:
            errors[record.error] = errors.get(record.error, 0) + 1
    seconds = max((r.end for r in run.records), default=0.0) - min((r.due for r in run.records), default=0.0)
    seconds = max(seconds, 1e-9)
    num_output = sum(r.num_output for r in good)
    found: dict[str, Any] = {
        "load": load.name,
        "rate": load.rate,
        "concurrency": load.concurrency,
        "requests": len(run.records),
        "ok": len(good),
        "errors": errors,
        "first_error": next((r.detail for r in run.records if r.error), ""),
        "seconds": seconds,
        "requests_per_s": len(good) / seconds,
        "output_tokens_per_s": num_output / seconds,
        "total_tokens_per_s": (num_output + sum(r.num_input for r in good)) / seconds,
        "input_tokens": sum(r.num_input for r in good),
        "cached_tokens": sum(r.num_cached for r in good),
        "output_tokens": num_output,
        "mean_in_flight": sum(r.end - r.sent for r in run.records) / seconds,
        "ttft_ms": summary(map(ttft, good)),
        "tpot_ms": summary(tpot(r) for r in good if r.num_output > 1),
        "itl_ms": summary(gap for r in good for gap in gaps(r)),
        "e2e_ms": summary(map(e2e, good)),
        "send_lag_ms": summary((r.sent - r.due) * 1e3 for r in run.records),
    }
    if limits:
        found["goodput_per_s"] = sum(keeps(r, limits) for r in good) / seconds
    if run.intruder is not None:
        found["intruder"] = _intruder(run.intruder, good)
    return found


def _intruder(intruder: Record, others: Sequence[Record]) -> dict[str, Any]:
    """The long prompt's own time to its first token, and the others' gaps while it was computed."""
    if intruder.error:
        return {"error": intruder.detail}
    begin, end = intruder.sent, intruder.times[0]
    during = [(b - a) * 1e3 for r in others for a, b in pairwise(r.times) if b > begin and a < end]
    return {"input_tokens": intruder.num_input, "ttft_ms": ttft(intruder), "itl_ms": summary(during)}
