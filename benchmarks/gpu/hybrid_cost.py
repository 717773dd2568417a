"""What the pool of two page shapes costs a decode step at batch 1: in turns with an engine that keeps all local KV (`--disable-hybrid-swa-memory`).

python benchmarks/gpu/hybrid_cost.py --out hybrid.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from one_rank import admit, build, randomise, requests, shapes, step_ms, without_computing

sys.path.append(Path(__file__).resolve().parents[1].as_posix())
from where import where


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scout")
    parser.add_argument("--ranks", type=int, default=8, help="shapes of one rank of so many: the shortest steps")
    parser.add_argument("--layers", type=int, help="of the model's [all]")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4_000, 12_000, 60_000])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20, help="of a round")
    parser.add_argument("--attention-backend")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    config = shapes(args.model, args.ranks, args.layers)
    engines = {
        name: build(
            config,
            graph_batches=(1,),
            attention_backend=args.attention_backend,
            disable_hybrid_swa_memory=name == "plain",
            max_running_requests=1,
            max_total_tokens=max(args.tokens) + 4 * args.rounds * args.steps,
        )
        for name in ("hybrid", "plain")
    }
    print("\n".join(engines["hybrid"].report), flush=True)
    rows = []
    for tokens in args.tokens:
        for built in engines.values():
            randomise(built.engine.runner.memory)
            with without_computing(built):
                admit(built, requests(f"at {tokens}", 1, tokens, config.vocab_size, built.context_length))
            step_ms(built, 10)
        rounds = [{name: step_ms(built, args.steps) for name, built in engines.items()} for _ in range(args.rounds)]
        medians = {name: statistics.median(r[name] for r in rounds) for name in engines}
        ratio = statistics.median(r["hybrid"] / r["plain"] for r in rounds)
        rows.append({"tokens": tokens, **medians, "ratio": ratio})
        print(rows[-1], flush=True)
        for built in engines.values():
            built.engine.abort([f"at {tokens}-0"])
            built.engine.step()
    found = {
        **where(),
        "what": {k: v for k, v in vars(args).items() if k != "out"},
        "report": list(engines["hybrid"].report),
        "step_ms": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
