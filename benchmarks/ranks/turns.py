"""What it costs to tell the other ranks of a step: from rank 0's `send` to the last rank's having it, and a checksum of a step.

    python benchmarks/ranks/turns.py [--ranks 8] [--json OUT]

Half of the time there and back, median and p99, of messages as a decode step's. No model, no torch.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

from l4core.engine.batch import ScheduledBatch, ScheduledSequence
from l4core.engine.inbox import Inbox
from l4core.engine.process.turns import Turn, _encoder, checksum
from l4core.engine.schedule.step_costs import StepCosts
from l4core.parallel.connect import Crew
from l4core.parallel.place import local_layout
from l4core.request import Request, SamplingParams, SequenceUpdate, StepOutput

sys.path.append(Path(__file__).resolve().parents[1].as_posix())
from where import where

ROUNDS = 2000


def follower(place: object) -> None:
    crew = Crew(place, {}, lambda words: sys.exit(words.message))  # type: ignore[arg-type]
    for _ in range(ROUNDS):
        crew.receive()
        crew.send(b"!")
    crew.watchdog.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    layout = local_layout(args.ranks, 30.0)
    listener = layout.open()
    first, *others = layout.with_listener(listener)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=follower, args=(place,)) for place in others]
    for process in processes:
        process.start()
    crew = Crew(first, {}, lambda words: sys.exit(words.message))
    payload = _encoder.encode(
        Turn.of(Inbox(step_costs=StepCosts(target_ms=25.0, max_prefill_tokens=256), num_drafts=3), 7, 9)
    )
    there, send = [], []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        crew.send(payload)
        send.append(time.perf_counter() - began)
        for rank in crew.met.steps:
            crew.receive(rank)
        there.append((time.perf_counter() - began) / 2)
        time.sleep(0.001)
    crew.watchdog.stop()
    for process in processes:
        process.join()
    found = {
        **where("cpu"),
        "ranks": args.ranks,
        "bytes": len(payload),
        **_times("half_round_trip", there),
        **_times("send", send),
    }
    for count in (1, 64, 256):
        found[f"checksum_of_{count}_us"] = _checksum_us(count)
    print(json.dumps(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


def _times(name: str, seconds: list[float]) -> dict[str, float]:
    return {
        f"{name}_us": round(statistics.median(seconds) * 1e6, 1),
        f"{name}_p99_us": round(statistics.quantiles(seconds, n=100)[98] * 1e6, 1),
    }


def _checksum_us(count: int) -> float:
    request = Request(
        request_id="x", prompt_token_ids=[1], params=SamplingParams(), eos_token_ids=[2], max_total_tokens=9
    )
    sequences = [
        ScheduledSequence(
            request=request, row=i, start=1000 + i, token_ids=[i], new_pages={}, draws=True, is_decode=True
        )
        for i in range(count)
    ]
    output = StepOutput(updates=[SequenceUpdate(request_id="x", new_token_ids=[i]) for i in range(count)])
    batch = ScheduledBatch(step=5, sequences=sequences)
    began = time.perf_counter()
    for _ in range(200):
        checksum(batch, output)
    return round((time.perf_counter() - began) / 200 * 1e6, 1)


if __name__ == "__main__":
    main()
