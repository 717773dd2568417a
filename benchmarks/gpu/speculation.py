"""EAGLE3 on Scout's text shape: a verify of 4 tokens and a draft step beside their floors, and what they make of an acceptance length.

    python benchmarks/gpu/speculation.py [--layers 8] [--batches 1,4] [--context 1024] [--json OUT] [ENGINE OPTION=VALUE …]

bfloat16, weights random, a draft of Scout's true size (one layer, 32,768 wide, 32,000 tokens). Steps are timed as captured graphs with CUDA events,
each time with other tokens, so that other experts are hit; the experts of each verify are counted in an eager run of the same step, outside the
timing, and its floor counts those. What a step takes does not depend on how many guesses are right, so
speed-up = length · decode / (verify + draft). Engine.step is the simple loop's in both columns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from decode import Bench, Rates, measure_rates

from l4core.engine.draft_steps import FixedGuess
from l4core.engine.fixed_step import StepRequests, StepShape
from l4core.engine.graphs import Graphs

STEPS, ROUNDS = 3, 24
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
    parser.add_argument("--json", type=Path)
    parser.add_argument("options", nargs="*", help="engine options, as LLM() takes them")
    args = parser.parse_args()
    rates = measure_rates()
    with tempfile.TemporaryDirectory() as folder:
        ids = [1, args.layers // 2 - 1, args.layers - 2]
        config = {**DRAFT, "eagle_config": {"eagle_aux_hidden_state_layer_ids": ids}}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        options = dict(option.split("=", 1) for option in args.options)
        options |= {
            "speculative_algorithm": "EAGLE3",
            "speculative_draft_model_path": folder,
            "max_running_requests": "16",
            "max_total_tokens": "65536",
        }
        bench = SpeculationBench(args.layers, options, args.context)
    print(*bench.bench.report, sep="\n")
    print(f"copy {rates.copy / 1e12:.2f} TB/s\n")
    rows = [row for batch in map(int, args.batches.split(",")) for row in bench.rows(batch, rates)]
    for row in rows:
        print(json.dumps(row))
    if args.json:
        args.json.write_text(
            json.dumps({"card": torch.cuda.get_device_name(), "copy_tb_s": rates.copy / 1e12, "rows": rows}, indent=1)
            + "\n"
        )


class SpeculationBench:
    """One engine with a draft."""

    def __init__(self, layers: int, options: dict[str, Any], context: int) -> None:
        self.bench = Bench(layers, options)
        self._context = context
        self._draw = np.random.default_rng(0)
        engine: Any = self.bench.engine
        self.runner, self.speculation = engine.runner, engine.speculation

    def rows(self, batch: int, rates: Rates) -> list[dict[str, Any]]:
        """Decode, verify, extend, one draft step, and the speed-ups."""
        self.bench._admit(batch, self._context, 64)  # their rows' block tables are what the steps below read
        starts = np.full(batch, self._context - 8, dtype=np.int64)
        decode, decode_floor, decode_experts = self._target(batch, 1, starts, rates)
        verify, verify_floor, verify_experts = self._target(batch, STEPS + 1, starts, rates)
        extend = self._timed(
            lambda i: self._fill_extend(batch, starts), self.speculation._extends, StepShape(batch, STEPS + 1)
        )
        guesses = {k: self._guess(batch, k, starts) for k in (STEPS, STEPS + 4)}
        draft_step = (guesses[STEPS + 4] - guesses[STEPS]) / 4
        parameters = sum(p.numel() for p in self.speculation._state.draft.parameters())
        fc = self.speculation._state.draft.fc.weight.numel()
        draft_floor = 2 * (parameters - fc) / rates.copy * 1e3
        plain = self._engine_step(False)
        speculating = self._engine_step(True)
        self.bench._clear()
        whole = verify + extend + guesses[STEPS]
        ideal = verify_floor + STEPS * draft_floor
        return [
            _row(f"decode bs {batch}", decode, decode_floor, decode_experts),
            _row(f"verify {STEPS + 1} bs {batch}", verify, verify_floor, verify_experts),
            _row(f"draft step bs {batch}", draft_step, draft_floor),
            _row(f"extend {STEPS + 1} rows bs {batch}", extend, 2 * (parameters - 32000 * 5120) / rates.copy * 1e3),
            _row(f"all of a speculating step bs {batch}", whole, ideal),
            {"name": f"Engine.step bs {batch}", "plain_ms": plain, "speculating_ms": speculating},
            *(
                {
                    "name": f"speed-up at length {length} bs {batch}",
                    "graphs": round(length * decode / whole, 3),
                    "engine": round(length * plain / speculating, 3),
                    "ideal": round(length * decode_floor / ideal, 3),
                }
                for length in LENGTHS
            ),
        ]

    def _target(self, batch: int, rows: int, starts: np.ndarray, rates: Rates) -> tuple[float, float, float]:
        """→ (ms, floor in ms at the experts counted, experts a layer)."""
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
        return statistics.median(times[4:]), floor, experts

    def _fill_target(self, step: Any, batch: int, rows: int, starts: np.ndarray) -> None:
        step.fill(
            StepRequests(
                rows=np.arange(batch),
                starts=starts,
                token_ids=self._draw.integers(0, 200_000, (batch, rows)),
                temperature=np.ones(batch),
                seed=np.arange(batch),
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

    def _fill_extend(self, batch: int, starts: np.ndarray) -> None:
        step = self.speculation._extends.find(batch, STEPS + 1)
        following = self._draw.integers(0, 200_000, (batch, STEPS + 1))
        step.fill(np.arange(batch), starts, np.full(batch, STEPS), following, step.aux)

    def _guess(self, batch: int, count: int, starts: np.ndarray) -> float:
        state, shape = self.speculation._state, StepShape(batch, count)
        graphs: Graphs[FixedGuess] = Graphs(lambda s: FixedGuess(s, state, sampled=True), [shape], progress=False)
        step = graphs.find(*shape)
        assert step is not None

        def fill(i: int) -> None:
            step.fill(np.arange(batch), starts + 1, starts + 20, np.arange(batch), np.ones(batch))

        return self._timed(fill, graphs, shape)

    def _timed(self, fill: Callable[[int], None], graphs: Any, shape: StepShape) -> float:
        times = []
        for i in range(ROUNDS):
            fill(i)
            times.append(_ms(lambda: graphs.replay(graphs.find(*shape))))
        return statistics.median(times[4:])

    def _engine_step(self, speculating: bool) -> float:
        """ms of Engine.step on the host's clock."""
        import time

        speculation, engine = self.speculation, self.bench.engine
        speculation.num_drafts = STEPS if speculating else 0
        if not speculating:
            engine.speculation = None
        for _ in range(3):
            engine.step()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(6):
            engine.step()
        torch.cuda.synchronize()
        ms = (time.perf_counter() - began) / 6 * 1e3
        engine.speculation, speculation.num_drafts = speculation, STEPS
        return ms


def _row(name: str, ms: float, floor: float, experts: float = 0.0) -> dict[str, Any]:
    return {
        "name": name,
        "ms": round(ms, 4),
        "floor_ms": round(floor, 4),
        "ratio": round(ms / floor, 3),
        "experts": round(experts, 2),
    }


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
