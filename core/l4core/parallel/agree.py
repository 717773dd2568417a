"""What all ranks must have in common before they start, found out by asking them all."""

from __future__ import annotations

import torch

from l4core.errors import BackendUnavailable
from l4core.parallel.ranks import Ranks

ROWS = (1, 32, 1024)
"""Libraries add up small and large tensors in different ways."""


def least(ranks: Ranks, value: int, device: torch.device) -> int:
    """The smallest of all ranks' values. device: that of the ranks' tensors."""
    return int(ranks.all_gather(torch.tensor([value], dtype=torch.int64, device=device)).min())


def check_sums(ranks: Ranks, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raises BackendUnavailable unless a sum over ranks has the same bits on all of them: one ulp before a router sends a token to different experts
    on different ranks."""
    if ranks.size == 1:
        return
    for rows in ROWS:
        generator = torch.Generator().manual_seed(ranks.rank)
        own = torch.randn(rows, hidden_size, generator=generator).to(device, dtype)
        total = ranks.all_reduce(own)
        words = total.view(torch.int16 if dtype.itemsize == 2 else torch.int32)  # bits, as numbers that add up exactly
        place = torch.arange(1, words.numel() + 1, device=device).view(words.shape)
        sums = ranks.all_gather((words.to(torch.int64) * place).sum().view(1))
        if int(sums.min()) != int(sums.max()):
            raise BackendUnavailable(
                f"sums of {rows} × {hidden_size} {dtype} over {ranks.size} ranks differ between ranks in their last bits",
                fix="NCCL_ALGO=Ring in the environment of all ranks",
            )
