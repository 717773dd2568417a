"""Ranks of one engine as threads of this process, so that a test of tensor parallelism needs no processes and can look at every rank."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from l4core.parallel.ranks import Ranks

T = TypeVar("T")
TIMEOUT_S = 60.0
"""A rank that waits longer for another one ends the test."""


class _Meeting:
    """Where the ranks leave what they bring; all come, then all read, then all go."""

    def __init__(self, size: int) -> None:
        self.brought: list[torch.Tensor | None] = [None] * size
        self.barrier = threading.Barrier(size, timeout=TIMEOUT_S)


class ThreadRanks(Ranks):
    """One rank among threads. Sums are added in rank order, so all ranks get the same bits."""

    def __init__(self, rank: int, size: int, meeting: _Meeting) -> None:
        super().__init__()
        self.rank, self.size = rank, size
        self._meeting = meeting

    def _sum(self, x: torch.Tensor) -> None:
        total = torch.stack(self._bring(x)).sum(dim=0)
        self._meeting.barrier.wait()
        x.copy_(total)

    def _gather(self, x: torch.Tensor, out: torch.Tensor) -> None:
        torch.stack(self._bring(x), out=out)
        self._meeting.barrier.wait()

    def _bring(self, x: torch.Tensor) -> list[torch.Tensor]:
        self._meeting.brought[self.rank] = x
        self._meeting.barrier.wait()
        return [one for one in self._meeting.brought if one is not None]


def run_ranks(size: int, call: Callable[[Ranks], T]) -> list[T]:
    """call(ranks) on `size` threads at once → what each rank returned, in rank order. The first error of a rank is raised, the others are let go."""
    meeting = _Meeting(size)

    def one(rank: int) -> T:
        try:
            return call(ThreadRanks(rank, size, meeting))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size, thread_name_prefix="rank") as pool:
        futures = [pool.submit(one, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    if errors:
        raise errors[0]
    return [future.result() for future in futures]
