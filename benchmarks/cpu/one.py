"""One engine on one checkpoint, kept alive and measured on demand: `table.py` starts one of these for each engine, so that they can take turns.

  python benchmarks/cpu/one.py l4|hf|vllm MODEL --dtype float32 --threads 2

Prints a JSON line when it is ready, then answers each line of stdin, a column's name, with another. Decode: (time for 65 new tokens − time for 1)
/ 64 steps, at batch 1, 8, 64 with prompts of 64 tokens. Prefill: 8 prompts of 512 tokens, 1 new token. Greedy, the same prompts for every engine.
--threads 0: as many as the engine takes by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable

Prompts = list[list[int]]
Run = Callable[[Prompts, int], object]

COLUMNS = {
    "decode_b1": ("decode", 1, 64),
    "decode_b8": ("decode", 8, 64),
    "decode_b64": ("decode", 64, 64),
    "prefill_8x512": ("prefill", 8, 512),
}
"""Kind, number of prompts, their length."""
STEPS = 64
MANY_TOKENS = 4096
PREFIX = "measured: "


def l4(model: str, dtype: str) -> Run:
    from l4core import LLM, SamplingParams

    llm = LLM(
        model,
        dtype=dtype,
        device="cpu",
        max_running_requests=64,
        context_length=1024,
        disable_radix_cache=True,
        progress=False,
    )
    return lambda prompts, new: llm.generate(
        prompts, SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True), use_tqdm=False
    )


def hf(model: str, dtype: str) -> Run:
    import torch
    from transformers import Llama4ForCausalLM

    net = Llama4ForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()

    @torch.inference_mode()
    def run(prompts: Prompts, new: int) -> None:
        ids, cache = torch.tensor(prompts), None
        for _ in range(new):
            out = net(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values

    return run


def vllm(model: str, dtype: str) -> Run:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model,
        dtype=dtype,
        max_num_seqs=64,
        max_model_len=1024,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )

    def run(prompts: Prompts, new: int) -> object:
        params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        return llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)

    return run


def seconds(run: Run, prompts: Prompts, new: int) -> float:
    began = time.perf_counter()
    run(prompts, new)
    return time.perf_counter() - began


class Columns:
    """What one engine does for each column. The first time it is asked it warms up, unmeasured."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._warm: set[str] = set()

    def measure(self, column: str) -> dict[str, float]:
        """→ seconds of one run with 1 new token (the better of two where that is cheap), and for a decode of one with 65."""
        kind, batch, length = COLUMNS[column]
        draw = random.Random(batch)
        prompts = [[draw.randrange(256) for _ in range(length)] for _ in range(batch)]
        if column not in self._warm:
            self._run(prompts, 4)
            self._warm.add(column)
        short = seconds(self._run, prompts, 1)
        if batch * length < MANY_TOKENS or kind == "prefill":
            short = min(short, seconds(self._run, prompts, 1))
        return {"short": short} | ({"long": seconds(self._run, prompts, STEPS + 1)} if kind == "decode" else {})


def speed(column: str, short: float, long: float | None) -> float:
    """Seconds of both runs → tokens a second."""
    _, batch, length = COLUMNS[column]
    return batch * length / short if long is None else batch * STEPS / (long - short)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=["l4", "hf", "vllm"])
    parser.add_argument("model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    began = time.perf_counter()
    columns = Columns({"l4": l4, "hf": hf, "vllm": vllm}[args.engine](args.model, args.dtype))
    answer({"ready_s": round(time.perf_counter() - began, 1)})
    for line in sys.stdin:
        answer(columns.measure(line.strip()))


def answer(found: dict[str, float]) -> None:
    """Engines print to stdout too; only such lines are answers."""
    print(PREFIX + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
