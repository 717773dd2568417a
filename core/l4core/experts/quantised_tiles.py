"""Tile sizes of the experts on quantised weights by number of tokens, measured on an H200 (docs/decisions/016-quantised-weights.md). Imports nothing
heavy."""

from __future__ import annotations

from dataclasses import dataclass

FEW_TOKENS = 8
"""Up to this many tokens nothing is sorted, and the shared expert is one more expert of the same launch."""
SPLIT_TOKENS = 32
"""Up to this many, sorted, two programs share the inputs of a 4-bit weight: an expert has a row or two, so there are few blocks."""
DOWN_REGISTERS = 96
"""With which all 1,280 programs of one token's down product fit on an H200 at once; the compiler takes 98, and 92 programs wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """rows: tokens.  columns: outputs, of gate and of up each.  parts: programs that share the inputs of an output.  warps, stages: as Triton counts
    them.  ratio: for 4 bits, see int4_gate_up.  inputs: for 8 bits, of one step.  registers: of a thread, at most, for bfloat16 on NVIDIA's
    devices."""

    rows: int
    columns: int = 64
    parts: int = 1
    warps: int = 2
    stages: int = 3
    ratio: bool = False
    inputs: int = 128
    registers: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """gate_up, down: of the routed experts.  shared_*: of the shared one where it has launches of its own.  few: nothing is sorted, and the shared
    expert is one more expert of the same launch.  eight: for 8 bits, x is quantised too."""

    gate_up: Tile
    down: Tile
    shared_gate_up: Tile
    shared_down: Tile
    few: bool = False
    eight: bool = False


Pair = tuple[Tile, Tile]


def int4_tiles(num_tokens: int, num_experts: int) -> Tiles:
    """Few rows: small tiles and many programs, to have much of the memory on its way. Many rows: tiles that read a weight for many rows."""
    if num_tokens <= FEW_TOKENS:
        parts = 4 if num_tokens <= 4 else 2
        few = Tile(rows=8, parts=parts), Tile(rows=8, parts=2 * parts, registers=DOWN_REGISTERS)
        return _tiles(few, few, few=True)
    if num_tokens <= SPLIT_TOKENS:
        routed = Tile(rows=8, parts=2)
        shared = _int4_split(num_tokens)
        return _tiles((routed, routed), shared)
    return _tiles(_int4_pair(num_tokens / num_experts), _int4_pair(num_tokens))


def _int4_split(rows: int) -> Pair:
    """The shared expert's, of at most SPLIT_TOKENS rows."""
    if rows <= 16:
        return Tile(rows=16, parts=4), Tile(rows=16, parts=8)
    tile = Tile(rows=32, parts=4, ratio=True, warps=4)
    return tile, tile


def _int4_pair(rows: float) -> Pair:
    """(gate_up, down) where an expert has about `rows` rows."""
    if rows <= 6:
        return Tile(rows=8), Tile(rows=8)
    if rows <= 12:
        return Tile(rows=16), Tile(rows=16, stages=4)
    if rows <= 64:
        size = 32 if rows <= 32 else 64
        parts = 1 if rows <= 16 else 4 if rows <= 32 else 2
        return (
            Tile(rows=size, parts=parts, ratio=True, warps=4),
            Tile(rows=size, columns=128, parts=2 * parts, ratio=True, warps=4),
        )
    if rows <= 256:
        tile = Tile(rows=64, columns=128, ratio=True, warps=4)
        return tile, tile
    return Tile(rows=128, columns=128, ratio=True, warps=8), Tile(rows=128, columns=256, ratio=True, warps=8)


def fp8_tiles(num_tokens: int, num_experts: int) -> Tiles:
    """The same for 8 bits. From some rows on it pays to quantise them too."""
    if num_tokens <= FEW_TOKENS:
        few = Tile(rows=8, parts=4, warps=4, stages=4)
        return _tiles((few, few), (few, few), few=True)
    if num_tokens <= 16:
        routed = Tile(rows=8, parts=4, warps=4)
        return _tiles((routed, routed), (Tile(rows=16, parts=4, warps=4), Tile(rows=16, parts=8, warps=4)))
    eight = num_tokens > 128
    return _tiles(_fp8_pair(num_tokens / num_experts, eight=eight), _fp8_pair(num_tokens, eight=eight), eight=eight)


def _fp8_pair(rows: float, *, eight: bool) -> Pair:
    if rows <= 6:
        return Tile(rows=8, warps=4), Tile(rows=8, warps=4)
    if rows <= 12:
        return Tile(rows=16, warps=4), Tile(rows=16, warps=4)
    if rows <= 128:
        size = 32 if rows <= 32 else 64
        parts = 1 if eight else 4
        return Tile(rows=size, parts=parts, warps=4), Tile(rows=size, columns=128, parts=parts, warps=4)
    tile = Tile(rows=128, columns=128, warps=8)
    return tile, tile


def _tiles(routed: Pair, shared: Pair, *, few: bool = False, eight: bool = False) -> Tiles:
    pairs = {"gate_up": routed[0], "down": routed[1], "shared_gate_up": shared[0], "shared_down": shared[1]}
    return Tiles(**pairs, few=few, eight=eight)
