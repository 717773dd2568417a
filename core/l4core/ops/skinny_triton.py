"""Few rows times a weight: a job of reading the weight once, at the memory's speed.

A program owns some output columns and goes along the inputs; the rows' tile is the small side of the product. Sums do not depend on how many rows
there are, but for a row alone, which takes no tensor cores. Tiles were chosen by benchmarks/gpu/skinny_tune.py.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from l4core.ops.dots_triton import dot_type
from l4core.ops.overlap_triton import launch_options, let_next_start, wait_for_last


@dataclass(frozen=True, slots=True, kw_only=True)
class SkinnyTile:
    """rows: padded number of rows, a power of 2.  columns, depth: of the weight, a step of a program.  stages: steps loaded ahead."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


ONE_ROW = SkinnyTile(rows=1, columns=4, depth=1024, warps=2, stages=3)
FEW_ROWS = SkinnyTile(rows=16, columns=64, depth=128, warps=4, stages=6)
MORE_ROWS = SkinnyTile(rows=32, columns=64, depth=128, warps=4, stages=6)


@functools.cache
def gains(device: torch.device) -> bool:
    """Where this product was measured to beat torch's (an H200), and their successors, which have the shared memory that the tiles take."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] in (9, 10)


def tile_for(num_rows: int, depth: int) -> SkinnyTile | None:
    """None: torch's own product is faster, or the inputs do not divide into steps."""
    if num_rows == 1 and depth % 8 == 0:
        return ONE_ROW
    if num_rows <= MORE_ROWS.rows and depth % MORE_ROWS.depth == 0:
        return FEW_ROWS if num_rows <= FEW_ROWS.rows else MORE_ROWS
    return None


def skinny_linear(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, tile: SkinnyTile) -> torch.Tensor:
    """x [M, K] · weight [N, K]ᵀ → out [M, N], sums in float32. M ≤ tile.rows, K a multiple of tile.depth unless tile.rows is 1; inner
    strides are 1."""
    num_rows, depth = x.shape
    num_out = weight.shape[0]
    _skinny_kernel[(triton.cdiv(num_out, tile.columns),)](
        x,
        weight,
        out,
        num_rows,
        num_out,
        depth,
        x.stride(0),
        weight.stride(0),
        out.stride(0),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        EVEN=depth % tile.depth == 0,
        DOT_TYPE=dot_type(x),
        num_warps=tile.warps,
        num_stages=tile.stages,
        **launch_options(x),
    )
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _skinny_kernel(
    x,
    weight,
    out,
    num_rows,
    num_out,
    depth,
    stride_x,
    stride_weight,
    stride_out,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mine = column < num_out
    at = tl.arange(0, DEPTH)
    w = weight + tl.where(mine, column, 0).to(tl.int64)[:, None] * stride_weight + at[None, :]
    if PDL:
        let_next_start()
    if ROWS == 1:
        first = _inputs(w, at, 0, depth, EVEN)  # on its way while the kernel ahead still runs: no kernel writes weights
        if PDL:
            wait_for_last()
        terms = _row(x, at, 0, depth, EVEN)[None, :] * first.to(tl.float32)
        for k in range(DEPTH, depth, DEPTH):
            terms += _row(x, at, k, depth, EVEN)[None, :] * _inputs(w, at, k, depth, EVEN).to(tl.float32)
        tl.store(out + column, tl.sum(terms, axis=1).to(out.dtype.element_ty), mask=mine)
    else:
        if PDL:
            wait_for_last()
        row = tl.arange(0, ROWS)
        rows = x + row[:, None] * stride_x + at[None, :]
        sums = tl.zeros([COLUMNS, ROWS], dtype=tl.float32)
        for k in range(0, depth, DEPTH):
            a = tl.load(rows + k, mask=(row < num_rows)[:, None], other=0.0)
            b = tl.load(w + k, eviction_policy="evict_first")
            sums = tl.dot(b.to(DOT_TYPE), tl.trans(a.to(DOT_TYPE)), acc=sums, input_precision="ieee")
        target = out + row[None, :] * stride_out + column[:, None]
        tl.store(target, sums.to(out.dtype.element_ty), mask=mine[:, None] & (row < num_rows)[None, :])


@triton.jit
def _inputs(w, at, k, depth, EVEN: tl.constexpr):
    """Weights of inputs k + at, [COLUMNS, DEPTH]."""
    if EVEN:
        b = tl.load(w + k, eviction_policy="evict_first")
    else:
        b = tl.load(w + k, mask=(k + at < depth)[None, :], other=0.0, eviction_policy="evict_first")
    return b


@triton.jit
def _row(x, at, k, depth, EVEN: tl.constexpr):
    """Inputs k + at of the only row, float32 [DEPTH]."""
    if EVEN:
        a = tl.load(x + k + at)
    else:
        a = tl.load(x + k + at, mask=k + at < depth, other=0.0)
    return a.to(tl.float32)
