"""The expert kernel with every instruction set this CPU has: the definition, and rows that do not depend on their company."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch

from experts.problem import Problem, make
from l4_cpu.experts import CpuExperts
from l4_cpu.library import load

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = [torch.float32, torch.bfloat16]


def run(problem: Problem, instructions: str, threads: int = 2) -> torch.Tensor:
    """[T, H] of a kernel with a packed copy of the weights."""
    kernel, packed = prepared(problem, instructions, threads)
    return kernel.forward(problem.x, problem.ids, problem.score, packed.weights)


def prepared(problem: Problem, instructions: str, threads: int = 2) -> tuple[CpuExperts, Problem]:
    kernel = CpuExperts(load(instructions), threads)
    weights = {
        field.name: value.clone()
        for field in dataclasses.fields(problem.weights)
        if (value := getattr(problem.weights, field.name)) is not None
    }
    packed = dataclasses.replace(problem, weights=dataclasses.replace(problem.weights, **weights))
    kernel.prepare(packed.weights)
    return kernel, packed


def ids_of(num_rows: int, num_experts: int) -> Sequence[int]:
    return torch.randint(num_experts, (num_rows,), generator=torch.Generator().manual_seed(num_rows)).tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("hidden", "inter"), [(64, 48), (16, 16), (112, 160), (512, 256)])
@pytest.mark.parametrize("num_rows", [1, 2, 7, 13, 64, 300])
def test_equals_the_definition(each: str, dtype: torch.dtype, hidden: int, inter: int, num_rows: int) -> None:
    """Panels that are not full, groups of every number of rows a product takes, experts without rows."""
    problem = make(ids_of(num_rows, 5), 5, hidden=hidden, inter=inter, dtype=dtype)
    kernel, packed = prepared(problem, each)
    assert packed.error(kernel) < TOLERANCE[dtype]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("ids", [[-1, 2, -1, 0], [-1], [1, 1, 1]])
def test_rows_of_another_ranks_experts_and_no_shared_one(each: str, ids: list[int], shared: bool) -> None:
    problem = make(ids, 3, shared=shared)
    kernel, packed = prepared(problem, each)
    assert packed.error(kernel) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_alone_gets_the_bits_it_gets_among_others(each: str, dtype: torch.dtype) -> None:
    problem = make(ids_of(90, 3), 3, hidden=80, inter=96, dtype=dtype)
    kernel, packed = prepared(problem, each)
    together = kernel.forward(packed.x, packed.ids, packed.score, packed.weights)
    for row in range(0, 90, 7):
        one = slice(row, row + 1)
        alone = kernel.forward(packed.x[one], packed.ids[one], packed.score[one], packed.weights)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_rows", "num_experts"), [(1, 8), (3, 5), (6, 1), (90, 130)])
def test_norm_and_router_equal_the_definition(each: str, dtype: torch.dtype, num_rows: int, num_experts: int) -> None:
    """The update is a transposed view, as core's products may give it; two experts are alike, and the lower one is chosen."""
    generator = torch.Generator().manual_seed(num_rows)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    stream, update, weight = draw(num_rows, 80), draw(80, num_rows).t(), draw(80)
    router = torch.cat([draw(num_experts, 80)] * 2)
    wanted_stream = stream.clone().add_(update)
    wide = wanted_stream.double()
    wanted = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    kernel = CpuExperts(load(each), 2)
    normed, ids, score = kernel.norm_route(stream, update, weight, 1e-5, router)
    assert torch.equal(stream, wanted_stream)
    assert (normed - wanted).abs().max() < TOLERANCE[dtype]
    logits, best = (normed.double() @ router[:num_experts].double().t()).max(-1)
    assert torch.equal(ids, best.int())
    assert (score - logits.sigmoid()).abs().max() < 1e-5
    for row in range(0, num_rows, 13):
        one = slice(row, row + 1)
        nothing = torch.zeros(1, 80, dtype=dtype)
        alone = kernel.norm_route(stream[one], nothing, weight, 1e-5, router)
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, (normed, ids, score), strict=True))


@pytest.mark.parametrize("num_rows", [1, 9, 70])
def test_bits_do_not_depend_on_the_number_of_threads(built: str, num_rows: int) -> None:
    problem = make(ids_of(num_rows, 4), 4, hidden=208, inter=112)
    one, two, five = (run(problem, built, threads) for threads in (1, 2, 5))
    assert torch.equal(one, two)
    assert torch.equal(one, five)


def test_rows_may_lie_apart(built: str) -> None:
    problem = make([0, 1, 1], 2)
    kernel, packed = prepared(problem, built)
    apart = torch.full((3, 100), torch.nan)
    apart[:, :64] = packed.x
    assert dataclasses.replace(packed, x=apart[:, :64]).error(kernel) < TOLERANCE[torch.float32]


def test_what_is_not_finite_stays_in_its_row(built: str) -> None:
    problem = make([0, 0, 1, 0], 2)
    kernel, packed = prepared(problem, built)
    sound = kernel.forward(packed.x, packed.ids, packed.score, packed.weights)
    packed.x[1, 3] = torch.nan
    found = kernel.forward(packed.x, packed.ids, packed.score, packed.weights)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2, 3]], sound[[0, 2, 3]])


def test_a_weight_that_is_not_contiguous_is_refused(built: str) -> None:
    weights = make([0], 2).weights
    turned = dataclasses.replace(weights, down=weights.down.transpose(1, 2))
    with pytest.raises(ValueError, match="contiguous"):
        CpuExperts(load(built), 1).prepare(turned)
