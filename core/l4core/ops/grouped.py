"""One product an expert: every row of the packed input meets the weight of its own expert. The only place that chooses how.

CPU          one product for each expert that was hit; the others' weights are not read
accelerator  bfloat16: torch's grouped_mm.  Other dtypes: every expert sees every row, E times the work but no host sync
Measured in docs/decisions/001-cpu-experts.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from l4core.ops.linear import linear

JOIN_ROWS = 64
"""Up to this many rows, joining the experts' results is cheaper than slicing a common output for each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """How T rows are packed by expert. order: int64 [T], packed row → row; place: int64 [T], row → packed row; None when all rows have one
    expert.  expert_ids: int64 [T], packed.  spans: (expert, number of rows) in packed order, known on a CPU, where reading costs nothing.
    With `least` packed rows are more than T: the first row of a small group again and again."""

    order: torch.Tensor | None
    place: torch.Tensor | None
    expert_ids: torch.Tensor
    num_experts: int
    spans: tuple[tuple[int, int], ...] | None

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of x [T, …] in expert order."""
        return x if self.order is None else x.index_select(0, self.order)

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `pack`."""
        return x if self.place is None else x.index_select(0, self.place)


def group_rows(expert_ids: torch.Tensor, num_experts: int, least: int = 1) -> Groups:
    """expert_ids: integers [T], the expert of each row, −1 = none: its result is 0 in `grouped_linear`. No host sync on an accelerator.
    least: rows that each group has at least, on a CPU, by repetition."""
    if expert_ids.is_cpu:
        return _group_on_cpu(expert_ids, num_experts, least)
    ids = torch.where(expert_ids < 0, num_experts, expert_ids)
    packed_ids, order = ids.sort(stable=True)
    return Groups(order=order, place=order.argsort(), expert_ids=packed_ids, num_experts=num_experts, spans=None)


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, groups: Groups) -> torch.Tensor:
    """x [T, K] packed, weight [E, K, N] → [T, N]; one expert's result may be a transposed view."""
    if groups.spans is not None:
        return _hit_experts(x, weight, groups.spans)
    if x.dtype == torch.bfloat16:
        out = F.grouped_mm(x, weight, offs=group_ends(groups.expert_ids, groups.num_experts))
        return out.masked_fill_((groups.expert_ids == groups.num_experts).unsqueeze(1), 0.0)  # it leaves them unwritten
    return _every_expert(x, weight, groups.expert_ids)


def group_ends(packed_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """int32 [E]: the row behind each expert's last one, computed on the device."""
    experts = torch.arange(num_experts, device=packed_ids.device)
    return torch.searchsorted(packed_ids, experts, right=True, out_int32=True)


def _group_on_cpu(expert_ids: torch.Tensor, num_experts: int, least: int) -> Groups:
    """Plain Python: for a decode it takes a third of the time of torch's sort and bincount, for a prefill it does not matter."""
    ids = expert_ids.tolist()
    rows: dict[int, list[int]] = {}
    for row, expert in enumerate(ids):
        rows.setdefault(expert, []).append(row)
    if len(rows) == 1 and len(ids) >= least:
        spans = ((ids[0], len(ids)),)
        return Groups(order=None, place=None, expert_ids=expert_ids, num_experts=num_experts, spans=spans)
    order: list[int] = []
    place = [0] * len(ids)
    for found in rows.values():
        for packed, row in enumerate(found, len(order)):
            place[row] = packed
        order += found
        order += found[:1] * (least - len(found))
    return Groups(
        order=torch.tensor(order),
        place=torch.tensor(place),
        expert_ids=expert_ids,
        num_experts=num_experts,
        spans=tuple((expert, max(len(found), least)) for expert, found in rows.items()),
    )


def _hit_experts(x: torch.Tensor, weight: torch.Tensor, spans: Sequence[tuple[int, int]]) -> torch.Tensor:
    out_by_in = weight.transpose(1, 2)  # [E, N, K]

    def product(rows: torch.Tensor, expert: int) -> torch.Tensor:
        return rows.new_zeros(rows.shape[0], weight.shape[2]) if expert < 0 else linear(rows, out_by_in[expert])

    if len(spans) == 1:
        return product(x, spans[0][0])
    pieces = torch.split(x, [count for _, count in spans])
    if x.shape[0] <= JOIN_ROWS:
        return torch.cat([product(rows, expert) for rows, (expert, _) in zip(pieces, spans, strict=True)])
    out = x.new_empty(x.shape[0], weight.shape[2])
    for rows, target, (expert, _) in zip(pieces, torch.split(out, [count for _, count in spans]), spans, strict=True):
        if expert < 0:
            target.zero_()
        else:
            linear(rows, out_by_in[expert], out=target)
    return out


def _every_expert(x: torch.Tensor, weight: torch.Tensor, packed_ids: torch.Tensor) -> torch.Tensor:
    out = x.new_zeros(x.shape[0], weight.shape[2])
    for expert in range(weight.shape[0]):
        mine = (packed_ids == expert).unsqueeze(1)
        out = torch.where(mine, x @ weight[expert], out)
    return out
