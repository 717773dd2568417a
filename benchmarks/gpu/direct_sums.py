"""Sums of few numbers over GPUs that see each other's memory: every rank reads all summands and adds them up in rank order, in one launch.

A ring of n ranks takes 2 (n − 1) turns, and for the few kilobytes of a decode step each turn is latency. Here there are two signals and no turn. The
bits are the same on all ranks since all add in the same order. Larger tensors go the library's way, which moves fewer bytes.
Not used by the engine: docs/decisions/025-ranks-and-the-model.md says why; `tp.py --sums nccl,direct` measures both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from l4core.parallel.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LARGEST = 512 << 10
"""Bytes of the largest tensor that is summed so."""


class DirectRanks(Ranks):
    """On NVIDIA and AMD GPUs of one machine. RuntimeError where they cannot map each other's memory."""

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        """group: of torch.distributed, over `device`s of one machine."""
        from torch.distributed import _symmetric_memory as symmetric

        super().__init__(group)
        self._name = group.group_name
        self._memory = symmetric.empty(LARGEST, dtype=torch.uint8, device=device)
        symmetric.rendezvous(self._memory, group)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """As Ranks'; of a small x the sum is in new memory."""
        if x.nbytes > LARGEST or x.dtype not in (torch.bfloat16, torch.float16, torch.float32) or x.nbytes % 16:
            return super().all_reduce(x)
        self.counts["all_reduce"] += 1
        shared = self._memory[: x.nbytes].view(x.dtype)
        total: torch.Tensor = torch.ops.symm_mem.one_shot_all_reduce_copy(
            shared, x.contiguous().view(-1), "sum", self._name
        )
        return total.view(x.shape)
