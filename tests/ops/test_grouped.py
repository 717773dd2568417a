from __future__ import annotations

import pytest
import torch

from l4core.ops.grouped import JOIN_ROWS, _every_expert, group_rows, grouped_linear

E, K, N = 5, 16, 24


def weights(dtype: torch.dtype = torch.float64, *, out_by_in: bool = True) -> torch.Tensor:
    weight = torch.randn(E, K, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    return weight.transpose(1, 2).contiguous().transpose(1, 2) if out_by_in else weight


def rows(experts: list[int], dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(len(experts), K, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    return x, torch.tensor(experts)


CASES = [[3], [0, 0], [4, 1, 1, 4, 2], [2] * 7, list(range(5)) * 3, [0] * (JOIN_ROWS + 9) + [4, 3] * 3]


@pytest.mark.parametrize("experts", CASES, ids=len)
@pytest.mark.parametrize("out_by_in", [True, False])
def test_every_row_meets_its_own_expert(experts: list[int], out_by_in: bool) -> None:
    (x, ids), weight = rows(experts), weights(out_by_in=out_by_in)
    groups = group_rows(ids, E)
    wanted = torch.stack([x[t] @ weight[e] for t, e in enumerate(experts)])
    torch.testing.assert_close(groups.unpack(grouped_linear(groups.pack(x), weight, groups)), wanted)


@pytest.mark.parametrize("experts", [*CASES, [-1, 3, 3, -1]], ids=len)
def test_small_groups_are_filled_up_with_their_own_rows(experts: list[int]) -> None:
    (x, ids), least = rows(experts), 4
    groups = group_rows(ids, E, least)
    packed = groups.pack(x)
    assert groups.spans is not None
    assert sum(count for _, count in groups.spans) == len(packed)
    assert torch.equal(groups.unpack(packed), x)
    for expert, piece in zip(groups.spans, torch.split(packed, [count for _, count in groups.spans]), strict=True):
        mine = x[ids == expert[0]]
        assert torch.equal(piece[: len(mine)], mine)
        assert len(piece) == max(least, len(mine))
        assert (piece[len(mine) :] == mine[0]).all()


def test_only_experts_that_were_hit_are_read() -> None:
    (x, ids), weight = rows([4, 1, 1]), weights()
    weight[[0, 2, 3]] = torch.nan
    groups = group_rows(ids, E)
    assert groups.spans == ((4, 1), (1, 2))
    assert grouped_linear(groups.pack(x), weight, groups).isfinite().all()


@pytest.mark.parametrize("experts", CASES, ids=len)
def test_the_accelerators_path_without_grouped_mm(experts: list[int]) -> None:
    x, ids = rows(sorted(experts))
    wanted = torch.stack([x[t] @ weights()[e] for t, e in enumerate(ids.tolist())])
    torch.testing.assert_close(_every_expert(x, weights(), ids), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_an_accelerator_nothing_is_read_back(dtype: torch.dtype) -> None:
    """The meta device stands for one: a read of a value raises there."""
    x, ids, weight = (
        torch.empty(9, K, dtype=dtype, device="meta"),
        torch.empty(9, dtype=torch.int64, device="meta"),
        weights(dtype).to("meta"),
    )
    groups = group_rows(ids, E)
    assert groups.spans is None
    assert groups.unpack(grouped_linear(groups.pack(x), weight, groups)).shape == (9, N)


@pytest.mark.parametrize("experts", CASES, ids=len)
def test_grouped_mm_with_our_group_ends_equals_the_loop(experts: list[int]) -> None:
    """bfloat16 on an accelerator takes torch's grouped_mm; torch has it on a CPU too, so the group ends can be checked here."""
    from l4core.ops.grouped import group_ends

    x, ids = rows(sorted(experts), torch.bfloat16)
    weight = weights(torch.bfloat16)
    found = torch.nn.functional.grouped_mm(x, weight, offs=group_ends(ids, E))
    wanted = torch.stack([x[t] @ weight[e] for t, e in enumerate(ids.tolist())])
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=5e-2)
