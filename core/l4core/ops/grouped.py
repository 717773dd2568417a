"""One product an expert: every row of the packed input meets the weight of its own expert. The only place that chooses how.

CPU          only the experts that were hit are read; on AVX2 two of them at a time, so that each has a thread and its memory stream
accelerator  bfloat16: torch's grouped_mm.  Other dtypes: every expert sees every row, E times the work but no host sync
Measured in docs/decisions/001-cpu-experts.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from l4core.ops.linear import linear

OUT_BY_IN = torch.backends.cpu.get_cpu_capability() != "AVX2"
"""How an expert's weight best lies in memory on this machine. Both orders are right everywhere; the shape is [E, in, out] in either."""
PAIRS = not OUT_BY_IN
"""Whether small groups are multiplied in pairs."""
MAX_PAIR_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Packed rows [begin, begin + num_rows · len(experts)): num_rows of the first expert, then as many of the second, if there is one."""

    experts: tuple[int, ...]
    begin: int
    num_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """How T rows are packed by expert. order: int64 [P], packed row → row; a row may stand twice, as padding.  place: int64 [T], row → packed
    row.  Both None when packing changes nothing.  expert_ids: int64 [P] (accelerator).  blocks: known on a CPU, where reading costs nothing."""

    order: torch.Tensor | None
    place: torch.Tensor | None
    expert_ids: torch.Tensor
    num_experts: int
    blocks: tuple[Block, ...] | None

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, …] → [P, …]."""
        return x if self.order is None else x.index_select(0, self.order)

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """x [P, …] → [T, …]."""
        return x if self.place is None else x.index_select(0, self.place)


def group_rows(expert_ids: torch.Tensor, num_experts: int) -> Groups:
    """expert_ids: int64 [T], the expert of each row. No host sync on an accelerator."""
    if expert_ids.is_cpu:
        return _group_on_cpu(expert_ids, num_experts, pairs=PAIRS)
    sorted_ids, order = expert_ids.sort(stable=True)
    return Groups(order=order, place=order.argsort(), expert_ids=sorted_ids, num_experts=num_experts, blocks=None)


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, groups: Groups) -> torch.Tensor:
    """x [P, K] packed, weight [E, K, N] → [P, N]."""
    if groups.blocks is not None:
        return _by_block(x, weight, groups.blocks)
    if x.dtype == torch.bfloat16:
        return F.grouped_mm(x, weight, offs=group_ends(groups.expert_ids, groups.num_experts))
    return _every_expert(x, weight, groups.expert_ids)


def group_ends(sorted_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """int32 [E]: the row behind each expert's last one, computed on the device."""
    experts = torch.arange(num_experts, device=sorted_ids.device)
    return torch.searchsorted(sorted_ids, experts, right=True, out_int32=True)


def _group_on_cpu(expert_ids: torch.Tensor, num_experts: int, *, pairs: bool) -> Groups:
    """Largest groups first, so that those paired are about equally large."""
    rows: dict[int, list[int]] = {}
    for row, expert in enumerate(expert_ids.tolist()):
        rows.setdefault(expert, []).append(row)
    if len(rows) == 1:
        block = Block(experts=tuple(rows), begin=0, num_rows=expert_ids.shape[0])
        return Groups(order=None, place=None, expert_ids=expert_ids, num_experts=num_experts, blocks=(block,))
    order: list[int] = []
    blocks = []
    for experts in _partners({expert: len(found) for expert, found in rows.items()}, pairs):
        num_rows = max(len(rows[expert]) for expert in experts)
        blocks.append(Block(experts=experts, begin=len(order), num_rows=num_rows))
        for expert in experts:
            order += rows[expert] + rows[expert][:1] * (num_rows - len(rows[expert]))
    packed = torch.tensor(order)
    place = torch.empty_like(expert_ids).index_copy_(0, packed, torch.arange(len(order)))  # any copy of a row will do
    return Groups(order=packed, place=place, expert_ids=expert_ids, num_experts=num_experts, blocks=tuple(blocks))


def _partners(counts: dict[int, int], pairs: bool) -> list[tuple[int, ...]]:
    """Experts in blocks of one or two, the lower id first; a pair's padding stays below half of its larger group, or below four rows."""
    found: list[tuple[int, ...]] = []
    waiting: int | None = None
    for expert in sorted(counts, key=lambda e: -counts[e]):
        if not pairs or counts[expert] > MAX_PAIR_ROWS:
            found.append((expert,))
        elif waiting is None:
            waiting = expert
        elif counts[waiting] - counts[expert] <= max(4, counts[waiting] // 2):
            found.append((min(waiting, expert), max(waiting, expert)))
            waiting = None
        else:
            found.append((waiting,))
            waiting = expert
    return found if waiting is None else [*found, (waiting,)]


def _by_block(x: torch.Tensor, weight: torch.Tensor, blocks: Sequence[Block]) -> torch.Tensor:
    if len(blocks) == 1 and len(blocks[0].experts) == 1:
        return linear(x, weight[blocks[0].experts[0]].t())
    out = x.new_empty(x.shape[0], weight.shape[2])
    for block in blocks:
        if len(block.experts) == 2:
            _pair(x, weight, out, block)
        else:
            rows = slice(block.begin, block.begin + block.num_rows)
            linear(x[rows], weight[block.experts[0]].t(), out=out[rows])
    return out


def _pair(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, block: Block) -> None:
    """Two experts as one batch; any two weights are one strided tensor."""
    (first, second), begin, n = block.experts, block.begin, block.num_rows
    num_in, num_out = weight.shape[1:]
    stride, row, column = weight.stride()
    torch.bmm(
        x.as_strided((2, n, num_in), (n * num_in, num_in, 1), x.storage_offset() + begin * num_in),
        weight.as_strided(
            (2, num_in, num_out), ((second - first) * stride, row, column), weight.storage_offset() + first * stride
        ),
        out=out.as_strided((2, n, num_out), (n * num_out, num_out, 1), begin * num_out),
    )


def _every_expert(x: torch.Tensor, weight: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
    out = x.new_zeros(x.shape[0], weight.shape[2])
    for expert in range(weight.shape[0]):
        mine = (expert_ids == expert).unsqueeze(1)
        out = torch.where(mine, x @ weight[expert], out)
    return out
