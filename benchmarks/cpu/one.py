"""Times one engine on one checkpoint and prints one JSON line. `table.py` runs it once for each engine, in turn, on the same machine.

  python benchmarks/cpu/one.py l4|hf|vllm MODEL --dtype float32 --threads 2

Decode: (best time for 65 new tokens − best time for 1) / 64 steps, at batch 1, 8, 64 with prompts of 64 tokens. Prefill: 8 prompts of 512 tokens,
1 new token. Greedy, best of --repeats. The same prompts for every engine. --threads 0: as many as the engine takes by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import time
from collections.abc import Callable

Prompts = list[list[int]]
Run = Callable[[Prompts, int], object]


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


def measure(run: Run, repeats: int) -> dict[str, float]:
    draw = random.Random(0)
    result = {}
    for batch in (1, 8, 64):
        prompts = [[draw.randrange(256) for _ in range(64)] for _ in range(batch)]
        run(prompts, 4)
        times = [(seconds(run, prompts, 65), seconds(run, prompts, 1)) for _ in range(repeats)]
        long, short = map(min, zip(*times, strict=True))
        result[f"decode_b{batch}"] = round(batch * 64 / (long - short), 1)
    prompts = [[draw.randrange(256) for _ in range(512)] for _ in range(8)]
    run(prompts, 1)
    result["prefill_8x512"] = round(8 * 512 / min(seconds(run, prompts, 1) for _ in range(repeats)), 1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=["l4", "hf", "vllm"])
    parser.add_argument("model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    began = time.perf_counter()
    run = {"l4": l4, "hf": hf, "vllm": vllm}[args.engine](args.model, args.dtype)
    ready = time.perf_counter() - began
    result = measure(run, args.repeats)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if args.engine == "vllm":  # its engine is a child; other children only shared their parent's pages
        rss += resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(
        json.dumps(
            {
                "engine": args.engine,
                "dtype": args.dtype,
                "threads": args.threads,
                "ready_s": round(ready, 1),
                "rss_mib": round(rss / 1024),
                **result,
            }
        )
    )


if __name__ == "__main__":
    main()
