from __future__ import annotations

import pytest
import torch

from l4core.ops.linear import SMALL_WEIGHT, _few_rows, _one_row, linear

FEW_ROWS = 64


def operands(
    rows: int, num_in: int, num_out: int, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((rows, num_in), (num_out, num_in))
    )


@pytest.mark.parametrize("rows", [1, 2, 3, FEW_ROWS, FEW_ROWS + 1, 3 * FEW_ROWS])
@pytest.mark.parametrize("shape", [(8, 12), (7, 5), (5, 1), (1, 16), (512, 520), (513, 519)])
def test_is_a_matrix_product(rows: int, shape: tuple[int, int]) -> None:
    x, weight = operands(rows, *shape)
    wanted = torch.einsum("tk,nk->tn", x, weight)
    torch.testing.assert_close(linear(x, weight), wanted)
    out = torch.full((rows + 2, shape[1]), torch.nan, dtype=x.dtype)
    linear(x, weight, out=out[1:-1])
    torch.testing.assert_close(out[1:-1], wanted)
    assert out[[0, -1]].isnan().all()


@pytest.mark.parametrize("rows", [1, 2, 3, FEW_ROWS])
@pytest.mark.parametrize("shape", [(8, 12), (7, 5), (5, 1), (1, 16), (512, 520)])
def test_both_thin_products_are_that_product_too(rows: int, shape: tuple[int, int]) -> None:
    """Called directly: `linear` takes them only on processors where they pay."""
    x, weight = operands(rows, *shape)
    wanted = torch.einsum("tk,nk->tn", x, weight)
    torch.testing.assert_close(_few_rows(x, weight), wanted)
    torch.testing.assert_close(_one_row(x[:1], weight), wanted[:1])
    transposed = weight.t().contiguous().t()
    torch.testing.assert_close(_few_rows(x, transposed), wanted)
    torch.testing.assert_close(_one_row(x[:1], transposed), wanted[:1])


def test_the_shapes_above_reach_both_sides_of_the_limit() -> None:
    assert 8 * 12 <= SMALL_WEIGHT < 512 * 520


@pytest.mark.parametrize("rows", [1, 6, FEW_ROWS + 6])
def test_strides_of_input_and_weight_are_free(rows: int) -> None:
    x, weight = operands(rows, 512, 520)
    wanted = torch.einsum("tk,nk->tn", x, weight)
    torch.testing.assert_close(linear(x.t().contiguous().t(), weight), wanted)
    torch.testing.assert_close(linear(torch.cat([x, x], dim=1)[:, :512], weight), wanted)
    torch.testing.assert_close(linear(x, weight.t().contiguous().t()), wanted)


@pytest.mark.parametrize("rows", [1, 5, FEW_ROWS + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keeps_the_dtype(rows: int, dtype: torch.dtype) -> None:
    x, weight = operands(rows, 32, 16, dtype)
    y = linear(x, weight)
    assert y.dtype == dtype
    torch.testing.assert_close(
        y.double(), x.double() @ weight.double().T, rtol=2e-2, atol=5e-2 if dtype != torch.float32 else 1e-4
    )
