from __future__ import annotations

import pytest
import torch

from experts.problem import make
from l4core.experts.portable import TorchExperts
from l4core.ops.router import route

CASES = {"one token": [3], "one expert": [2] * 9, "each its own": [0, 1, 2, 3, 4], "mixed": [4, 1, 1, 4, 2, 0, 4]}
CASES |= {"some elsewhere": [-1, 3, -1, 0, 3], "one and the rest elsewhere": [-1, 2], "all elsewhere": [-1, -1, -1]}
"""−1: another rank holds the expert."""


@pytest.mark.parametrize("ids", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("shared", [True, False])
def test_the_definition(ids: list[int], shared: bool) -> None:
    assert make(ids, 5, dtype=torch.float64, shared=shared).error(TorchExperts()) < 1e-6  # the score is float32


def test_bfloat16() -> None:
    assert make([1, 0, 1, 3], 4, dtype=torch.bfloat16).error(TorchExperts()) < 2e-2


def test_the_router_takes_the_lowest_of_equal_logits_and_scores_in_float32() -> None:
    weight = torch.eye(3, 4, dtype=torch.bfloat16)
    ids, score = route(torch.tensor([[1.0, 2.0, 2.0, 9.0], [0, 0, -3.0, 0]], dtype=torch.bfloat16), weight)
    assert ids.dtype == torch.int32
    assert ids.tolist() == [1, 0]
    torch.testing.assert_close(score, torch.tensor([2.0, 0.0]).sigmoid())
