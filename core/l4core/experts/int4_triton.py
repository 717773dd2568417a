"""Experts on 4-bit weights in Triton, routed and shared: the launches around ops.experts_int4_triton."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton

from l4core.errors import BackendUnavailable
from l4core.experts.int4_tiles import FEW_TOKENS, Int4Tile, Int4Tiles, int4_tiles
from l4core.experts.sorted_triton import sort_by_expert
from l4core.ops.dots_triton import dot_type
from l4core.ops.expert_rows_triton import ALL, FEW, MANY
from l4core.ops.experts_int4_triton import int4_down, int4_gate_up
from l4core.plugin_api import ExpertContext, ExpertKernel, ExpertWeights
from l4core.quant.formats import GROUP

COUNTERS = 1 << 16
"""More than programs in any launch whose programs add up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A weight with its scale, of every expert or of the shared one."""

    packed: torch.Tensor
    scale: torch.Tensor


class Int4Experts(ExpertKernel):
    """counters: int32, all zero whenever no kernel runs. inline_asm: unpack with instructions of NVIDIA's devices."""

    def __init__(self, device: torch.device | str, *, inline_asm: bool) -> None:
        self.counters = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        self.inline_asm = inline_asm

    def forward(
        self, x: torch.Tensor, expert_ids: torch.Tensor, score: torch.Tensor, weights: ExpertWeights
    ) -> torch.Tensor:
        return self.run(x, expert_ids, score, weights, int4_tiles(x.shape[0], weights.gate_up.shape[0]))

    def run(
        self, x: torch.Tensor, expert_ids: torch.Tensor, score: torch.Tensor, weights: ExpertWeights, tiles: Int4Tiles
    ) -> torch.Tensor:
        """`forward` with these tiles."""
        gate_up, down = _matrix(weights.gate_up, weights.gate_up_scale), _matrix(weights.down, weights.down_scale)
        shared = None
        if weights.shared_gate_up is not None:
            shared = (
                _matrix(weights.shared_gate_up, weights.shared_gate_up_scale),
                _matrix(weights.shared_down, weights.shared_down_scale),
            )
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        call = _Call(self, expert_ids, score)
        if x.shape[0] <= FEW_TOKENS:
            inner = call.gate_up(FEW, x, gate_up, shared and shared[0], tiles.gate_up)
            call.down(FEW, inner, down, shared and shared[1], out, tiles.down)
            return out
        if shared is not None:
            inner = call.gate_up(ALL, x, shared[0], None, tiles.shared_gate_up)
            call.down(ALL, inner, shared[1], None, out, tiles.shared_down)
        call.sort(gate_up.packed.shape[0])
        inner = call.gate_up(MANY, x, gate_up, None, tiles.gate_up)
        call.down(MANY, inner, down, None, out, tiles.down, add=shared is not None)
        return out


class _Call:
    """The launches of one forward pass."""

    def __init__(self, kernel: Int4Experts, expert_ids: torch.Tensor, score: torch.Tensor) -> None:
        self.kernel, self.expert_ids, self.score = kernel, expert_ids, score
        self.order = self.ends = expert_ids

    def sort(self, num_experts: int) -> None:
        self.order, self.ends = sort_by_expert(self.expert_ids, num_experts)

    def gate_up(
        self, mode: Any, x: torch.Tensor, weight: Matrix, shared: Matrix | None, tile: Int4Tile
    ) -> torch.Tensor:
        """→ silu(gate) · up, [rows, I]."""
        num_tokens, inter = x.shape[0], weight.packed.shape[-2] // 2
        rows = num_tokens * (1 if shared is None else 2)
        out = x.new_empty(rows, inter)
        launch = self._launch(mode, x, weight, shared, tile, inter)
        sums = _sums(x, launch.parts * rows * 2 * inter if launch.parts > 1 else 1)
        int4_gate_up[launch.grid](
            x, *launch.weights, self.expert_ids, self.order, self.ends, self.score, out, sums, self.kernel.counters,
            num_tokens, x.stride(0), launch.blocks, x.shape[1], inter, **launch.constants,
        )  # fmt: skip
        return out

    def down(
        self,
        mode: Any,
        inner: torch.Tensor,
        weight: Matrix,
        shared: Matrix | None,
        out: torch.Tensor,
        tile: Int4Tile,
        *,
        add: bool = False,
    ) -> None:
        """Writes out [T, H], or adds to it."""
        num_tokens, hidden = out.shape
        launch = self._launch(mode, inner, weight, shared, tile, hidden)
        adds_up = launch.parts > 1 or mode == FEW
        sums = _sums(inner, launch.parts * inner.shape[0] * hidden if adds_up else 1)
        int4_down[launch.grid](
            inner, *launch.weights, self.expert_ids, self.order, self.ends, out, sums, self.kernel.counters,
            num_tokens, inner.stride(0), launch.blocks, inner.shape[1], hidden, **launch.constants, ADD=add,
        )  # fmt: skip

    def _launch(
        self, mode: Any, x: torch.Tensor, weight: Matrix, shared: Matrix | None, tile: Int4Tile, outputs: int
    ) -> _Launch:
        num_tokens, inputs = self.expert_ids.shape[0], x.shape[1]
        num_experts = 0 if mode == ALL else weight.packed.shape[0]
        columns = math.gcd(outputs, tile.columns)
        blocks, tiles = outputs // columns, triton.cdiv(num_tokens, tile.rows)
        if mode == FEW:
            tiles = num_tokens + (shared is not None)
        elif mode == MANY:
            tiles = min(num_tokens, num_experts + num_tokens // tile.rows)
        parts = math.gcd(-(-inputs // GROUP), tile.parts)
        if parts > 1 and tiles * blocks > COUNTERS:
            parts = 1
        either = shared or weight
        constants = {
            "MODE": mode, "E": num_experts, "SHARED": shared is not None, "BLOCK_E": triton.next_power_of_2(num_experts + 1),
            "BLOCK_N": columns, "BLOCK_T": tile.rows, "PARTS": parts, "EVEN_K": inputs % GROUP == 0, "RATIO": tile.ratio,
            "ASM": self.kernel.inline_asm and x.dtype == torch.bfloat16, "DOT": dot_type(x),
            "num_warps": tile.warps, "num_stages": tile.stages,
        }  # fmt: skip
        return _Launch(
            grid=(tiles * blocks, parts),
            blocks=blocks,
            parts=parts,
            weights=(weight.packed, weight.scale, either.packed, either.scale),
            constants=constants,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Launch:
    """blocks: of outputs."""

    grid: tuple[int, int]
    blocks: int
    parts: int
    weights: tuple[torch.Tensor, ...]
    constants: dict[str, Any]


def _matrix(packed: torch.Tensor | None, scale: torch.Tensor | None) -> Matrix:
    assert packed is not None
    assert scale is not None
    return Matrix(packed=packed, scale=scale)


def _sums(x: torch.Tensor, count: int) -> torch.Tensor:
    return torch.empty(count, dtype=torch.float32, device=x.device)


def create(context: ExpertContext) -> Int4Experts:
    """The entry `triton_int4`."""
    if context.platform.device_type == "cpu":
        raise BackendUnavailable("Triton's kernels run on an accelerator", fix="--expert-kernel torch_quantised")
    return Int4Experts(context.device, inline_asm=context.platform.vendor == "nvidia")
