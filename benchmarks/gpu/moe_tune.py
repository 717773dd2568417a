"""Tries tile sizes of the Triton experts on the card and writes the best into core/l4core/experts/tiles.json.

    python benchmarks/gpu/moe_tune.py --experts 16 --inter 8192 --out found.json [--compile 0/2] [--like found-before.json]
    python benchmarks/gpu/moe_tune.py --experts 16 --inter 8192 --write found.json       # no card needed

Each candidate is timed from a captured graph over several layers' weights, so that none comes from the cache; the median counts. --compile fills
Triton's cache beforehand, in two processes with 0/2 and 1/2; --like takes only the best candidates of another shape.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import triton

sys.path.insert(0, str(Path(__file__).parent))

from timing import graph_us

from l4core.experts import few_triton, sorted_triton
from l4core.experts.tiles import Tile
from l4core.plugin_api import ExpertWeights

sys.path.append(Path(__file__).resolve().parents[1].as_posix())
from where import where

HIDDEN = 5120
TILES = Path(__file__).parents[2] / "core/l4core/experts/tiles.json"


def weights(experts: int, inter: int, layers: int, *, fill: bool = True) -> list[ExpertWeights]:
    """Layers of random weights; values do not matter for the time, but power does: they are spread as real ones. fill: False leaves them empty."""

    def one(*shape: int) -> torch.Tensor:
        made = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
        return made.normal_(0, 0.02) if fill else made

    return [
        ExpertWeights(
            gate_up=one(experts, 2 * inter, HIDDEN),
            down=one(experts, HIDDEN, inter),
            shared_gate_up=one(2 * inter, HIDDEN),
            shared_down=one(HIDDEN, inter),
        )
        for _ in range(layers)
    ]


WARM_TILE = Tile(rows=64, columns=32, inputs=64, warps=4, stages=2)


def tiles(path: str, rows: int) -> Iterator[Tile]:
    """Candidates of one launch. path: "few gate_up", "few down", "many gate_up" or "many down"."""
    few, halves = path.startswith("few"), 1 + path.endswith("gate_up")
    if rows >= 64 and not few:  # bound by tensor cores
        blocks = ((0, 0), (64, 64))
        shapes = itertools.product((64, 128, 256), (3, 4, 5), (4, 8), (8, 16), (False, True), blocks)
        for columns, stages, warps, group, tma, (half, extra) in shapes:
            if extra and not (tma and rows == 128 and warps == 8):
                continue
            shared = (halves * columns + rows + extra) * 64 * 2 * stages
            fits = 90 << 10 <= shared <= 224 << 10 and rows * columns * halves <= warps << 12
            if fits and 128 <= halves * columns <= 256:
                tile = Tile(rows=rows, columns=columns, inputs=64, warps=warps, stages=stages, group=group, tma=tma)
                yield replace(tile, half=half, extra=extra)
        return
    for columns, inputs, stages, swap in itertools.product(
        (16, 32, 64, 128), (64, 128, 256, 512), (3, 4, 5, 6), (False, True)
    ):
        shared = (halves * columns + rows) * inputs * 2 * stages
        flight = halves * columns * inputs * 2 * (stages - 1)
        if shared > 112 << 10 or not 24 << 10 <= flight <= 80 << 10 or (swap and not (few and columns in (64, 128))):
            continue
        yield Tile(rows=rows, columns=columns, inputs=inputs, warps=4, stages=stages, swap=swap)


def launches(path: str, tokens: int, layers: list[ExpertWeights], tile: Tile) -> list[Callable[[], object]]:
    """One call a layer, with uniform routing."""
    experts = layers[0].gate_up.shape[0]
    x = torch.randn(tokens, HIDDEN, device="cuda").bfloat16()
    ids = torch.randint(
        experts, (tokens,), device="cuda", dtype=torch.int32, generator=torch.Generator("cuda").manual_seed(0)
    )
    score = torch.rand(tokens, device="cuda")
    order, ends = sorted_triton.sort_by_expert(ids, experts)
    inter = layers[0].down.shape[2]
    calls: list[Callable[[], object]] = []
    for w in layers:
        if path == "few gate_up":
            calls.append(lambda w=w: few_triton.few_gate_up(x, ids, score, w, tile))
        elif path == "few down":
            h = torch.randn(2, tokens, inter, device="cuda").bfloat16()
            _, hits, turns = few_triton.few_gate_up(x, ids, score, w, WARM_TILE)
            calls.append(
                lambda w=w, h=h, hits=hits, turns=turns: (
                    turns.zero_(),
                    few_triton.few_down(h, ids, hits, turns, w, tile),
                )
            )
        elif path == "many gate_up":
            calls.append(lambda w=w: sorted_triton.sorted_gate_up(x, score, order, ends, w.gate_up, tile))
        else:
            h, out = torch.randn(tokens, inter, device="cuda").bfloat16(), torch.empty_like(x)
            calls.append(lambda w=w, h=h, out=out: sorted_triton.sorted_down(h, order, ends, w.down, out, tile))
    return calls


def rows_for(tokens: int, experts: int) -> tuple[int, ...]:
    """Tiles of rows worth trying, from the mean number of tokens an expert has."""
    mean = tokens / experts
    return () if tokens < 32 else (16,) if mean <= 4 else (16, 32) if mean < 48 else (64, 128) if mean < 512 else (128,)


def jobs(args: argparse.Namespace) -> list[tuple[str, int, Tile]]:
    """Every candidate of every launch; with --like those that were among the best for some number of tokens there."""
    good = None if args.like is None else good_tiles(measured(args.like), args.most)
    made = []
    for tokens in args.tokens:
        paths = [("few", max(16, triton.next_power_of_2(tokens)))] if tokens <= 32 else []
        paths += [("many", rows) for rows in rows_for(tokens, args.experts)]
        for path, rows in paths:
            for product in ("gate_up", "down"):
                if args.only not in f"{path} {product}":
                    continue
                name = f"{path} {product}"
                made += [(name, tokens, t) for t in tiles(name, rows) if good is None or (name, t) in good]
    return made


def measured(file: Path) -> list[dict[str, Any]]:
    """The rows of what --out wrote; once it was nothing but rows."""
    found = json.loads(file.read_text())
    return found["rows"] if isinstance(found, dict) else found


def good_tiles(found: list[dict[str, Any]], most: int) -> set[tuple[str, Tile]]:
    made = set()
    for path, tokens in {(f["path"], f["tokens"]) for f in found}:
        mine = sorted((f for f in found if (f["path"], f["tokens"]) == (path, tokens)), key=lambda f: f["us"])
        made |= {(path, Tile(**f["tile"])) for f in mine[:most]}
    return made


MEASURED_FOR = {1: 2, 8: 16, 32: 32, 64: 64, 128: 256, 512: 1024, 2048: 4096, 16384: 1 << 30}
"""Tokens of a measured call → the most for which its tiles are taken."""


def write(args: argparse.Namespace) -> None:
    """The best tiles into the package's data. The path for few tokens is taken as far as it was measured."""
    found = [f for file in args.write for f in measured(file)]
    rows = []
    for tokens, most in MEASURED_FOR.items():
        few = any((f["path"], f["tokens"]) == ("few down", tokens) for f in found)
        path = "few" if few else "many"
        best = {
            product: min(
                (f for f in found if (f["path"], f["tokens"]) == (f"{path} {product}", tokens)),
                key=lambda f: f["us"],
                default=None,
            )
            for product in ("gate_up", "down")
        }
        if all(best.values()):
            rows.append({"tokens": most, "few": few} | {product: f["tile"] for product, f in best.items() if f})
    rows[-1]["tokens"] = 1 << 30
    shape = {"arch": args.arch, "num_experts": args.experts, "hidden": HIDDEN, "inter": args.inter}
    kept = [t for t in json.loads(TILES.read_text())["tiles"] if {k: t[k] for k in shape} != shape]
    every = sorted([*kept, shape | {"rows": rows}], key=lambda t: [str(t["arch"]), t["num_experts"], -t["inter"]])
    lines = ",\n".join(
        "  "
        + json.dumps({k: v for k, v in t.items() if k != "rows"})[:-1]
        + ', "rows": [\n'
        + ",\n".join("    " + json.dumps(row) for row in t["rows"])
        + "\n  ]}"
        for t in every
    )
    TILES.write_text('{"tiles": [\n' + lines + "\n]}\n")
    print(f"{len(rows)} rows for {shape}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--inter", type=int, default=8192)
    parser.add_argument(
        "--tokens", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 32, 64, 128, 2048, 16384]
    )
    parser.add_argument(
        "--only", default="", help='of "few gate_up", "few down", "many gate_up", "many down", those with this text'
    )
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=600.0, help="time for all; candidates are taken in random order"
    )
    parser.add_argument("--compile", metavar="I/N", help="only compile each N-th candidate, from the I-th on")
    parser.add_argument("--like", type=Path, help="take the candidates that were best in this file")
    parser.add_argument("--most", type=int, default=6, help="with --like: how many of each launch")
    parser.add_argument("--write", type=Path, nargs="+", help="write the best of these files into the package and end")
    parser.add_argument("--arch", default="sm90", help="with --write: where they were measured")
    parser.add_argument("--out", type=Path, default=Path("moe_tune.json"))
    args = parser.parse_args()
    if args.write:
        return write(args)
    torch.manual_seed(0)
    todo = jobs(args)
    random.Random(0).shuffle(todo)
    began = time.monotonic()
    if args.compile:
        first, every = map(int, args.compile.split("/"))
        layer = weights(args.experts, args.inter, 1, fill=False)

        def compile_one(job: tuple[str, int, Tile]) -> None:
            path, tokens, tile = job
            if time.monotonic() - began < args.seconds:
                try:
                    launches(path, tokens, layer, tile)[0]()
                except Exception as error:  # noqa: BLE001  (a tile that does not fit is no candidate)
                    print(path, tokens, tile, type(error).__name__, flush=True)

        with ThreadPoolExecutor(5) as pool:
            list(pool.map(compile_one, todo[first::every]))
        torch.cuda.synchronize()
        print(f"compiled {len(todo[first::every])} in {time.monotonic() - began:.0f} s")
        return
    layers = weights(args.experts, args.inter, args.layers)
    found: list[dict[str, object]] = []
    for path, tokens, tile in todo:
        if time.monotonic() - began > args.seconds:
            break
        try:
            us = graph_us(launches(path, tokens, layers, tile), repeats=5)
        except Exception as error:  # noqa: BLE001  (as above)
            print(path, tokens, tile, type(error).__name__, flush=True)
            continue
        found.append({"path": path, "tokens": tokens, "us": us, "tile": asdict(tile)})
    args.out.write_text(json.dumps({**where(), "rows": found}, indent=1))
    print(f"{len(found)} of {len(todo)} candidates in {time.monotonic() - began:.0f} s")
    show(found, args)


def show(found: list[dict[str, object]], args: argparse.Namespace) -> None:
    """The best three of each launch, with what they reach."""
    hits = {t: args.experts * (1 - (1 - 1 / args.experts) ** t) for t in args.tokens}
    for path, tokens in sorted(
        {(str(f["path"]), int(str(f["tokens"]))) for f in found}, key=lambda key: (key[1], key[0])
    ):
        mine = sorted(
            (f for f in found if (f["path"], f["tokens"]) == (path, tokens)), key=lambda f: float(str(f["us"]))
        )
        width = (2 if path.endswith("gate_up") else 1) * args.inter * HIDDEN * 2
        for f in mine[:4]:
            us = float(str(f["us"]))
            read = (hits[tokens] + path.startswith("few")) * width / us / 1e6
            flops = tokens * (1 + path.startswith("few")) * width / us / 1e6
            t = f["tile"]
            assert isinstance(t, dict)
            shape = f"{t['rows']}x{t['columns']}x{t['inputs']} warps {t['warps']} stages {t['stages']}{' swap' if t['swap'] else ''}"
            shape += (
                f" group {t['group']}{' tma' if t['tma'] else ''}{' long' if t['extra'] else ''}"
                if t["rows"] >= 64
                else ""
            )
            print(
                f"{path:14} T {tokens:6} {us:9.1f} us  {read:5.2f} TB/s  {flops:6.1f} TFLOP/s  {shape}  (of {len(mine)})"
            )


if __name__ == "__main__":
    main()
