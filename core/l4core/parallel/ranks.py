"""The ranks that compute one model together, as one of them sees the others: a sum and a gather, nothing else.

Tensor parallelism needs one `all_reduce` after attention and one after the feed-forward of each layer; a few small `all_gather`s carry what each
rank knows of its share of the vocabulary. Both may be called while a CUDA graph is captured, once a call before it has made the communicator.
Knows nothing of who started the ranks (parallel.rendezvous) nor of what they compute (model).
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Ranks:
    """This process's place among the ranks of one engine. All ranks make the same calls in the same order.

    rank: 0 … size − 1.  counts: calls made, by kind ("all_reduce", "all_gather"); a replayed graph counts nothing.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        """group: of torch.distributed, for tensors of the device the model is on; None = alone."""
        self._group = group
        self.rank = 0 if group is None else group.rank()
        self.size = 1 if group is None else group.size()
        self.counts: Counter[str] = Counter()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' x, the same bits on every rank. In place where x is contiguous; → where the sum is."""
        if self.size == 1:
            return x
        self.counts["all_reduce"] += 1
        x = x.contiguous()
        self._sum(x)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """x of every rank, in rank order: [size, *x.shape], new memory (a view of x where there is one rank). All ranks give the same shape."""
        if self.size == 1:
            return x.unsqueeze(0)
        self.counts["all_gather"] += 1
        out = x.new_empty((self.size, *x.shape))
        self._gather(x.contiguous(), out)
        return out

    def _sum(self, x: torch.Tensor) -> None:
        """Fills contiguous x with the sum."""
        from torch import distributed

        distributed.all_reduce(x, group=self._group)

    def _gather(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Fills out [size, *x.shape]."""
        from torch import distributed

        old = distributed.all_gather_into_tensor
        gather = getattr(distributed, "all_gather_single", old)  # its name from torch 2.13 on, where the old one warns
        gather(out.view(-1), x.view(-1), group=self._group)


ALONE = Ranks()
"""Rank 0 of 1: every call returns at once."""
