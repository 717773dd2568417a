"""Compares the kernels for quantised weights with the definition on `sys.argv[1]`: "cpu" under Triton's interpreter, or "cuda"."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))

from l4core.experts.int4_tiles import Int4Tile, Int4Tiles
from l4core.experts.int4_triton import Int4Experts
from l4core.quant.formats import INT4
from quant.expert_problem import Problem, make

DEVICE = sys.argv[1]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2 if DEVICE == "cpu" else 6e-3, torch.float16: 2e-3}
"""Of the norm. bfloat16: its own rounding of the intermediate and of the result, which the interpreter cuts off instead of rounding."""
DTYPES = list(TOLERANCE)
few_examples = settings(
    max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@st.composite
def routings(draw: st.DrawFn, most: int) -> tuple[list[int], int]:
    """(expert of each token, number of experts); some experts are left empty, often all tokens have one."""
    num_experts = draw(st.sampled_from([1, 3, 16]))
    used = draw(st.lists(st.integers(0, num_experts - 1), min_size=1, max_size=4))
    return draw(st.lists(st.sampled_from(used), min_size=1, max_size=most)), num_experts


def check_int4(problem: Problem, tile: Int4Tile, down: Int4Tile) -> None:
    kernel = Int4Experts(DEVICE, inline_asm=DEVICE == "cuda")
    tiles = Int4Tiles(gate_up=tile, down=down, shared_gate_up=tile, shared_down=down)

    class Tiled(Int4Experts):
        def __init__(self) -> None:
            self.__dict__.update(vars(kernel))

        def forward(self, *args):  # type: ignore[no-untyped-def]
            return self.run(*args, tiles)

    assert problem.error(Tiled()) < TOLERANCE[problem.x.dtype]
    assert not kernel.counters.any()


@few_examples
@given(
    routing=routings(12),
    dtype=st.sampled_from(DTYPES),
    shared=st.booleans(),
    parts=st.sampled_from([1, 2, 4]),
    hidden=st.sampled_from([128, 256, 320]),
    ratio=st.booleans(),
)
def int4_few(
    routing: tuple[list[int], int], dtype: torch.dtype, shared: bool, parts: int, hidden: int, ratio: bool
) -> None:
    problem = make(INT4, *routing, hidden=hidden, inter=192, dtype=dtype, shared=shared, device=DEVICE)
    tile = Int4Tile(rows=16, columns=64, parts=parts, ratio=ratio)
    check_int4(problem, tile, tile)


@few_examples
@given(
    routing=routings(70),
    dtype=st.sampled_from(DTYPES),
    shared=st.booleans(),
    parts=st.sampled_from([1, 2]),
    rows=st.sampled_from([8, 16, 32]),
    ratio=st.booleans(),
)
def int4_many(
    routing: tuple[list[int], int], dtype: torch.dtype, shared: bool, parts: int, rows: int, ratio: bool
) -> None:
    ids, num_experts = routing
    ids = ids * (1 + 17 // len(ids))
    problem = make(INT4, ids, num_experts, hidden=256, inter=64, dtype=dtype, shared=shared, device=DEVICE)
    one = Int4Tile(rows=rows, ratio=ratio)
    kernel = Int4Experts(DEVICE, inline_asm=DEVICE == "cuda")
    sharing = Int4Tile(rows=rows, parts=parts, ratio=ratio)
    tiles = Int4Tiles(gate_up=one, down=one, shared_gate_up=sharing, shared_down=sharing)
    out = kernel.run(problem.x, problem.ids, problem.score, problem.weights, tiles)
    error = (out.double().cpu() - problem.expected).norm() / problem.expected.norm()
    assert error < TOLERANCE[dtype]


if __name__ == "__main__":
    int4_few()
    int4_many()
    print("ok")
