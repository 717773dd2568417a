"""l4-fa3 beside FlashAttention-3 called directly, in turns: what the wrapper costs, free of the card's changing clocks.

    PYTHONPATH=core:plugins/fa3 python benchmarks/gpu/paired.py OUT.json [--rounds 15]

A round replays one captured step of each, the order changing from round to round; the figure is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from contenders import Timed, bare_fa3, ours
from shapes import Shape, build, prefill
from timing import capture, replay_us

sys.path.append(Path(__file__).resolve().parents[1].as_posix())
from where import where

SHAPES = tuple(
    prefill(batch, length, layer) for layer in ("global", "local") for batch, length in ((8, 2048), (2, 8192))
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.manual_seed(0)
    backend = dict(ours(64))["l4-fa3"]
    rows = {}
    for shape in SHAPES:
        problem = build(shape, 64)
        rows[shape.name] = compare(bare_fa3(problem), backend.timed(problem), args.rounds) | rate(shape)
        print(shape.name, {k: v for k, v in rows[shape.name].items() if k != "ratios"}, flush=True)
    record = {
        **where(),
        "FA3": backend.provider,
        "rounds": args.rounds,
        "shapes": rows,
    }
    args.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def compare(bare: Timed, wrapped: Timed, rounds: int) -> dict[str, object]:
    """{bare_us, ours_us: medians a layer; ratio: median of the rounds; ratios}."""
    graphs = [capture(timed.calls, once=timed.once) for timed in (bare, wrapped)]
    times: list[list[float]] = [[], []]
    for index in range(rounds + 2):
        for which in (0, 1) if index % 2 else (1, 0):
            times[which].append(replay_us(graphs[which]) / len(bare.calls))
    kept = [each[2:] for each in times]  # two rounds of warm-up
    ratios = [b / a for a, b in zip(*kept, strict=True)]
    return {
        "bare_us": statistics.median(kept[0]),
        "ours_us": statistics.median(kept[1]),
        "ratio": statistics.median(ratios),
        "ratios": [round(ratio, 4) for ratio in ratios],
    }


def rate(shape: Shape) -> dict[str, float]:
    return {"gflop": shape.flops / 1e9}


if __name__ == "__main__":
    main()
