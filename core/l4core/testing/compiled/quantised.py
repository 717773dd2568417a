"""Compiles the kernels for quantised weights as `compiled.ops` does the others: `python -m l4core.testing.compiled.quantised sm90`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from l4core.builtin_plugins import has_fp8
from l4core.experts.quantised_tiles import Tile, fp8_tiles, int4_tiles
from l4core.ops.expert_rows_triton import ALL, FEW, MANY
from l4core.ops.experts_fp8_triton import fp8_down, fp8_gate_up
from l4core.ops.experts_int4_triton import int4_down, int4_gate_up
from l4core.testing.compiled import ARCHITECTURES
from l4core.testing.compiled.ops import CoreKernel, compile_kernels

__all__ = ["kernels_for"]

TOKENS = (1, 16384)
"""Few, and many."""
_INDICES = {
    "ids": "i32",
    "order": "i32",
    "ends": "i32",
    "sums": "fp32",
    "counters": "i32",
    "score": "fp32",
    "out": "bf16",
}
_INT4 = {"x": "bf16", "packed": "i16", "scales": "bf16", "shared_packed": "i16", "shared_scales": "bf16"}
_FP8 = {"x_scale": "fp32", "weight": "fp8e4nv", "scales": "fp32", "shared_weight": "fp8e4nv", "shared_scales": "fp32"}


def kernels_for(arch: str, experts: int = 16) -> Iterator[CoreKernel]:
    """Both kernels of each format with the tiles that a launch of these numbers of tokens chooses."""
    for count in TOKENS:
        tiles = int4_tiles(count, experts)
        mode = FEW if tiles.few else MANY
        for kernel, tile in ((int4_gate_up, tiles.gate_up), (int4_down, tiles.down)):
            extra: dict[str, Any] = {"RATIO": tile.ratio, "EVEN_K": True}
            yield _kernel(f"int4, {count} tokens", arch, kernel, _INT4, mode, experts, tile, extra)
        if not has_fp8(arch):
            continue
        tiles = fp8_tiles(count, experts)
        mode = FEW if tiles.few else MANY
        pointers = _FP8 | {"x": "fp8e4nv" if tiles.eight else "bf16"}
        for kernel, tile in ((fp8_gate_up, tiles.gate_up), (fp8_down, tiles.down)):
            extra = {"BLOCK_K": tile.inputs, "EVEN_K": True, "A8": tiles.eight}
            yield _kernel(f"fp8, {count} tokens", arch, kernel, pointers, mode, experts, tile, extra)
    tile = int4_tiles(64, experts).shared_gate_up
    yield _kernel(
        "int4, shared expert", arch, int4_gate_up, _INT4, ALL, 0, tile, {"RATIO": tile.ratio, "EVEN_K": False}
    )


def _kernel(
    name: str,
    arch: str,
    kernel: Any,
    pointers: dict[str, str],
    mode: Any,
    experts: int,
    tile: Tile,
    extra: dict[str, Any],
) -> CoreKernel:
    constants: dict[str, Any] = {
        "MODE": mode, "E": experts, "SHARED": mode == FEW, "BLOCK_E": triton.next_power_of_2(experts + 1), "BLOCK_N": tile.columns,
        "BLOCK_T": tile.rows, "PARTS": tile.parts, "ASM": arch.startswith("sm"), "DOT": tl.bfloat16, **extra,
    }  # fmt: skip
    if "LATE" in kernel.arg_names:
        constants["LATE"] = mode == MANY
        constants["FEW_GROUPS"] = mode == FEW
    if "ADD" in kernel.arg_names:
        constants["ADD"] = mode == MANY
    named = {key: value for key, value in (_INDICES | pointers).items() if key in kernel.arg_names}
    return CoreKernel(
        name=f"{name}, tile {tile.rows}x{tile.columns}",
        kernel=kernel,
        pointers=named,
        constants=constants,
        scalars={},
        warps=tile.warps,
        stages=tile.stages,
        registers=tile.registers,
    )


def main() -> int:
    arch, *more = sys.argv[1:] or [""]
    if arch not in ARCHITECTURES or more:
        print(
            f"usage: python -m l4core.testing.compiled.quantised ARCH\nARCH: {', '.join(ARCHITECTURES)}",
            file=sys.stderr,
        )
        return 2
    for record in compile_kernels(arch, tuple(kernels_for(arch))):
        print(json.dumps(record), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
