"""Tile sizes and memory, as plain numbers: what the probe promises and the launcher does. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, replace

MIN_ROWS = 16
"""The least a matrix instruction takes."""
FEW_ROWS = 32
"""Packed rows (query tokens × query heads of a KV head) up to which `decode` is the tile; for more it is `verify`."""
MAX_PROGRAMS = 640
"""Programs of a decode step at most: two for each of the 304 compute units of the largest device, and some to spare."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """block_m: packed rows.  block_n: keys.  warps, stages: as Triton counts them."""

    block_m: int
    block_n: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """prefill: one program for each block of rows.  decode, verify: the keys are shared among programs; block_m is the most, fewer rows take less.
    programs_per_sm: of those.  min_tiles: tiles of keys below which such a program is not worth its share of the merge."""

    prefill: Tile
    decode: Tile
    verify: Tile
    programs_per_sm: int = 2
    min_tiles: int = 2

    def split(self, rows: int) -> Tile:
        """For sequences of at most `rows` packed rows, with a block_m that is a power of two; more rows than verify.block_m take several blocks."""
        tile = self.decode if rows <= self.decode.block_m else self.verify
        return replace(tile, block_m=max(MIN_ROWS, min(tile.block_m, 1 << (rows - 1).bit_length())))


_HOPPER = Tiles(  # measured on an H100, benchmarks/gpu/triton_tune.py
    prefill=Tile(block_m=128, block_n=64, warps=8, stages=3),
    decode=Tile(block_m=FEW_ROWS, block_n=64, warps=4, stages=3),
    verify=Tile(block_m=64, block_n=64, warps=4, stages=3),
    min_tiles=1,  # H200, a step of 8 layers at batch 1 and 1k context: 1.80 ms, 1.83 with 2
)
_HOPPER_FP8 = replace(  # measured on an H200, benchmarks/gpu/long_decode.py
    _HOPPER, decode=Tile(block_m=FEW_ROWS, block_n=64, warps=2, stages=4), programs_per_sm=4
)
_BLACKWELL = replace(
    _HOPPER,
    decode=Tile(block_m=FEW_ROWS, block_n=64, warps=8, stages=3),
    verify=Tile(block_m=64, block_n=64, warps=8, stages=3),
    min_tiles=2,
)
_AMPERE = replace(  # operands in registers: smaller tiles, or they spill
    _HOPPER,
    prefill=Tile(block_m=128, block_n=32, warps=8, stages=3),
    verify=Tile(block_m=64, block_n=64, warps=8, stages=3),
    min_tiles=2,
)
_SMALL = Tiles(  # 99 KiB of shared memory a multiprocessor
    prefill=Tile(block_m=128, block_n=32, warps=8, stages=2),
    decode=Tile(block_m=FEW_ROWS, block_n=32, warps=4, stages=2),
    verify=Tile(block_m=64, block_n=32, warps=8, stages=2),
)
_AMD = replace(_SMALL, verify=Tile(block_m=64, block_n=32, warps=4, stages=2))
_INTERPRETED = Tiles(
    prefill=Tile(block_m=64, block_n=32, warps=1, stages=1),
    decode=Tile(block_m=FEW_ROWS, block_n=32, warps=1, stages=1),
    verify=Tile(block_m=64, block_n=32, warps=1, stages=1),
    min_tiles=1,
)

_TILES = {
    "sm80": _AMPERE,
    "sm86": _SMALL,
    "sm87": _AMPERE,
    "sm89": _SMALL,
    "sm90": _HOPPER,
    "sm100": _BLACKWELL,
    "sm103": _BLACKWELL,
    "sm110": _BLACKWELL,
    "sm120": _SMALL,
    "sm121": _SMALL,
    "gfx90a": _AMD,
    "gfx942": _AMD,
    "gfx950": _AMD,
    "gfx1100": _AMD,
    "gfx1101": _AMD,
    "gfx1200": _AMD,
    "gfx1201": _AMD,
}
ARCHITECTURES = tuple(_TILES)
"""Exactly those the kernels are compiled for; one that does not exist yet cannot have been tried."""
_STARTS_EARLY = {"sm90", "sm100", "sm103", "sm110", "sm120", "sm121"}
_CONVERTS_FP8 = {"sm89", *_STARTS_EARLY}


def tiles_for(arch: str, q_dtype: str, head_dim: int, kv_dtype: str) -> Tiles:
    """arch: as in Platform; any other than ARCHITECTURES is a CPU's, where the interpreter runs. Wide elements and heads take smaller tiles, and
    fp8 keys more programs, for they have something to compute."""
    tiles = _TILES.get(arch, _INTERPRETED)
    if tiles is _INTERPRETED:
        return tiles
    if q_dtype == "float32":  # dots without tensor cores: registers decide
        few = Tile(block_m=MIN_ROWS, block_n=16, warps=4, stages=1)
        return replace(tiles, prefill=Tile(block_m=32, block_n=32, warps=8, stages=1), decode=few, verify=few)
    if head_dim > 128:
        return replace(
            tiles,
            prefill=Tile(block_m=64, block_n=32, warps=8, stages=2),
            decode=replace(tiles.decode, block_n=32, stages=2),
            verify=replace(tiles.verify, block_m=FEW_ROWS, block_n=32, stages=2),
        )
    if tiles is _HOPPER and kv_dtype == "float8_e4m3fn":
        return _HOPPER_FP8
    return tiles


def converts_fp8(arch: str) -> bool:
    """Whether the device has NVIDIA's instruction that makes two e4m3 values two float16; elsewhere the kernels move the bits."""
    return arch in _CONVERTS_FP8


def starts_early(arch: str) -> bool:
    """Whether kernels may be started before the one ahead has ended."""
    return arch in _STARTS_EARLY


def partial_bytes(programs: int, rows: int, head_dim: int) -> int:
    """Memory for partial results of decode: two slots a program of `rows` rows, float32, and their LSE."""
    return 2 * programs * rows * (head_dim + 1) * 4
