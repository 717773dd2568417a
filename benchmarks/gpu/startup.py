"""How soon an engine is ready: 8 of Scout's layers with dummy weights, import to first token, with a cold and a warm kernel cache; and how fast a
checkpoint of some size comes from cached files onto the device.

python benchmarks/gpu/startup.py OUT.json [--layers 8] [--load GB] [--option NAME=VALUE …]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(Path(__file__).resolve().parents[1].as_posix())
from where import where

PRESETS = Path(__file__).parents[2] / "core/l4core/model/presets"


def scout(layers: int) -> dict[str, Any]:
    raw = json.loads((PRESETS / "scout.json").read_text())
    raw["text_config"]["num_hidden_layers"] = layers
    return dict(raw)


def one_start(layers: int, options: dict[str, str]) -> dict[str, float]:
    """In a fresh process: seconds of each part, and of the whole since the interpreter was started."""
    began = time.perf_counter()
    from l4core.config import from_mapping
    from l4core.engine.inbox import Inbox
    from l4core.engine.start.build import build_engine
    from l4core.model.config import ModelConfig
    from l4core.request import Request, SamplingParams

    imported = time.perf_counter()
    config, _ = from_mapping({"model": "scout", "load_format": "dummy", "context_length": 8192, **options})
    with contextlib.redirect_stderr(io.StringIO()):
        built = build_engine(config, progress=False, model_config=ModelConfig.from_dict(scout(layers)))
    ready = time.perf_counter()
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, seed=0)
    request = Request(request_id="0", prompt_token_ids=[5] * 100, params=params, eos_token_ids=(), max_total_tokens=200)
    inbox, tokens = Inbox(requests=[request]), 0
    while tokens < 1:
        tokens += sum(len(update.new_token_ids) for update in built.engine.step(inbox).updates)
        inbox = Inbox()
    end = time.perf_counter()
    report = {line.split("  ")[0]: line for line in built.report}
    print(*report.values(), sep="\n", file=sys.stderr)
    return {
        "import_s": imported - began,
        "build_s": ready - imported,
        "first_token_s": end - ready,
        "ready_s": end - began,
    }


def starts(layers: int, options: list[str], save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """One start with an empty kernel cache, one with what the first left. save: is given what is known after each."""
    found = dict[str, Any]()
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "warm"):
            env = {**os.environ, "TRITON_CACHE_DIR": cache}
            command = [sys.executable, __file__, "--one", "--layers", str(layers), *(f"--option={o}" for o in options)]
            began = time.perf_counter()
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr[-3000:])
            found[name] = {k: round(v, 2) for k, v in json.loads(done.stdout.splitlines()[-1]).items()}
            found[name]["process_s"] = round(time.perf_counter() - began, 2)
            print(name, found[name], flush=True)
            found["report"] = done.stderr.splitlines()
            save(found)
    return found


def load_rate(gigabytes: float) -> dict[str, float]:
    """Scout's experts of so many layers, in files that are in the page cache → GB/s onto the device, twice."""
    import torch
    from safetensors.torch import save_file

    from l4core.model.config import ModelConfig
    from l4core.model.llama4 import Llama4
    from l4core.model.weights import load_weights

    raw = scout(1)
    raw["text_config"] |= {"vocab_size": 8192, "num_local_experts": max(1, round(gigabytes * 1e9 / (6 * 5120 * 8192)))}
    config = ModelConfig.from_dict(raw)
    hidden, inter, experts = 5120, 8192, config.num_experts
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    prefix, layer = "language_model.model.", "language_model.model.layers.0."
    shapes = {
        prefix + "embed_tokens.weight": (8192, hidden),
        prefix + "norm.weight": (hidden,),
        "language_model.lm_head.weight": (8192, hidden),
        layer + "input_layernorm.weight": (hidden,),
        layer + "post_attention_layernorm.weight": (hidden,),
        layer + "self_attn.q_proj.weight": (5120, hidden),
        layer + "self_attn.k_proj.weight": (1024, hidden),
        layer + "self_attn.v_proj.weight": (1024, hidden),
        layer + "self_attn.o_proj.weight": (hidden, 5120),
        layer + "feed_forward.router.weight": (experts, hidden),
        layer + "feed_forward.shared_expert.gate_proj.weight": (inter, hidden),
        layer + "feed_forward.shared_expert.up_proj.weight": (inter, hidden),
        layer + "feed_forward.shared_expert.down_proj.weight": (hidden, inter),
        layer + "feed_forward.experts.gate_up_proj": (experts, hidden, 2 * inter),
        layer + "feed_forward.experts.down_proj": (experts, inter, hidden),
    }
    try:
        save_file(
            {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()},
            folder / "model.safetensors",
        )
        with torch.device("meta"):
            model = Llama4(config, max_positions=8192)
        model = model.to(torch.bfloat16).to_empty(device="cuda")
        rates = []
        for _ in range(2):
            torch.cuda.synchronize()
            began = time.perf_counter()
            read = load_weights(dict(model.named_parameters()), folder, config, progress=False).bytes_read
            torch.cuda.synchronize()
            rates.append(read / 1e9 / (time.perf_counter() - began))
    finally:
        shutil.rmtree(folder)
    return {"gigabytes": read / 1e9, "first_gb_s": rates[0], "second_gb_s": rates[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--load", type=float, default=0.0, metavar="GB")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one_start(args.layers, dict(option.split("=", 1) for option in args.option))))
        return
    record: dict[str, Any] = {**where(), "layers": args.layers}
    if args.load:
        record["load"] = {key: round(value, 2) for key, value in load_rate(args.load).items()}
        print(record["load"], flush=True)

    def save(found: dict[str, Any]) -> None:
        if args.out is not None:
            args.out.write_text(json.dumps(record | found, indent=1, ensure_ascii=False) + "\n")

    save({})
    if args.layers:
        record |= starts(args.layers, args.option, save)
        print(json.dumps(record, indent=1, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
