"""Compiles the router's and the experts' kernels as `compiled.ops` does the others: `python -m l4core.testing.compiled.experts sm90`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import triton
import triton.language as tl

from l4core.experts.few_triton import MIN_COLUMNS, _few_down_kernel, _few_gate_up_kernel
from l4core.experts.one_triton import _one_down_kernel, _one_gate_up_kernel
from l4core.experts.sorted_blocks_triton import _down_kernel, _gate_up_kernel
from l4core.experts.sorted_triton import _sort_kernel
from l4core.experts.tiles import Tile, tiles_for
from l4core.ops.router_triton import BLOCK_K, PIECE, ROWS, STAGES, _logits_kernel, _pick_kernel
from l4core.testing.compiled import ARCHITECTURES
from l4core.testing.compiled.ops import CoreKernel, compile_kernels

__all__ = ["kernels_for"]

HIDDEN, INTER = 5120, 8192
_DOTS = {"bf16": tl.bfloat16, "fp32": tl.float32}


def kernels_for(arch: str, *, everything: bool) -> Iterator[CoreKernel]:
    """The kernels with the tiles that a launch on this architecture would choose for the released models: one of each path, or every one."""
    for experts, dtype in ((16, "bf16"), (128, "bf16"), (16, "fp32")):
        if experts == 16 or everything:
            yield from _router(experts, dtype)
            rows = tiles_for(arch, experts, HIDDEN, INTER, {"bf16": "bfloat16", "fp32": "float32"}[dtype]).rows
            for row in rows if everything else (rows[0], rows[-1]):
                yield from (_few if row.few else _sorted)(experts, dtype, row.gate_up, row.down)
    single = tiles_for("sm90", 16, HIDDEN, INTER // 8, "bfloat16").row(1)
    yield from _one(single.gate_up, single.down)


def _router(experts: int, dtype: str) -> Iterator[CoreKernel]:
    shape = {"E": experts, "ROWS": ROWS, "BLOCK_E": max(triton.next_power_of_2(experts), 16)}
    yield CoreKernel(
        name=f"router logits, {experts} experts, {dtype}",
        kernel=_logits_kernel,
        pointers={"x": dtype, "weight": dtype, "parts": "fp32"},
        constants={"H": HIDDEN, "PIECE": PIECE, "BLOCK_K": BLOCK_K, "DOT_TYPE": _DOTS[dtype], **shape},
        scalars={},
        warps=4,
        stages=STAGES,
    )
    yield CoreKernel(
        name=f"router, {experts} experts",
        kernel=_pick_kernel,
        pointers={"parts": "fp32", "expert_ids": "i32", "score": "fp32"},
        constants={"PIECES": HIDDEN // PIECE, **shape},
        scalars={},
        warps=4,
    )
    yield CoreKernel(
        name=f"sort, {experts} experts",
        kernel=_sort_kernel,
        pointers={"expert_ids": "i32", "order": "i32", "ends": "i32"},
        constants={"BLOCK": 128, "SCAN": 1024, "BLOCK_E": experts},
        scalars={},
        warps=4,
    )


def _one(gate_up: Tile, down: Tile) -> Iterator[CoreKernel]:
    """A single token, on one rank of eight."""
    for kernel, names, tile in (
        (_one_gate_up_kernel, ("x", "gate_up", "shared_gate_up", "h"), gate_up),
        (_one_down_kernel, ("h", "down", "shared_down", "out"), down),
    ):
        yield CoreKernel(
            name="one token",
            kernel=kernel,
            pointers=dict.fromkeys(names, "bf16") | {"expert_ids": "i32", "score": "fp32"},
            constants={"H": HIDDEN, "I": INTER // 8, "SHARED": True, "COLUMNS": tile.columns, "DEPTH": tile.inputs},
            scalars={},
            warps=tile.warps,
            stages=tile.stages,
        )


def _few(experts: int, dtype: str, gate_up: Tile, down: Tile) -> Iterator[CoreKernel]:
    common = {"H": HIDDEN, "I": INTER, "SHARED": True, "DOT_TYPE": _DOTS[dtype]}
    turns = {"TURNS": HIDDEN // MIN_COLUMNS, "BLOCK_TURNS": triton.next_power_of_2(HIDDEN // MIN_COLUMNS)}
    ids = {"expert_ids": "i32", "hits": "i32", "turns": "i32"}
    weights = {"gate_up": dtype, "shared_gate_up": dtype}
    yield _kernel(
        f"few tokens, {experts} experts, {dtype}",
        _few_gate_up_kernel,
        {"x": dtype, "score": "fp32", "h": dtype, **ids, **weights},
        common | turns,
        gate_up,
    )
    weights = {"down": dtype, "shared_down": dtype}
    yield _kernel(
        f"few tokens, {experts} experts, {dtype}",
        _few_down_kernel,
        {"h": dtype, "parts": "fp32", "out": dtype, **ids, **weights},
        common,
        down,
    )


def _sorted(experts: int, dtype: str, gate_up: Tile, down: Tile) -> Iterator[CoreKernel]:
    common = {"H": HIDDEN, "I": INTER, "E": experts, "BLOCK_E": experts, "DOT_TYPE": _DOTS[dtype]}
    sorting = {"order": "i32", "ends": "i32"}
    pointers = {"x": dtype, "x_half": dtype, "x_extra": dtype, "score": "fp32", "gate_up": dtype, "h": dtype, **sorting}
    name = f"many tokens, {experts} experts, {dtype}"
    rows = {
        "x": (dtype, (gate_up.rows, gate_up.inputs)),
        "x_half": (dtype, (gate_up.half, gate_up.inputs)),
        "x_extra": (dtype, (gate_up.extra, gate_up.inputs)),
        "gate_up": (dtype, (1, gate_up.columns, 2, gate_up.inputs)),
    }
    yield _kernel(name, _gate_up_kernel, pointers, common, gate_up, rows, grouped=True)
    pointers = {"h": dtype, "h_half": dtype, "h_extra": dtype, "down": dtype, "out": dtype, **sorting}
    rows = {
        "h": (dtype, (down.rows, down.inputs)),
        "h_half": (dtype, (down.half, down.inputs)),
        "h_extra": (dtype, (down.extra, down.inputs)),
        "down": (dtype, (down.columns, down.inputs)),
    }
    yield _kernel(name, _down_kernel, pointers, common | {"ADD": True}, down, rows, grouped=True)


def _kernel(
    name: str,
    kernel: Any,
    pointers: dict[str, str],
    common: dict[str, Any],
    tile: Tile,
    descriptors: Mapping[str, tuple[str, Sequence[int]]] | None = None,
    *,
    grouped: bool = False,
) -> CoreKernel:
    """descriptors: what the arguments of the same name are where the tile asks for the copy engine."""
    constants = {key: value for key, value in tile.constants(grouped=grouped).items() if not key.startswith("num_")}
    return CoreKernel(
        name=f"{name}, tile {tile.rows}x{tile.columns}x{tile.inputs}{' tma' if tile.tma else ''}",
        kernel=kernel,
        pointers=pointers,
        constants=common | constants,
        scalars={},
        warps=tile.warps,
        stages=tile.stages,
        descriptors={name: one for name, one in (descriptors or {}).items() if tile.tma and one[1][0]},
    )


def main() -> int:
    arch, *more = sys.argv[1:] or [""]
    if arch not in ARCHITECTURES or more not in ([], ["all"]):
        usage = "usage: python -m l4core.testing.compiled.experts ARCH [all]"
        print(f"{usage}\nARCH: {', '.join(ARCHITECTURES)}", file=sys.stderr)
        return 2
    for record in compile_kernels(arch, tuple(kernels_for(arch, everything=bool(more)))):
        print(json.dumps(record), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
