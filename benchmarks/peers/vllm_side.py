"""vLLM's side of the table: decode steps, prefills, distinct experts and the time until it is ready, in one process. `table.py` runs this.

    python benchmarks/peers/vllm_side.py MODEL_FOLDER OUT.json [--batches 1,8,32,128] [--context 1024] [--prefills 8x2048,4x4000,1x2048] [--tp 1]

Weights are drawn anew on the device after loading (vLLM's dummy ones are so small that every token goes to one expert). Experts are counted in
extra steps without compilation or graphs, where hooks are called; those steps are not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from functools import partial
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: its model can be looked into
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",  # it would use NVLink's multicast, which these machines must not
    "HF_HUB_OFFLINE": "1",
}
VOCAB, NEW_TOKENS = 200_000, 96
COUNTED_TOKENS = 24
"""Where experts are counted: the first requests must still decode when the last of 128 prompts of 1,024 tokens is in, nine steps later."""


class Engine:
    """vLLM, stepped by hand: the time of a step is that between two returns of `step`."""

    def __init__(self, model: str, batches: list[int], tp: int = 1) -> None:
        from vllm import LLM, SamplingParams, __version__
        from vllm.sampling_params import RequestOutputKind

        self.version = __version__
        self.llm = LLM(
            model=model,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=4096,
            max_num_seqs=max(batches),
            max_num_batched_tokens=16384,
            gpu_memory_utilization=0.85,
            tensor_parallel_size=tp,
            enable_prefix_caching=False,
            seed=0,
            compilation_config={"cudagraph_capture_sizes": sorted(batches)},
        )
        self.engine = self.llm.llm_engine
        self.ready_s = time.perf_counter() - BEGAN
        self._params = lambda new: SamplingParams(
            temperature=1.0, ignore_eos=True, max_tokens=new, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        self._random, self._names = random.Random(0), iter(range(1 << 30))

    def model(self, function: Any) -> Any:
        return self.llm.apply_model(function)[0]

    def run(self, batch: int, length: int, new: int) -> list[tuple[float, dict[str, int]]]:
        """Requests together, until all have ended → after each step: seconds since the first was given, tokens each of them has."""
        began, counts, events = time.perf_counter(), dict[str, int](), []
        for _ in range(batch):
            prompt = self._random.choices(range(VOCAB), k=length)
            self.engine.add_request(f"r{next(self._names)}", {"prompt_token_ids": prompt}, self._params(new))
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                got = len(output.outputs[0].token_ids)
                counts[output.request_id] = counts.get(output.request_id, 0) + got
            events.append((time.perf_counter() - began, dict(counts)))
        return events

    def decode_ms(self, batch: int, context: int) -> float:
        """A step's mean while all of the batch decode; the better of two runs."""
        best = float("inf")
        for _ in range(2):
            events = self.run(batch, context, NEW_TOKENS)
            steady = [
                (at, sum(counts.values()))
                for at, counts in events
                if len(counts) == batch and min(counts.values()) >= 4 and max(counts.values()) < NEW_TOKENS - 1
            ]
            (first, before), (last, after) = steady[0], steady[-1]
            best = min(best, (last - first) * batch / (after - before) * 1e3)
        return best

    def prefill_ms(self, batch: int, length: int) -> float:
        return min(self.run(batch, length, 1)[-1][0] for _ in range(4)) * 1e3

    def experts(self, batch: int, context: int) -> float | None:
        """Distinct experts a layer in steps of `batch` decodes: the mean of layers and steps; None where no router was seen."""
        self.model(partial(watch, batch=batch))
        self.run(batch, context, COUNTED_TOKENS)
        found: list[int] = self.model(counted)
        return sum(found) / len(found) if found else None


# What is done to the model, in this process or in those of the ranks: found there by name, so no function may be defined inside another that is sent.


def watch(model: Any, batch: int) -> None:
    """From now on the model counts the experts that its routers choose for `batch` rows."""
    found = model.counted_experts = list[int]()

    def note(_: Any, given: tuple[Any, ...], output: Any) -> None:
        logits = output[0]
        if logits.shape[0] == batch:
            found.append(logits.argmax(-1).unique().numel())

    for part in model.modules():
        if hasattr(part, "do_not_compile"):
            part.do_not_compile = True
    routers = [part for name, part in model.named_modules() if name.endswith(".router")]
    model.counting_hooks = [router.register_forward_hook(note) for router in routers]


def counted(model: Any) -> list[int]:
    """What was counted; the counting ends."""
    for hook in model.counting_hooks:
        hook.remove()
    found: list[int] = model.counted_experts
    return found


def draw_weights(model: Any) -> float:
    """Normal, 0.02, as the other engine has them → GB."""
    import torch

    generator = torch.Generator(device=next(model.parameters()).device).manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(0, 0.02, generator=generator)
    return float(sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--batches", default="1,8,32,128")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prefills", default="8x2048,4x4000,1x2048")
    parser.add_argument("--tp", type=int, default=1)
    args = parser.parse_args()
    batches = [int(text) for text in args.batches.split(",")]
    engine = Engine(args.model, batches, args.tp)
    print(f"ready after {engine.ready_s:.1f} s", flush=True)
    result: dict[str, Any] = {"engine": "vllm", "version": engine.version, "own_ready_s": engine.ready_s, "rows": []}

    def note(row: dict[str, Any]) -> None:
        """Kept at once: whatever comes later, this was measured."""
        if row not in result["rows"]:
            result["rows"].append(row)
        args.out.write_text(json.dumps(result))
        print(row, flush=True)

    print(f"weights {engine.model(draw_weights):.2f} GB", flush=True)
    engine.run(8, 256, 8)
    for batch in batches:
        note({"name": f"decode bs {batch} at {args.context}", "ms": engine.decode_ms(batch, args.context)})
    for text in args.prefills.split(","):
        batch, length = map(int, text.split("x"))
        note({"name": f"prefill {text}", "ms": engine.prefill_ms(batch, length)})
    for row, batch in zip(result["rows"], batches, strict=False):
        row["experts"] = engine.experts(batch, args.context)
        note(row)


if __name__ == "__main__":
    main()
