"""EAGLE3 on Scout's text shape: a verify of 4 tokens and a draft step beside their floors, and what they make of an acceptance length.

    python benchmarks/gpu/speculation.py [--layers 8] [--batches 1,4] [--context 1024] [--profile] [--json OUT] [ENGINE OPTION=VALUE …]

bfloat16, weights random, a draft of Scout's true size (one layer, 32,768 wide, 32,000 tokens). Steps are timed as captured graphs with CUDA events,
each time with other tokens, so that other experts are hit; the experts of each verify are counted in an eager run of the same step, outside the
timing, and its floor counts those. What a step takes does not depend on how many guesses are right, so
speed-up = length · decode / (verify + draft), and on 48 layers: what a layer takes, six times, and the rest once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from decode import Bench, Rates, _profiler, measure_rates

import l4core.engine.speculation.eagle3 as drafter
import l4core.engine.start.resolve as resolve
from l4core.engine.run.fixed_step import StepRequests, StepShape
from l4core.engine.run.graphs import Graphs
from l4core.engine.run.padding import AuxRows
from l4core.engine.speculation.draft_steps import FixedGuess
from l4core.plugin_ops.masks import share

sys.path.append(Path(__file__).resolve().parents[1].as_posix())
from where import where

STEPS, ROUNDS = 3, 24
SCOUT_LAYERS = 48
LENGTHS = (2.0, 2.5, 3.0)
DRAFT = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "hidden_size": 5120,
    "intermediate_size": 32768,
    "num_hidden_layers": 1,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "vocab_size": 202048,
    "draft_vocab_size": 32000,
    "max_position_embeddings": 2048,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batches", default="1,4")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--profile", action="store_true", help="print what each kernel of a draft step takes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("options", nargs="*", help="engine options, as LLM() takes them")
    args = parser.parse_args()
    rates = measure_rates()
    began = time.perf_counter()
    batches = [int(text) for text in args.batches.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        ids = [1, args.layers // 2, args.layers - 1]
        config = {**DRAFT, "eagle_config": {"eagle_aux_hidden_state_layer_ids": sorted(set(ids))}}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        options = {
            "speculative_algorithm": "EAGLE3",
            "speculative_draft_model_path": folder,
            "speculative_adaptive": "off",
            "max_running_requests": "16",
            "max_total_tokens": "32768",
            **dict(option.split("=", 1) for option in args.options),
        }
        bench = SpeculationBench(args.layers, batches, options, args.context)
    print(*bench.bench.report, f"ready in {time.perf_counter() - began:.1f} s", sep="\n")
    print(f"copy {rates.copy / 1e12:.2f} TB/s\n", flush=True)
    rows = []
    for batch in batches:
        found = bench.rows(batch, rates, profile=args.profile)
        rows += found
        for row in found:
            print(json.dumps(row), flush=True)
    if args.json:
        head = {**where(), "copy_tb_s": rates.copy / 1e12}
        args.json.write_text(json.dumps({**head, "layers": args.layers, "rows": rows}, indent=1) + "\n")


class SpeculationBench:
    """One engine with a draft."""

    def __init__(self, layers: int, batches: Sequence[int], options: dict[str, str], context: int) -> None:
        with _draft_on_the_device():
            self.bench = Bench(layers, batches, options, {"temperature": 1.0})
        self._context, self._layers = context, layers
        self._draw = np.random.default_rng(0)
        engine: Any = self.bench.engine
        self.runner, self.speculation = engine.runner, engine.speculation

    def rows(self, batch: int, rates: Rates, *, profile: bool) -> list[dict[str, Any]]:
        """Decode, verify, the draft's two steps, and the speed-ups."""
        self.bench._admit(batch, self._context, 64)  # their rows' block tables are what the steps below read
        starts = np.full(batch, self._context - 8, dtype=np.int64)
        decode = self._target(batch, 1, starts, rates)
        verify = self._target(batch, STEPS + 1, starts, rates)
        extends = self.speculation._extends
        extend = self._timed(lambda: self._fill_extend(batch, starts), extends, StepShape(batch, STEPS + 1))
        one, guess, more = (
            self._guess(batch, k, starts, profile and batch == 1 and k == STEPS + 4) for k in (1, STEPS, STEPS + 4)
        )
        draft_step, pass_floor, fc_floor = (more - guess) / 4, *self._draft_floors(rates)
        speculating = self._engine_step(STEPS)  # before the plain one: in a pause the draft loses its place
        simple, plain = self._engine_step(STEPS, overlap=False), self._engine_step(0)
        self.bench._clear()
        whole, ideal = verify["ms"] + extend + guess, verify["floor_ms"] + STEPS * pass_floor
        far = self._layers_more(decode, verify, rates)
        return [
            {"name": f"decode bs {batch}", **decode},
            {"name": f"verify {STEPS + 1} bs {batch}", **verify},
            _row(f"draft step bs {batch}", draft_step, pass_floor),
            _row(f"extend, {STEPS + 1} rows each, bs {batch}", extend, fc_floor),
            {"name": f"first guess (norm and head) bs {batch}", "ms": round(one, 4)},
            _row(f"a speculating step, all graphs, bs {batch}", whole, ideal),
            {
                "name": f"Engine.step bs {batch}",
                "plain_ms": plain,
                "speculating_ms": speculating,
                "simple_loop_ms": simple,
            },
            *(
                {
                    "name": f"speed-up at length {length} bs {batch}",
                    "graphs": round(length * decode["ms"] / whole, 3),
                    "ideal": round(length * decode["floor_ms"] / ideal, 3),
                    "engine": round(length * plain / speculating, 3),
                    "graphs_48": round(length * far[0] / (far[1] + extend + guess), 3),
                    "ideal_48": round(length * far[2] / (far[3] + STEPS * pass_floor), 3),
                }
                for length in LENGTHS
            ),
        ]

    def _target(self, batch: int, rows: int, starts: np.ndarray, rates: Rates) -> dict[str, float]:
        graphs = self.runner.graphs
        step = graphs.find(batch, rows)
        assert step is not None, f"no graph of {batch} x {rows}"
        counts, times = [], []
        for _ in range(ROUNDS):
            self._fill_target(step, batch, rows, starts)
            counts.append(self._experts(step, batch * rows))
            times.append(_ms(lambda: graphs.replay(step)))
        experts = statistics.fmean(counts[4:])
        floor = self.bench.decode_bytes(batch, self._context, experts) / rates.copy * 1e3
        row = _row("", statistics.median(times[4:]), floor)
        return {key: row[key] for key in ("ms", "floor_ms", "ratio")} | {"experts": round(experts, 2)}

    def _layers_more(
        self, decode: Mapping[str, float], verify: Mapping[str, float], rates: Rates
    ) -> tuple[float, float, float, float]:
        """ms of decode and verify with 48 layers, and their floors: the head is read once, at the copy rate."""
        config = self.bench.config
        head = 2 * config.hidden_size * config.vocab_size / rates.copy * 1e3
        scale = SCOUT_LAYERS / self._layers
        decode_ms, verify_ms, decode_floor, verify_floor = (
            head + (row[key] - head) * scale for key in ("ms", "floor_ms") for row in (decode, verify)
        )
        return decode_ms, verify_ms, decode_floor, verify_floor

    def _fill_target(self, step: Any, batch: int, rows: int, starts: np.ndarray) -> None:
        step.fill(
            StepRequests(
                rows=np.arange(batch),
                starts=starts,
                lengths=np.full(batch, rows),
                token_ids=self._draw.integers(0, 200_000, batch * rows),
                temperature=np.ones(batch),
                log_min_p=np.full(batch, -np.inf),
                seed=np.arange(batch),
                top_p=np.full(batch, share(1.0)),
            )
        )

    def _experts(self, step: Any, num_rows: int) -> float:
        found: list[int] = []

        def note(moe: Any, given: tuple[Any, ...]) -> None:
            found.append(len(F.linear(given[0][:num_rows], moe.router.weight).argmax(-1).unique()))

        hooks = [m.register_forward_pre_hook(note) for n, m in self.runner.model.named_modules() if n.endswith(".moe")]
        step.run()
        for hook in hooks:
            hook.remove()
        return statistics.fmean(found)

    def _draft_floors(self, rates: Rates) -> tuple[float, float]:
        """ms to read the draft once: without fc (a pass of the recursion, head among it), and without the head (over rows just verified)."""
        draft = self.speculation._state.draft
        parameters = sum(p.numel() for p in draft.parameters())
        read = (parameters - draft.fc.weight.numel(), parameters - draft.lm_head.weight.numel())
        with_head, with_fc = (2 * count / rates.copy * 1e3 for count in read)
        return with_head, with_fc

    def _fill_extend(self, batch: int, starts: np.ndarray) -> None:
        step = self.speculation._extends.find(batch, STEPS + 1)
        following = self._draw.integers(0, 200_000, batch * (STEPS + 1))
        lengths, aux = np.full(batch, STEPS + 1), AuxRows(values=step.aux, num_tokens=STEPS + 1)
        step.fill(np.arange(batch), starts, lengths, lengths - 1, following, aux)

    def _guess(self, batch: int, count: int, starts: np.ndarray, profile: bool) -> float:
        state, shape = self.speculation._state, StepShape(batch, count)
        graphs: Graphs[FixedGuess] = Graphs(lambda s: FixedGuess(s, state, sampled=True), [shape], progress=False)
        step = graphs.find(*shape)
        assert step is not None

        def fill() -> None:
            step.fill(np.arange(batch), starts + 1, starts + 20, np.arange(batch), np.ones(batch))

        ms = self._timed(fill, graphs, shape)
        if profile:
            with _profiler(f"{count} guesses for {batch}", 4):
                for _ in range(4):
                    graphs.replay(step)
        return ms

    def _timed(self, fill: Callable[[], None], graphs: Any, shape: StepShape) -> float:
        times = []
        for _ in range(ROUNDS):
            fill()
            times.append(_ms(lambda: graphs.replay(graphs.find(*shape))))
        return statistics.median(times[4:])

    def _engine_step(self, num_drafts: int, *, overlap: bool = True) -> float:
        """ms of Engine.step on the host's clock. overlap: a relay with guesses, the overlapped loop without; or the simple loop."""
        speculation, engine = self.speculation, self.bench.engine
        if engine.overlap and not overlap:
            engine._take_in()  # the simple loop leaves nothing in flight
        engine.overlap, engine.scheduler.max_in_flight = overlap, 1 + overlap
        speculation.num_drafts = num_drafts
        engine.speculation = speculation if num_drafts else None
        for _ in range(3):
            engine.step()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(8):
            engine.step()
        torch.cuda.synchronize()
        ms = (time.perf_counter() - began) / 8 * 1e3
        engine.speculation, speculation.num_drafts = speculation, STEPS
        return round(ms, 4)


@contextmanager
def _draft_on_the_device() -> Iterator[None]:
    """The draft's random weights, drawn where they lie; and graphs of full drafts alone, which are what is timed."""
    own, short = drafter.fill_dummy, resolve.FINE
    resolve.FINE = (0,)

    def fill(parameters: Mapping[str, torch.Tensor], seed: int, rank: int = 0) -> None:
        generator = torch.Generator(device="cuda").manual_seed(2 + seed)
        for name, parameter in parameters.items():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0, 0.02, generator=generator)

    drafter.fill_dummy = fill
    try:
        yield
    finally:
        drafter.fill_dummy, resolve.FINE = own, short


def _row(name: str, ms: float, floor: float) -> dict[str, Any]:
    return {"name": name, "ms": round(ms, 4), "floor_ms": round(floor, 4), "ratio": round(ms / floor, 3)}


def _ms(call: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    call()
    end.record()
    end.synchronize()
    elapsed: float = start.elapsed_time(end)
    return elapsed


if __name__ == "__main__":
    main()
