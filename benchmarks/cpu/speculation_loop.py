"""What the host adds to a speculating step, in the simple loop and in the relay: the device is a clock, the host's work is real.

    python benchmarks/cpu/speculation_loop.py [--batches 1,4,16] [--steps 300] [--acceptance 0.7] [--json OUT]

The engine is built as for graphs, with an EAGLE3 draft; a replay takes no time of the host and, of the clock, what NOTES.md measured on an H200 for
8 layers of Scout (batch 16: a guess). Both loops take turns. Printed: ms a step, and how much of it the device had nothing to do.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import l4core.engine.run.runner as runner_module
import l4core.engine.speculation.late as late_module
import l4core.engine.start.build as build
from l4core.config import from_mapping
from l4core.engine.engine import Engine
from l4core.engine.inbox import Inbox
from l4core.engine.process.messages import Stepped, frame
from l4core.engine.run.fixed_step import Computed, StepShape
from l4core.engine.run.padding import AuxRows
from l4core.engine.speculation.draft_steps import FixedExtend, FixedGuess
from l4core.request import Request, SamplingParams
from l4core.testing.models.eagle3 import make_tiny_draft

sys.path.insert(0, (Path(__file__).parents[1] / "gpu").as_posix())
from host_cost import CONFIG

sys.path.append(Path(__file__).resolve().parents[1].as_posix())
from where import where

STEPS, VOCAB = 3, 1000
TIMES = {1: (3.114, 0.378, 0.887), 4: (6.256, 0.464, 0.982), 16: (10.0, 0.6, 1.2)}
"""Batch → ms of a verify of 4 tokens, of the draft's pass over them, of three guesses."""


class Clock:
    """The device: does what it was asked one after the other."""

    def __init__(self) -> None:
        self.free_at = self.busy = 0.0

    def run(self, ms: float) -> None:
        self.free_at = max(self.free_at, time.perf_counter()) + ms / 1e3
        self.busy += ms

    def wait(self, until: float | None = None) -> None:
        until = self.free_at if until is None else until
        while time.perf_counter() < until:
            pass


CLOCK = Clock()


class Arrives:
    """In place of Download."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self._at = tensor.as_subclass(torch.Tensor).clone(), CLOCK.free_at

    def wait(self) -> torch.Tensor:
        CLOCK.wait(self._at)
        return self._tensor


class OnDevice(torch.Tensor):
    """Whose reading waits."""

    def tolist(self) -> Any:
        CLOCK.wait()
        return super().tolist()


def is_right(positions: torch.Tensor, acceptance: float) -> torch.Tensor:
    return positions * 7919 % 1000 < 1000 * acceptance


class Replays:
    """In place of captured graphs."""

    def __init__(self, make: Any, ms: float, result: Any) -> None:
        self._make, self._ms, self._result, self._steps = make, ms, result, {}

    def find(self, num_seqs: int, num_tokens: int) -> Any:
        if num_tokens > STEPS + 1:  # a prompt
            return None
        shape = StepShape(num_seqs, num_tokens)
        if shape not in self._steps:
            self._steps[shape] = self._make(shape)
        return self._steps[shape]

    def replay(self, step: Any) -> Any:
        CLOCK.run(self._ms)
        return self._result(step)


def put_on_the_clock(engine: Engine, batch: int, acceptance: float) -> None:
    runner: Any = engine.runner
    speculation: Any = engine.speculation
    state = speculation._state
    verify, extend, guess = TIMES[batch]
    aux = torch.zeros(batch * (STEPS + 1), 3 * 256, dtype=torch.bfloat16)
    outputs = runner_module.StepOutputs(batch * (STEPS + 1), runner.model, torch.device("cpu"))

    def verified(step: Any) -> Computed:
        positions = step.inputs[2] + torch.arange(1, step.shape.num_tokens + 1).unsqueeze(1)
        ids = (positions % VOCAB).t().reshape(-1)
        rows = AuxRows(values=aux[: len(ids)], num_tokens=step.shape.num_tokens)
        return Computed(hidden=aux, aux=rows, logits=aux, drawn=torch.stack((ids, torch.ones_like(ids))))

    def guessed(step: Any) -> torch.Tensor:
        positions = step._inputs[1] + torch.arange(step.shape.num_tokens).unsqueeze(1)
        return ((positions + ~is_right(positions, acceptance)) % VOCAB).as_subclass(OnDevice)

    runner.graphs = Replays(lambda shape: runner.fixed_step(shape, outputs), verify, verified)
    speculation._extends = Replays(lambda shape: FixedExtend(shape, state, aux), extend, lambda step: None)
    make = lambda shape: FixedGuess(shape, state, sampled=False)  # noqa: E731
    speculation._guesses = {False: Replays(make, guess, guessed)}


def make_engine(batch: int) -> Engine:
    given: dict[str, Any] = {"load_format": "dummy", "device": "cpu", "max_running_requests": batch}
    given |= {"max_total_tokens": batch * 4096, "context_length": 4096, "disable_radix_cache": False}
    with tempfile.TemporaryDirectory() as folder:
        target, draft = Path(folder) / "target", Path(folder) / "draft"
        target.mkdir()
        text = {**CONFIG, "num_hidden_layers": 4, "no_rope_layers": [1] * 4}
        (target / "config.json").write_text(json.dumps(text))
        make_tiny_draft(draft, text, aux_layers=[0, 1, 2])
        given |= {"speculative_algorithm": "EAGLE3", "speculative_draft_model_path": draft.as_posix()}
        given |= {"speculative_adaptive": "off", "speculative_num_steps": STEPS, "model": target.as_posix()}
        return build.build_engine(from_mapping(given)[0], progress=False).engine


@contextmanager
def arrivals() -> Iterator[None]:
    own = runner_module.Download
    runner_module.Download = late_module.Download = Arrives  # type: ignore[misc, assignment]
    yield
    runner_module.Download = late_module.Download = own  # type: ignore[misc]


def measure(engine: Engine, batch: int, loop: str, steps: int) -> tuple[float, float]:
    """→ ms a step, and of them ms in which the clock stood."""
    engine.overlap = loop == "relay"
    engine.scheduler.max_in_flight = 2 if engine.overlap else 1
    requests = [
        Request(
            request_id=str(i),
            prompt_token_ids=[j % VOCAB for j in range(8)],
            params=SamplingParams(temperature=0.0, max_tokens=3800, ignore_eos=True),
            eos_token_ids=(),
            max_total_tokens=4000,
        )
        for i in range(batch)
    ]
    engine.step(Inbox(requests=requests))
    for _ in range(20):
        engine.step()
    CLOCK.wait()
    began, CLOCK.busy = time.perf_counter(), 0.0
    for _ in range(steps):
        frame(Stepped(output=engine.step()))
    CLOCK.wait()
    took = (time.perf_counter() - began) * 1e3
    engine.abort([str(i) for i in range(batch)])
    while engine.has_work:
        engine.step()
    return took / steps, (took - CLOCK.busy) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--acceptance", type=float, default=0.7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for batch in map(int, args.batches.split(",")):
        engine = make_engine(batch)
        with arrivals():
            put_on_the_clock(engine, batch, args.acceptance)
            gc.collect()
            gc.freeze()
            found: dict[str, list[tuple[float, float]]] = {"simple": [], "relay": []}
            for _ in range(args.rounds):
                for loop, times in found.items():
                    times.append(measure(engine, batch, loop, args.steps))
        row: dict[str, Any] = {"batch": batch, "device_ms": round(sum(TIMES[batch]), 3)}
        for loop, times in found.items():
            row[loop] = {
                "ms": round(statistics.median(t for t, _ in times), 3),
                "device_idle_ms": round(statistics.median(t for _, t in times), 3),
            }
        rows.append(row)
        print(json.dumps(row), flush=True)
    if args.json:
        args.json.write_text(json.dumps({**where("cpu"), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
