"""Tile sizes of the 4-bit experts by number of tokens, measured on an H200 (docs/decisions/016-quantised-weights.md). Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

FEW_TOKENS = 16
"""Up to this many tokens nothing is sorted, and the shared expert is one more expert of the same launch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4Tile:
    """rows: tokens.  columns: outputs, of gate and of up each.  parts: programs that share the inputs of an output.  ratio: see int4_gate_up.
    warps, stages: as Triton counts them."""

    rows: int
    columns: int = 64
    parts: int = 1
    ratio: bool = False
    warps: int = 2
    stages: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4Tiles:
    """gate_up, down: of the routed experts.  shared_*: of the shared one where it has a launch of its own."""

    gate_up: Int4Tile
    down: Int4Tile
    shared_gate_up: Int4Tile
    shared_down: Int4Tile


def int4_tiles(num_tokens: int, num_experts: int) -> Int4Tiles:
    """Few rows: small tiles and many programs, to have much of the memory on its way. Many rows: tiles that read a weight for many rows."""
    if num_tokens <= FEW_TOKENS:
        rows = 8 if num_tokens <= 8 else 16
        few = Int4Tile(rows=rows, parts=4), Int4Tile(rows=rows, parts=8)
        return Int4Tiles(gate_up=few[0], down=few[1], shared_gate_up=few[0], shared_down=few[1])
    routed, shared = _pair(num_tokens / num_experts), _pair(num_tokens)
    return Int4Tiles(gate_up=routed[0], down=routed[1], shared_gate_up=shared[0], shared_down=shared[1])


def _pair(rows: float) -> tuple[Int4Tile, Int4Tile]:
    """(gate_up, down) where an expert has about `rows` rows."""
    if rows <= 6:
        return Int4Tile(rows=8), Int4Tile(rows=8, stages=4)
    if rows <= 12:
        return Int4Tile(rows=16), Int4Tile(rows=16, stages=4)
    if rows <= 64:
        size = 32 if rows <= 32 else 64
        parts = 4 if rows > 16 else 1
        return (
            Int4Tile(rows=size, parts=parts, ratio=True, warps=4),
            Int4Tile(rows=size, columns=128, parts=2 * parts, ratio=True, warps=4),
        )
    if rows <= 256:
        tile = Int4Tile(rows=64, columns=128, ratio=True, warps=4)
        return tile, tile
    return (
        Int4Tile(rows=128, columns=128, ratio=True, warps=8),
        Int4Tile(rows=128, columns=256, ratio=True, warps=8),
    )
