"""Tiles of the experts for a single token (l4core.experts.one_triton), captured, weights rotated through more than the cache.

python benchmarks/gpu/one_token_tune.py [--inter 1024] [--out FILE.json]       --warm: compile and compare only
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timing import graph_us

from l4core.experts import one_triton as one
from l4core.experts.few_triton import few_tokens
from l4core.experts.tiles import Tile, tiles_for
from l4core.plugin_api import ExpertWeights

sys.path.append(Path(__file__).resolve().parents[1].as_posix())
from where import where

HIDDEN, EXPERTS = 5120, 4


def weights_of(inter: int) -> ExpertWeights:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").bfloat16() / 50

    return ExpertWeights(
        gate_up=random(EXPERTS, 2 * inter, HIDDEN),
        down=random(EXPERTS, HIDDEN, inter),
        shared_gate_up=random(2 * inter, HIDDEN),
        shared_down=random(HIDDEN, inter),
    )


def tiles(depths: tuple[int, ...]) -> Iterator[Tile]:
    for columns, depth, warps, stages in itertools.product((1, 2, 4, 8), depths, (2, 4, 8), (1, 3)):
        if 2 * 1024 <= columns * depth <= 8192 and 8 * 32 * warps <= columns * depth <= 64 * 32 * warps:
            yield Tile(rows=1, columns=columns, inputs=depth, warps=warps, stages=stages)


def chains(layers: list[ExpertWeights], inter: int) -> dict[str, list[Any]]:
    """A layer's second half as one token goes through it: norm, router, experts, in the ways there are."""
    from l4core.ops.norm import add_rms_norm
    from l4core.ops.norm_route_triton import norm_route_triton
    from l4core.ops.router import route

    stream, update = (torch.randn(1, HIDDEN, device="cuda").bfloat16() for _ in range(2))
    norm, router = (
        torch.randn(HIDDEN, device="cuda").bfloat16(),
        torch.randn(EXPERTS, HIDDEN, device="cuda").bfloat16() / 70,
    )
    found = tiles_for("sm90", 16, HIDDEN, inter, "bfloat16")
    many, single = found.row(2), found.row(1)

    def apart(w: ExpertWeights, run: Any, tiles: Any) -> Any:
        x = add_rms_norm(stream, update, norm, 1e-5)
        return run(x, *route(x, router), w, tiles.gate_up, tiles.down)

    def together(w: ExpertWeights) -> Any:
        return one.one_token(*norm_route_triton(stream, update, norm, 1e-5, router), w, single.gate_up, single.down)

    return {
        "norm, router, few": [lambda w=w: apart(w, few_tokens, many) for w in layers],
        "norm, router, one": [lambda w=w: apart(w, one.one_token, single) for w in layers],
        "norm and router, one": [lambda w=w: together(w) for w in layers],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inter", type=int, default=1024)
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    layers = [weights_of(args.inter) for _ in range(1 if args.warm else 6)]
    x = torch.randn(1, HIDDEN, device="cuda").bfloat16()
    ids = [torch.tensor([i % EXPERTS], dtype=torch.int32, device="cuda") for i in range(12)]
    score = torch.full((1,), 0.7, device="cuda")
    row = tiles_for("sm90", 16, HIDDEN, args.inter, "bfloat16").row(2)
    few = [
        lambda w=w, i=i: few_tokens(x, i, score, w, row.gate_up, row.down)
        for w, i in zip(layers * 2, ids, strict=False)
    ]
    exact = few[0]()
    up_tiles, down_tiles = list(tiles((512, 1024))), list(tiles((512, 1024)))
    found: list[dict[str, Any]] = [{"few": 0.0 if args.warm else graph_us(few, repeats=3)}]
    for name, calls in chains(layers, args.inter).items():
        if args.warm:
            print(name, calls[0]().float().norm().item(), flush=True)
        else:
            found[0][name] = round(graph_us(calls * 4, repeats=3), 2)
    print(found, flush=True)
    fixed = Tile(rows=1, columns=4, inputs=1024, warps=4, stages=1)
    for name, tile in [*(("gate_up", t) for t in up_tiles), *(("down", t) for t in down_tiles)]:
        pair = (tile, fixed) if name == "gate_up" else (fixed, tile)
        record: dict[str, Any] = {name: [tile.columns, tile.inputs, tile.warps, tile.stages]}
        try:
            calls = [
                lambda w=w, i=i, p=pair: one.one_token(x, i, score, w, *p)
                for w, i in zip(layers * 2, ids, strict=False)
            ]
            if args.warm:
                error = float((calls[0]() - exact).abs().max() / exact.abs().max())
                record["error"] = error
            else:
                record["us"] = round(graph_us(calls, repeats=3), 2)
        except Exception as error:  # noqa: BLE001  a tile that does not compile is a result
            record["failed"] = f"{error!r:.120}"
        found.append(record)
    found[1:] = sorted(found[1:], key=lambda r: r.get("us", r.get("error", 1e9)))
    for record in found[:1] + (
        [r for r in found[1:] if r.get("error", 0) > 0.02 or "failed" in r] if args.warm else found[1:25]
    ):
        print(json.dumps(record))
    print(len(found))
    if args.out:
        args.out.write_text(json.dumps({**where(), "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
