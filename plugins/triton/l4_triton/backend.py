"""The backend. Imported only when it was chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from packaging.version import Version

from l4_triton import launch
from l4_triton.probe import OLDEST
from l4_triton.tiles import MAX_PROGRAMS, Tile, Tiles, converts_fp8, starts_early, tiles_for
from l4core.plugin_api import AttentionBackend, AttentionContext, AttentionMetadata, BackendUnavailable, KVView, Plan

INTERPRETED_PROCESSORS = 2
"""Few, so that under the interpreter too a sequence is shared by programs and a program goes from one sequence to the next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonPlan:
    """meta: as given; lengths stay on the device.  split: the keys of a sequence are shared out among programs."""

    meta: AttentionMetadata
    split: bool
    tile: Tile


class TritonBackend(AttentionBackend):
    """Keeps memory for partial results, used within a single `attend`."""

    without_memory = True

    def __init__(self, context: AttentionContext, tiles: Tiles, processors: int, traits: launch.Traits) -> None:
        """processors: multiprocessors (compute units) of the device."""
        req = context.requirements
        self._tiles, self._processors, self._traits = tiles, processors, traits
        self._kv_heads, self._group = req.num_kv_heads, req.num_q_heads // req.num_kv_heads
        programs = min(tiles.programs_per_sm * processors, MAX_PROGRAMS)
        self._partials = launch.new_partials(programs, tiles.verify.block_m, req.head_dim, context.device)

    def plan(self, meta: AttentionMetadata) -> Plan:
        """Split where one block of rows holds all queries of a sequence, or where blocks of rows alone would leave the device idle."""
        rows = meta.max_seqlen_q * self._group
        tile = self._tiles.split(rows)
        blocks = meta.num_seqs * triton.cdiv(rows, tile.block_m) * self._kv_heads
        if rows > tile.block_m and blocks >= self._processors:
            return TritonPlan(meta=meta, split=False, tile=self._tiles.prefill)
        return TritonPlan(meta=meta, split=True, tile=tile)

    def attend(self, q: torch.Tensor, kv: KVView, plan: Plan, out: torch.Tensor) -> None:
        assert isinstance(plan, TritonPlan)
        if plan.split:
            launch.decode(q, kv, plan.meta, out, plan.tile, self._traits, self._partials, self._tiles.min_tiles)
        else:
            launch.prefill(q, kv, plan.meta, out, plan.tile, self._traits)


def create(context: AttentionContext) -> AttentionBackend:
    """Raises BackendUnavailable where Triton is too old, or where a CPU lacks its interpreter or a GPU has it."""
    if Version(triton.__version__) < OLDEST:
        raise BackendUnavailable(
            f"triton {triton.__version__}; wanted {OLDEST} or later", fix=f"pip install 'triton>={OLDEST}'"
        )
    on_cpu, interpreted = torch.device(context.device).type == "cpu", bool(triton.knobs.runtime.interpret)
    if on_cpu and not interpreted:
        raise BackendUnavailable(
            "on a CPU Triton kernels run only under its interpreter",
            fix="TRITON_INTERPRET=1, or --attention-backend sdpa",
        )
    if interpreted and context.requirements.needs_graph:
        raise BackendUnavailable("Triton's interpreter cannot be captured in a graph", fix="unset TRITON_INTERPRET")
    if interpreted and not on_cpu:
        context.logger.warning("TRITON_INTERPRET is set: attention runs in Python, thousands of times slower")
    arch = "" if interpreted else context.platform.arch
    req = context.requirements
    tiles = tiles_for(arch, req.q_dtype, req.head_dim, req.kv_dtype)
    traits = launch.Traits(converts_fp8=converts_fp8(arch), starts_early=starts_early(arch), interpreted=interpreted)
    return TritonBackend(context, tiles, _processors(context.device), traits)


def _processors(device: str) -> int:
    if torch.device(device).type == "cpu":
        return INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(torch.device(device)).multi_processor_count)
