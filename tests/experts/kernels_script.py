"""Compares the Triton router and experts with the definition on `sys.argv[1]`: "cpu" under Triton's interpreter, or "cuda"."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))

from experts.problem import make
from l4core.experts.fused import TritonExperts
from l4core.experts.sorted_triton import sort_by_expert
from l4core.experts.tiles import Row, Tile, Tiles, tiles_for
from l4core.ops.router import route_torch
from l4core.ops.router_triton import route_triton

DEVICE = sys.argv[1]
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
EXPERTS = [1, 2, 5, 16, 33] if DEVICE == "cpu" else [5, 16]  # on a device each is compiled anew
few_examples = settings(
    max_examples=25 if DEVICE == "cpu" else 12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
dtypes = st.sampled_from(list(TOLERANCE))
TILES: list[dict[str, int]] = [
    {"rows": 16},
    {"rows": 32},
    {"rows": 32, "half": 16},
    {"rows": 32, "extra": 16},
    {"rows": 32, "half": 16, "extra": 16},
]


@st.composite
def routings(draw: st.DrawFn, most: int) -> tuple[list[int], int]:
    """(expert of each token, −1 where another rank holds it, number of experts); some are left empty, often all tokens have one."""
    num_experts = draw(st.sampled_from(EXPERTS))
    used = draw(st.lists(st.integers(-1, num_experts - 1), min_size=1, max_size=4))
    ids = draw(st.lists(st.sampled_from(used), min_size=1, max_size=most))
    return ids, num_experts


def kernel(*, few: bool, rows: int, columns: int = 32, **options: int) -> TritonExperts:
    """options: of the tile."""
    tile = Tile(rows=rows, columns=columns, inputs=32, warps=4, stages=2, group=2, **options)
    return TritonExperts(Tiles(rows=(Row(tokens=1 << 30, few=few, gate_up=tile, down=tile),)))


@few_examples
@given(routing=routings(16), dtype=dtypes, shared=st.booleans(), swap=st.booleans(), hidden=st.sampled_from([64, 80]))
def few(routing: tuple[list[int], int], dtype: torch.dtype, shared: bool, swap: bool, hidden: int) -> None:
    ids, num_experts = routing
    problem = make(ids, num_experts, hidden=hidden, dtype=dtype, shared=shared, device=DEVICE)
    assert problem.error(kernel(few=True, rows=16, swap=swap)) < TOLERANCE[dtype]


@few_examples
@given(routing=routings(1), dtype=dtypes, shared=st.booleans(), hidden=st.sampled_from([64, 80]))
def one(routing: tuple[list[int], int], dtype: torch.dtype, shared: bool, hidden: int) -> None:
    """Inputs that a step divides and that it does not."""
    ids, num_experts = routing
    problem = make(ids[:1], num_experts, hidden=hidden, dtype=dtype, shared=shared, device=DEVICE)
    assert problem.error(kernel(few=True, rows=1, columns=4)) < TOLERANCE[dtype]


@few_examples
@given(
    routing=routings(150),
    dtype=dtypes,
    shared=st.booleans(),
    tile=st.sampled_from(TILES),
    hidden=st.sampled_from([64, 80]),
    tma=st.booleans(),
)
def many(routing: tuple[list[int], int], dtype: torch.dtype, shared: bool, tile: dict, hidden: int, tma: bool) -> None:
    ids, num_experts = routing
    problem = make(ids, num_experts, hidden=hidden, dtype=dtype, shared=shared, device=DEVICE)
    assert problem.error(kernel(few=False, **(tile | {"tma": tma or "extra" in tile}))) < TOLERANCE[dtype]


def blocks_of_every_size() -> None:
    """Numbers of rows at the borders of whole, half and longer blocks, in one call and in a random order."""
    counts = (15, 16, 17, 32, 33, 48, 49, 0, 64, 65, 97)
    ids = [expert for expert, count in enumerate(counts) for _ in range(count)]
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0)).tolist()
    problem = make([ids[i] for i in order], len(counts), dtype=torch.bfloat16, device=DEVICE)
    for tile in TILES:
        for tma in (False, True):
            if tma or "extra" not in tile:
                assert problem.error(kernel(few=False, **tile, tma=tma)) < TOLERANCE[torch.bfloat16], (tile, tma)


def float32_bits_do_not_depend_on_the_batch() -> None:
    """On a device; the interpreter adds as numpy does."""
    if DEVICE == "cpu":
        return
    generator = torch.Generator().manual_seed(1)
    problem = make(torch.randint(5, (40,), generator=generator).tolist(), 5, hidden=320, inter=256, device=DEVICE)
    chosen = TritonExperts(tiles_for("sm90", 5, 320, 256, "float32"))

    def run(rows: slice) -> torch.Tensor:
        return chosen.forward(problem.x[rows], problem.ids[rows], problem.score[rows], problem.weights)

    whole = run(slice(None))
    for rows in (slice(0, 1), slice(39, 40), slice(3, 19), slice(2, 30)):
        assert run(rows).equal(whole[rows]), rows


def only_hit_experts_are_read() -> None:
    problem = make([4, 1, 1], 6, device=DEVICE)
    for weight in (problem.weights.gate_up, problem.weights.down):
        weight[[0, 2, 3, 5]] = torch.nan
    assert problem.error(kernel(few=True, rows=16)) < 3e-6
    assert problem.error(kernel(few=False, rows=16)) < 3e-6


@few_examples
@given(routing=routings(400))
def sort(routing: tuple[list[int], int]) -> None:
    ids, num_experts = routing
    order, ends = sort_by_expert(torch.tensor(ids, dtype=torch.int32, device=DEVICE), num_experts)
    assert order.tolist() == sorted(range(len(ids)), key=lambda t: ids[t] % (num_experts + 1))
    counts = [ids.count(e) for e in range(num_experts)]
    assert ends.tolist() == [sum(counts[: e + 1]) for e in range(num_experts)]


@few_examples
@given(
    tokens=st.integers(1, 40),
    experts=st.sampled_from([1, 4, 16, 40]),
    hidden=st.sampled_from([48, 640, 700]),
    dtype=dtypes,
    seed=st.integers(0, 1000),
)
def router(tokens: int, experts: int, hidden: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(n, hidden, generator=generator).to(dtype).to(DEVICE) for n in (tokens, experts))
    ids, score = route_triton(x, weight)
    logits = x.double() @ weight.double().T
    chosen = logits.gather(1, ids.long().unsqueeze(1)).squeeze(1)
    assert (logits.amax(1) - chosen).max() <= 1e-4 * hidden**0.5  # a tie within rounding may go either way
    torch.testing.assert_close(score.double(), chosen.sigmoid(), atol=1e-4, rtol=1e-4)
    if dtype == torch.float32:
        assert (ids != route_torch(x, weight)[0]).sum() == 0
    alone = [route_triton(x[t : t + 1], weight) for t in range(min(tokens, 3))]  # bit for bit what the batch gives
    assert [int(i) for i, _ in alone] == ids[:3].tolist()
    assert torch.cat([s for _, s in alone]).equal(score[:3])


def router_ties() -> None:
    x = torch.zeros(3, 64, device=DEVICE)
    ids, score = route_triton(x, torch.randn(5, 64, device=DEVICE))
    assert ids.tolist() == [0, 0, 0]
    assert score.tolist() == [0.5] * 3


CHECKS = (
    few,
    one,
    many,
    blocks_of_every_size,
    float32_bits_do_not_depend_on_the_batch,
    only_hit_experts_are_read,
    sort,
    router,
    router_ties,
)

if __name__ == "__main__":
    for check in CHECKS:
        check()
    print(" ".join(check.__name__ for check in CHECKS))
