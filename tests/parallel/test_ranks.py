"""Sums and gathers over ranks: alone, as threads, and as real processes over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.rank_processes import run_processes
from l4core.parallel.ranks import ALONE, Ranks
from l4core.testing.ranks.threads import run_ranks


def test_alone_every_call_returns_at_once() -> None:
    x = torch.arange(6.0).view(2, 3)
    assert ALONE.all_reduce(x) is x
    assert ALONE.all_gather(x).shape == (1, 2, 3)
    assert not ALONE.counts


def sums(ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, int]]:
    x = torch.linspace(0.1, 1.0, 7) / (ranks.rank + 1)
    total = ranks.all_reduce(x.clone())
    transposed = ranks.all_reduce(torch.full((3, 2), 1.0 + ranks.rank, dtype=torch.bfloat16).t())
    gathered = ranks.all_gather(torch.tensor([[ranks.rank, 7]]))
    return total, transposed, gathered, dict(ranks.counts)


def check(found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, int]]]) -> None:
    size = len(found)
    expected = torch.linspace(0.1, 1.0, 7) * sum(1 / (r + 1) for r in range(size))
    for total, transposed, gathered, counts in found:
        assert torch.equal(total, found[0][0])  # the same bits everywhere
        torch.testing.assert_close(total, expected)
        assert (transposed == size * (size + 1) / 2).all()
        assert transposed.shape == (2, 3)
        assert gathered.tolist() == [[[r, 7]] for r in range(size)]
        assert counts == {"all_reduce": 2, "all_gather": 1}


@pytest.mark.parametrize("size", [2, 8])
def test_threads(size: int) -> None:
    check(run_ranks(size, sums))


def test_an_error_of_one_thread_ends_all() -> None:
    def fail(ranks: Ranks) -> None:
        if ranks.rank == 1:
            raise ValueError("rank 1 fails")
        ranks.all_reduce(torch.ones(1))

    with pytest.raises(ValueError, match="rank 1 fails"):
        run_ranks(3, fail)


@pytest.mark.parametrize("size", [2, 8])
def test_processes(size: int, tmp_path: Path) -> None:
    check(run_processes(size, sums, tmp_path))
