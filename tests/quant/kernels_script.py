"""Compares the kernels for quantised weights with the definition on `sys.argv[1]`: "cpu" under Triton's interpreter, or "cuda".
More arguments name single checks."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))

from l4core.experts.quantised_tiles import Tile, Tiles
from l4core.experts.quantised_triton import Fp8Experts, Int4Experts, QuantisedExperts
from l4core.ops.quantise_rows import quantise_rows
from l4core.quant import fp8, int4, linear
from l4core.quant.formats import FP8, INT4
from quant.expert_problem import Problem, make

DEVICE = sys.argv[1]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2 if DEVICE == "cpu" else 6e-3, torch.float16: 2e-3}
"""Of the norm. bfloat16: its own rounding of the intermediate and of the result, which the interpreter cuts off instead of rounding."""
DTYPES = list(TOLERANCE)
few_examples = settings(
    max_examples=4 if DEVICE == "cpu" else 2,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # shrinking takes minutes here
    suppress_health_check=list(HealthCheck),
)


@st.composite
def routings(draw: st.DrawFn, most: int) -> tuple[list[int], int]:
    """(expert of each token, −1 where another rank holds it, number of experts); some are left empty, often all tokens have one."""
    num_experts = draw(st.sampled_from([1, 3, 16]))
    used = draw(st.lists(st.integers(-1, num_experts - 1), min_size=1, max_size=4))
    return draw(st.lists(st.sampled_from(used), min_size=1, max_size=most)), num_experts


def error(problem: Problem, kernel: QuantisedExperts, tiles: Tiles) -> float:
    out = kernel.run(problem.x, problem.ids, problem.score, problem.weights, tiles)
    assert out.dtype == problem.x.dtype
    assert not kernel.counters.any()
    return float((out.double().cpu() - problem.expected).norm() / problem.expected.norm().clamp(min=1e-30))


KERNELS = {INT4: Int4Experts, FP8: Fp8Experts}
formats = st.sampled_from(list(KERNELS))


@few_examples
@given(
    routing=routings(12),
    dtype=st.sampled_from(DTYPES),
    parts=st.sampled_from([1, 2, 4]),
    hidden=st.sampled_from([128, 256, 320]),
    ratio=st.booleans(),
)
def few(
    kept: str, shared: bool, routing: tuple[list[int], int], dtype: torch.dtype, parts: int, hidden: int, ratio: bool
) -> None:
    problem = make(kept, *routing, hidden=hidden, inter=192, dtype=dtype, shared=shared, device=DEVICE)
    tile = Tile(rows=16, columns=64, parts=parts, ratio=ratio)
    tiles = Tiles(gate_up=tile, down=tile, shared_gate_up=tile, shared_down=tile, few=True)
    assert error(problem, KERNELS[kept](DEVICE), tiles) < TOLERANCE[dtype]


@few_examples
@given(
    routing=routings(70),
    dtype=st.sampled_from(DTYPES),
    rows=st.sampled_from([8, 16, 32]),
    ratio=st.booleans(),
    sizes=st.sampled_from([(256, 64), (128, 256)]),
)
def many(
    kept: str,
    shared: bool,
    routing: tuple[list[int], int],
    dtype: torch.dtype,
    rows: int,
    ratio: bool,
    sizes: tuple[int, int],
) -> None:
    ids, num_experts = routing
    ids = ids * (1 + 40 // len(ids))  # more than one tile of some expert
    hidden, inter = sizes
    problem = make(kept, ids, num_experts, hidden=hidden, inter=inter, dtype=dtype, shared=shared, device=DEVICE)
    one, sharing = Tile(rows=rows, ratio=ratio), Tile(rows=rows, parts=2, ratio=ratio)
    tiles = Tiles(gate_up=sharing, down=sharing, shared_gate_up=sharing, shared_down=one)
    assert error(problem, KERNELS[kept](DEVICE), tiles) < TOLERANCE[dtype]


def chosen_tiles(kept: str, shared: bool) -> None:
    """The tiles that are chosen on either side of every limit, registers with them."""
    for tokens in (1, 5, 9, 17, 33, 130):
        ids = [(7 * i) % 3 for i in range(tokens)]
        problem = make(kept, ids, 4, hidden=256, inter=128, dtype=torch.bfloat16, shared=shared, device=DEVICE)
        kernel = KERNELS[kept](DEVICE)
        tiles = kernel.tiles(tokens, 4)
        assert error(problem, kernel, tiles) < (0.08 if tiles.eight else TOLERANCE[torch.bfloat16]), tokens


@few_examples
@given(routing=routings(70), dtype=st.sampled_from(DTYPES), shared=st.booleans())
def rows_in_eight_bits(routing: tuple[list[int], int], dtype: torch.dtype, shared: bool) -> None:
    """x and the intermediate are rounded to e4m3, a sixteenth of each number at most."""
    problem = make(FP8, *routing, hidden=256, inter=128, dtype=dtype, shared=shared, device=DEVICE)
    tile = Tile(rows=16, warps=4)
    tiles = Tiles(gate_up=tile, down=tile, shared_gate_up=tile, shared_down=tile, eight=True)
    assert error(problem, Fp8Experts(DEVICE), tiles) < 0.08


@few_examples
@given(num_rows=st.integers(1, 20), size=st.sampled_from([64, 200]), dtype=st.sampled_from(DTYPES))
def rows(num_rows: int, size: int, dtype: torch.dtype) -> None:
    x = (torch.randn(num_rows, size) * 10 ** torch.randn(num_rows, 1)).to(dtype)
    made, scale = quantise_rows(x.to(DEVICE))
    want, want_scale = fp8.quantize(x)
    assert torch.allclose(scale.cpu(), want_scale, rtol=1e-6)
    assert ((made.cpu().float() - want.float()).abs() <= want.float().abs() / 7).all()
    assert (made.cpu().float() != want.float()).float().mean() < 0.02  # a quotient's last bit


@few_examples
@given(kept=formats, num_rows=st.integers(1, 100), dtype=st.sampled_from(DTYPES))
def linear_layers(kept: str, num_rows: int, dtype: torch.dtype) -> None:
    """On a CPU the launches are called directly; there `fp8_linear` itself is torch's definition."""
    generator = torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, 256, generator=generator).to(dtype)
    weight = torch.randn(192, 256, generator=generator) / 16
    module, launch = (fp8, linear._fp8_few) if kept == FP8 else (int4, linear._int4)
    if DEVICE == "cuda":
        launch = linear.fp8_linear if kept == FP8 else linear.int4_linear
    made, scale = module.quantize(weight)
    plain = fp8.dequantize(made, scale) if kept == FP8 else int4.dequantize(made, scale, 256)
    want = x.double() @ plain.double().t()
    got = launch(x.to(DEVICE), made.to(DEVICE), scale.to(DEVICE)).double().cpu()
    eight = kept == FP8 and num_rows > linear.FEW_ROWS and DEVICE == "cuda" and dtype == torch.bfloat16
    assert (got - want).norm() < (0.04 if eight else TOLERANCE[dtype]) * want.norm()


if __name__ == "__main__":
    wanted = sys.argv[2:] or [
        "few",
        "many",
        "chosen_tiles",
        "rows_in_eight_bits",
        "linear_layers",
        *(["rows"] if DEVICE == "cuda" else []),
    ]
    for name in wanted:
        check = globals()[name]
        for chosen in itertools.product(KERNELS, (False, True)) if name in ("few", "many", "chosen_tiles") else [()]:
            check(*chosen)
        print(name)
