"""What requests that decode feel while a 128k prompt is prefilled beside them, with and without `--itl-target-ms`.

    python benchmarks/gpu/itl_under_load.py [--layers 8] [--decodes 31] [--context 1024] [--prompt 131072] [--targets 0,15,25,40] [--out FILE]

Scout's text shape with fewer layers, weights random, in this process: the time from one step's end to the next one's is what each decoding request
waits for its next token. Target 0 = none: prompts take the whole --chunked-prefill-size.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import l4core.engine.start.resolve as resolve
from l4core.bench.stats import summary
from l4core.config import EngineConfig
from l4core.engine.engine import Engine
from l4core.engine.inbox import Inbox
from l4core.engine.pace import paced
from l4core.engine.start.build import build_engine
from l4core.engine.start.capacity import load_config
from l4core.engine.start.graph_sizes import GraphSizes
from l4core.model.config import ModelConfig
from l4core.request import Request, SamplingParams

sys.path.append(Path(__file__).resolve().parents[1].as_posix())
from where import where

SECONDS = 8
"""Longest for one target; a prompt that is not through by then is given up, and the row says so."""


def scout(layers: int) -> ModelConfig:
    """The last layers, so that there is a global one among few."""
    whole = load_config("scout")
    cut = {name: getattr(whole, name)[-layers:] for name in ("moe_layers", "rope_layers", "chunked_layers")}
    return replace(whole, num_layers=layers, **cut)


@contextmanager
def one_graph(size: int) -> Iterator[None]:
    """A graph of the decodes that are measured, and no other: start-up is not what is timed here."""
    own = resolve.graph_sizes

    def only(*args: Any, **kwargs: Any) -> GraphSizes:
        found = own(*args, **kwargs)
        return GraphSizes(sizes=[size]) if found.sizes else found

    resolve.graph_sizes = only
    try:
        yield
    finally:
        resolve.graph_sizes = own


class Case:
    """One engine; `measure` is called once for each target."""

    def __init__(self, args: argparse.Namespace) -> None:
        config = EngineConfig(
            load_format="dummy",
            model="scout",
            max_running_requests=args.decodes + 1,
            chunked_prefill_size=args.piece,
            context_length=args.prompt + 64,
            attention_backend=args.attention_backend,
            disable_radix_cache=True,
            mem_fraction_static=args.mem_fraction_static,
        )
        with one_graph(args.decodes + 1):
            self.built = build_engine(config, progress=False, model_config=scout(args.layers))
        gc.collect()
        gc.freeze()  # as the engine's own process does
        self.engine: Engine = self.built.engine
        self.args = args
        self._random, self._names = random.Random(0), iter(range(1 << 30))

    def measure(self, target_ms: float) -> dict[str, Any]:
        self.engine.scheduler.costs = None
        step = paced(self.engine, target_ms or None)
        quiet = [ms for ms, _ in self._decode_alone(step)]
        name = f"prompt-{next(self._names)}"
        inbox, times, tokens, first = Inbox(requests=[self._request(name, self.args.prompt, 1)]), [], [], False
        began = last = time.perf_counter()
        while not first and last - began < SECONDS:
            output = step(inbox)
            inbox, now = Inbox(), time.perf_counter()
            times.append((now - last) * 1e3)
            tokens.append(output.stats.num_prefill_tokens)
            last = now
            first = any(update.request_id == name and update.new_token_ids for update in output.updates)
        self._clear()
        return {
            "target_ms": target_ms,
            "finished": first,
            "steps": len(times),
            "ttft_s": last - began,
            "prompt_tokens_per_s": sum(tokens) / (last - began),
            "prefill_tokens_a_step": summary(tokens),
            "itl_ms": summary(times),
            "itl_alone_ms": summary(quiet),
            "trace": [(count, round(ms, 2)) for count, ms in zip(tokens, times, strict=True)],
            "late": sum(ms > target_ms for ms in times) / len(times) if target_ms else None,
        }

    def _decode_alone(self, step: Any) -> Iterator[tuple[float, int]]:
        """The decoding requests start; then their steps alone, for comparison."""
        started, inbox = set[str](), Inbox(requests=self._decoders())
        while len(started) < self.args.decodes:
            started |= {update.request_id for update in step(inbox).updates if update.new_token_ids}
            inbox = Inbox()
        for number in range(48):
            began = time.perf_counter()
            step(Inbox())
            if number >= 16:
                yield (time.perf_counter() - began) * 1e3, 0

    def _decoders(self) -> list[Request]:
        return [
            self._request(f"decode-{next(self._names)}", self.args.context, 100_000) for _ in range(self.args.decodes)
        ]

    def _request(self, name: str, length: int, new: int) -> Request:
        return Request(
            request_id=name,
            prompt_token_ids=self._random.choices(range(200_000), k=length),
            params=SamplingParams(temperature=1.0, seed=0, max_tokens=new, ignore_eos=True),
            eos_token_ids=(),
            max_total_tokens=min(length + new, self.args.prompt + 64),
        )

    def _clear(self) -> None:
        self.engine.abort([seq.request.request_id for seq in self.engine.scheduler.sequences])
        while self.engine.has_work:
            self.engine.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--decodes", type=int, default=31)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=131_072)
    parser.add_argument("--piece", type=int, default=8192, help="--chunked-prefill-size")
    parser.add_argument("--targets", default="0,15,25,40")
    parser.add_argument(
        "--rounds", type=int, default=2, help="the last one counts: the others compile what pieces of new lengths need"
    )
    parser.add_argument("--attention-backend")
    parser.add_argument("--mem-fraction-static", type=float)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    case = Case(args)
    print(*case.built.report, sep="\n")
    rows = []
    print(
        f"{'target ms':>10}{'ITL p50':>9}{'p99':>8}{'max':>8}{'alone':>8}{'late':>7}{'prompt s':>10}{'tok/step':>10}",
        flush=True,
    )
    for target in map(float, args.targets.split(",")):
        earlier = [case.measure(target)["itl_ms"] for _ in range(args.rounds - 1)]
        row = {**case.measure(target), "earlier_itl_ms": earlier}
        rows.append(row)
        itl, late = row["itl_ms"], "–" if row["late"] is None else f"{row['late']:.1%}"
        print(
            f"{target or 'none':>10}{itl['p50']:9.2f}{itl['p99']:8.2f}{itl['max']:8.2f}{row['itl_alone_ms']['p50']:8.2f}"
            f"{late:>7}{row['ttft_s']:10.2f}{row['prefill_tokens_a_step']['p50']:10.0f}"
            + ("" if row["finished"] else "  (given up)"),
            flush=True,
        )
        if args.out:
            head = {**where(), "layers": args.layers, "decodes": args.decodes}
            args.out.write_text(json.dumps({**head, "prompt": args.prompt, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
