"""How the rows of a step draw, on the device: the arguments of the law, and the kernels that are it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from l4core.parallel.ranks import Ranks
from l4core.sampling.draw_shards import draw_over_ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLaw:
    """Of each row of logits, as draw_triton.draw_rows takes it."""

    temperature: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor
    top_p: torch.Tensor
    log_min_p: torch.Tensor

    def of_rows(self, index: torch.Tensor) -> RowLaw:
        """Of some rows only. index: int64."""
        return RowLaw(
            temperature=self.temperature[index],
            seeds=self.seeds[index],
            positions=self.positions[index],
            top_p=self.top_p[index],
            log_min_p=self.log_min_p[index],
        )

    def draw(self, logits: torch.Tensor) -> torch.Tensor:
        """logits [R, V] → int64 [2, R], on a device with kernels."""
        from l4core.sampling.draw_triton import draw_rows

        return draw_rows(logits, self.temperature, self.seeds, self.positions, self.top_p, self.log_min_p)

    def draw_over(self, logits: torch.Tensor, first_id: int, ranks: Ranks) -> torch.Tensor:
        """The same from this rank's logits [R, V / ranks] of the ids from first_id on; top-p and min-p are left out."""
        return draw_over_ranks(logits, self.temperature, self.seeds, self.positions, first_id, ranks)
