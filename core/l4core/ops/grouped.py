"""One product a token group: row t of the sorted input meets the weight of its own expert. The only place that chooses how."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from l4core.ops.linear import FEW_ROWS, linear


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """Rows sorted by expert. order: int64 [T], sorted row → original row, None when sorting changes nothing (one row).  expert_ids: int64
    [T], sorted.  spans: (expert, begin, end) of the experts that were hit, known on a CPU only, where reading them costs nothing."""

    order: torch.Tensor | None
    expert_ids: torch.Tensor
    num_experts: int
    spans: tuple[tuple[int, int, int], ...] | None

    def sort(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of x [T, …] in expert order."""
        return x if self.order is None else x.index_select(0, self.order)

    def unsort(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `sort`."""
        return x if self.order is None else torch.empty_like(x).index_copy_(0, self.order, x)


def group_rows(expert_ids: torch.Tensor, num_experts: int) -> Groups:
    """expert_ids: int64 [T], the expert of each row. No host sync on an accelerator."""
    on_cpu = expert_ids.device.type == "cpu"
    if on_cpu and expert_ids.shape[0] == 1:
        expert = int(expert_ids[0])
        return Groups(order=None, expert_ids=expert_ids, num_experts=num_experts, spans=((expert, 0, 1),))
    sorted_ids, order = expert_ids.sort(stable=True)
    spans = _spans(expert_ids.bincount(minlength=num_experts).tolist()) if on_cpu else None
    return Groups(order=order, expert_ids=sorted_ids, num_experts=num_experts, spans=spans)


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, groups: Groups) -> torch.Tensor:
    """x [T, K] sorted by expert, weight [E, K, N] → [T, N]. On a CPU only the experts that were hit are read; on an accelerator in bfloat16 one
    grouped product; in other dtypes there every expert sees every row, which is E times the work but needs no host sync."""
    if groups.spans is not None:
        return _hit_experts(x, weight, groups.spans)
    if x.dtype == torch.bfloat16:
        return F.grouped_mm(x, weight, offs=group_ends(groups.expert_ids, groups.num_experts))
    return _every_expert(x, weight, groups.expert_ids)


def group_ends(sorted_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """int32 [E]: the row behind each expert's last one, computed on the device."""
    experts = torch.arange(num_experts, device=sorted_ids.device)
    return torch.searchsorted(sorted_ids, experts, right=True, out_int32=True)


def _spans(counts: list[int]) -> tuple[tuple[int, int, int], ...]:
    spans, begin = [], 0
    for expert, count in enumerate(counts):
        if count:
            spans.append((expert, begin, begin + count))
        begin += count
    return tuple(spans)


def _hit_experts(x: torch.Tensor, weight: torch.Tensor, spans: tuple[tuple[int, int, int], ...]) -> torch.Tensor:
    out_by_in = weight.transpose(1, 2)  # [E, N, K]
    if x.shape[0] <= FEW_ROWS:
        pieces = torch.split(x, [end - begin for _, begin, end in spans])
        found = [linear(rows, out_by_in[span[0]]) for rows, span in zip(pieces, spans, strict=True)]
        return found[0] if len(found) == 1 else torch.cat(found)
    out = x.new_empty(x.shape[0], weight.shape[2])
    for expert, begin, end in spans:
        linear(x[begin:end], out_by_in[expert], out=out[begin:end])
    return out


def _every_expert(x: torch.Tensor, weight: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
    out = x.new_zeros(x.shape[0], weight.shape[2])
    for expert in range(weight.shape[0]):
        mine = (expert_ids == expert).unsqueeze(1)
        out = torch.where(mine, x @ weight[expert], out)
    return out
