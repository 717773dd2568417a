"""What ranks find out about each other before they start."""

from __future__ import annotations

import pytest
import torch

from l4core.errors import BackendUnavailable
from l4core.parallel.agree import check_sums, least
from l4core.parallel.ranks import Ranks
from l4core.testing.ranks.threads import run_ranks

CPU = torch.device("cpu")


def test_the_least_of_all_ranks() -> None:
    assert run_ranks(3, lambda ranks: least(ranks, 7 - 2 * ranks.rank, CPU)) == [3, 3, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_that_differ_in_a_bit_end_the_start(dtype: torch.dtype) -> None:
    """As they would if each rank added in an order of its own."""
    run_ranks(2, lambda ranks: check_sums(ranks, 64, dtype, CPU))

    def one_ulp(ranks: Ranks) -> None:
        own_sum = ranks._sum

        def careless(x: torch.Tensor) -> None:
            own_sum(x)
            if ranks.rank == 1 and x.shape[0] == 32:
                x[5, 7] = (
                    torch.nextafter(x[5, 7].float(), torch.tensor(9.0)) if dtype == torch.float32 else x[5, 7] * 1.01
                )

        ranks._sum = careless  # type: ignore[method-assign]
        check_sums(ranks, 64, dtype, CPU)

    with pytest.raises(BackendUnavailable, match=r"sums of 32 × 64 .* over 2 ranks differ between ranks"):
        run_ranks(2, one_ulp)
