"""Experts on quantised weights in Triton, routed and shared: the launches around ops.experts_int4_triton and ops.experts_fp8_triton."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import triton

from l4core.errors import BackendUnavailable
from l4core.experts.quantised_tiles import Tile, Tiles, fp8_tiles, int4_tiles
from l4core.experts.sorted_triton import sort_by_expert
from l4core.ops.dots_triton import dot_type, unpacks_inline
from l4core.ops.expert_rows_triton import ALL, FEW, MANY
from l4core.ops.experts_fp8_triton import fp8_down, fp8_gate_up
from l4core.ops.experts_int4_triton import HELD, int4_down, int4_gate_up
from l4core.ops.overlap_triton import launch_options
from l4core.ops.quantise_rows import quantise_rows
from l4core.plugin_api import ExpertContext, ExpertKernel, ExpertWeights
from l4core.quant.formats import GROUP

COUNTERS = 1 << 16
"""More than programs in any launch whose programs add up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A weight with its scale, of every expert or of the shared one."""

    weight: torch.Tensor
    scale: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The left side of a product. values: x, or x quantised and the scale of each row.  inputs: K."""

    values: tuple[torch.Tensor, ...]
    inputs: int


class QuantisedExperts(ExpertKernel):
    """counters: int32, all zero whenever no kernel runs."""

    without_memory = True

    def __init__(self, device: torch.device | str) -> None:
        self.counters = torch.zeros(COUNTERS, dtype=torch.int32, device=device)

    def forward(
        self, x: torch.Tensor, expert_ids: torch.Tensor, score: torch.Tensor, weights: ExpertWeights
    ) -> torch.Tensor:
        return self.run(x, expert_ids, score, weights, self.tiles(x.shape[0], weights.gate_up.shape[0]))

    def run(
        self, x: torch.Tensor, expert_ids: torch.Tensor, score: torch.Tensor, weights: ExpertWeights, tiles: Tiles
    ) -> torch.Tensor:
        """`forward` with these tiles."""
        gate_up, down = _matrix(weights.gate_up, weights.gate_up_scale), _matrix(weights.down, weights.down_scale)
        shared = None
        if weights.shared_gate_up is not None:
            shared = (
                _matrix(weights.shared_gate_up, weights.shared_gate_up_scale),
                _matrix(weights.shared_down, weights.shared_down_scale),
            )
        make = torch.zeros_like if shared is None else torch.empty_like  # rows without an expert here stay 0
        out = make(x, memory_format=torch.contiguous_format)
        call = _Call(self, expert_ids, score, x, eight=tiles.eight)
        rows = call.rows(x)
        if tiles.few:
            inner = call.gate_up(FEW, rows, gate_up, shared and shared[0], tiles.gate_up)
            call.down(FEW, call.rows(inner), down, shared and shared[1], out, tiles.down)
            return out
        call.sort(gate_up.weight.shape[0])
        # Of two launches in a row one does not need the other's result, so it starts while the other ends (`late`).
        inner_shared = None if shared is None else call.gate_up(ALL, rows, shared[0], None, tiles.shared_gate_up)
        inner = call.gate_up(MANY, rows, gate_up, None, tiles.gate_up, late=shared is not None)
        if shared is not None and inner_shared is not None:
            call.down(ALL, call.rows(inner_shared), shared[1], None, out, tiles.shared_down)
        call.down(MANY, call.rows(inner), down, None, out, tiles.down, late=shared is not None)
        return out

    @abstractmethod
    def tiles(self, num_tokens: int, num_experts: int) -> Tiles:
        """By number of tokens alone."""

    @abstractmethod
    def kernels(self) -> tuple[Any, Any]:
        """(gate and up, down)."""

    @abstractmethod
    def outputs(self, weight: torch.Tensor) -> int:
        """N of a weight."""

    @abstractmethod
    def units(self, tile: Tile, inputs: int) -> tuple[int, dict[str, Any]]:
        """(steps over the inputs, what the kernel must know of them)."""


class Int4Experts(QuantisedExperts):
    """int4_g128."""

    def tiles(self, num_tokens: int, num_experts: int) -> Tiles:
        return int4_tiles(num_tokens, num_experts)

    def kernels(self) -> tuple[Any, Any]:
        return int4_gate_up, int4_down

    def outputs(self, weight: torch.Tensor) -> int:
        return weight.shape[-2]

    def units(self, tile: Tile, inputs: int) -> tuple[int, dict[str, Any]]:
        return triton.cdiv(inputs, GROUP), {"RATIO": tile.ratio, "EVEN_K": inputs % GROUP == 0}


class Fp8Experts(QuantisedExperts):
    """fp8_channel."""

    def tiles(self, num_tokens: int, num_experts: int) -> Tiles:
        return fp8_tiles(num_tokens, num_experts)

    def kernels(self) -> tuple[Any, Any]:
        return fp8_gate_up, fp8_down

    def outputs(self, weight: torch.Tensor) -> int:
        return weight.shape[-2]

    def units(self, tile: Tile, inputs: int) -> tuple[int, dict[str, Any]]:
        return triton.cdiv(inputs, tile.inputs), {"BLOCK_K": tile.inputs, "EVEN_K": inputs % tile.inputs == 0}


class _Call:
    """The launches of one forward pass. eight: what is multiplied is quantised row by row first."""

    def __init__(
        self, kernel: QuantisedExperts, expert_ids: torch.Tensor, score: torch.Tensor, x: torch.Tensor, *, eight: bool
    ) -> None:
        self.kernel, self.expert_ids, self.score, self.eight = kernel, expert_ids, score, eight
        self.order = self.ends = expert_ids
        self.constants = {"ASM": unpacks_inline(x), "DOT": dot_type(x)} | launch_options(x) | {"enable_fp_fusion": True}
        self.num_tokens, self.dtype = x.shape[0], x.dtype

    def sort(self, num_experts: int) -> None:
        self.order, self.ends = sort_by_expert(self.expert_ids, num_experts)

    def rows(self, x: torch.Tensor) -> Rows:
        if not isinstance(self.kernel, Fp8Experts):
            return Rows(values=(x,), inputs=x.shape[1])
        return Rows(values=quantise_rows(x) if self.eight else (x, self.score), inputs=x.shape[1])

    def gate_up(
        self, mode: Any, rows: Rows, weight: Matrix, shared: Matrix | None, tile: Tile, *, late: bool = False
    ) -> torch.Tensor:
        """→ silu(gate) · up, [rows, I].  late: nothing that the launch before it writes is read."""
        inter = self.kernel.outputs(weight.weight) // 2
        count = self.num_tokens * (1 if shared is None else 2)
        out = torch.empty(count, inter, dtype=self.dtype, device=self.score.device)
        launch = self._launch(mode, rows, weight, shared, tile, inter, late=late)
        sums = self._sums(launch.parts * count * 2 * inter if launch.parts > 1 else 1)
        self.kernel.kernels()[0][launch.grid](
            *rows.values, *launch.weights, self.expert_ids, self.order, self.ends, self.score, out, sums,
            self.kernel.counters, self.num_tokens, rows.values[0].stride(0), launch.blocks, rows.inputs, inter, **launch.constants,
        )  # fmt: skip
        return out

    def down(
        self,
        mode: Any,
        rows: Rows,
        weight: Matrix,
        shared: Matrix | None,
        out: torch.Tensor,
        tile: Tile,
        *,
        late: bool = False,
    ) -> None:
        """Writes out [T, H].  late: adds to it what the launch before left there, which is all it needs of that."""
        hidden = out.shape[1]
        launch = self._launch(mode, rows, weight, shared, tile, hidden, late=late)
        adds_up = launch.parts > 1 or mode == FEW
        sums = self._sums(launch.parts * rows.values[0].shape[0] * hidden if adds_up else 1)
        self.kernel.kernels()[1][launch.grid](
            *rows.values, *launch.weights, self.expert_ids, self.order, self.ends, out, sums, self.kernel.counters,
            self.num_tokens, rows.values[0].stride(0), launch.blocks, rows.inputs, hidden, **launch.constants, ADD=late,
        )  # fmt: skip

    def _launch(
        self, mode: Any, rows: Rows, weight: Matrix, shared: Matrix | None, tile: Tile, outputs: int, *, late: bool
    ) -> _Launch:
        num_experts = 0 if mode == ALL else weight.weight.shape[0]
        columns = math.gcd(outputs, tile.columns)
        blocks, tiles = outputs // columns, triton.cdiv(self.num_tokens, tile.rows)
        if mode == FEW:
            tiles = self.num_tokens + (shared is not None)
        elif mode == MANY:
            tiles = min(self.num_tokens, num_experts + self.num_tokens // tile.rows)
        steps, constants = self.kernel.units(tile, rows.inputs)
        parts = math.gcd(steps, tile.parts)
        if parts > 1 and tiles * blocks > COUNTERS:
            parts = 1
        if isinstance(self.kernel, Fp8Experts):
            constants["A8"] = self.eight
        else:
            constants["LATE"] = late
            constants["FEW_GROUPS"] = steps // parts <= HELD.value and not tile.ratio
        constants |= self.constants | {
            "MODE": mode, "E": num_experts, "SHARED": shared is not None, "BLOCK_E": triton.next_power_of_2(num_experts + 1),
            "BLOCK_N": columns, "BLOCK_T": tile.rows, "PARTS": parts, "num_warps": tile.warps, "num_stages": tile.stages,
        }  # fmt: skip
        if tile.registers is not None and self.constants["ASM"]:
            constants["maxnreg"] = tile.registers
        either = shared or weight
        return _Launch(
            grid=(tiles * blocks, parts),
            blocks=blocks,
            parts=parts,
            weights=(weight.weight, weight.scale, either.weight, either.scale),
            constants=constants,
        )

    def _sums(self, count: int) -> torch.Tensor:
        return torch.empty(count, dtype=torch.float32, device=self.score.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Launch:
    """blocks: of outputs."""

    grid: tuple[int, int]
    blocks: int
    parts: int
    weights: tuple[torch.Tensor, ...]
    constants: dict[str, Any]


def _matrix(weight: torch.Tensor | None, scale: torch.Tensor | None) -> Matrix:
    assert weight is not None
    assert scale is not None
    return Matrix(weight=weight, scale=scale)


def create_int4(context: ExpertContext) -> Int4Experts:
    """The entry `triton_int4`."""
    _refuse_cpu(context)
    return Int4Experts(context.device)


def create_fp8(context: ExpertContext) -> Fp8Experts:
    """The entry `triton_fp8`."""
    _refuse_cpu(context)
    return Fp8Experts(context.device)


def _refuse_cpu(context: ExpertContext) -> None:
    if context.platform.device_type == "cpu":
        raise BackendUnavailable("Triton's kernels run on an accelerator", fix="--expert-kernel torch_quantised")
