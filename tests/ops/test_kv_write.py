from __future__ import annotations

import pytest
import torch

from l4core.ops.kv_write import kv_write


def test_writes_the_given_slots_and_nothing_else() -> None:
    buffer = torch.zeros(4, 3, 2, 5, 2, 3)  # [pages, layers, k/v, P, Hkv, D]
    pages = buffer[:, 1]
    kv = torch.arange(1.0, 37.0).view(3, 2, 2, 3)
    kv_write(pages, kv, torch.tensor([3, 1, 3]), torch.tensor([0, 4, 2]))
    for token, (page, offset) in enumerate([(3, 0), (1, 4), (3, 2)]):
        assert torch.equal(buffer[page, 1, 0, offset], kv[token, 0])
        assert torch.equal(buffer[page, 1, 1, offset], kv[token, 1])
    assert buffer.count_nonzero() == kv.numel()


def test_a_slice_of_wider_rows_in_another_dtype() -> None:
    rows = torch.randn(2, 10, 3, generator=torch.Generator().manual_seed(0))
    pages = torch.zeros(2, 2, 4, 2, 3, dtype=torch.bfloat16)
    kv_write(pages, rows[:, 6:].view(2, 2, 2, 3), torch.tensor([1, 0]), torch.tensor([3, 0]))
    assert torch.equal(pages[1, 1, 3], rows[0, 8:].bfloat16())
    assert torch.equal(pages[0, 0, 0], rows[1, 6:8].bfloat16())


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_write_divides_saturates_and_rounds_to_even(name: str, scaled: bool) -> None:
    """Against the nearest of all the format's values, ties to the even code, over small, large, infinite and NaN inputs."""
    dtype: torch.dtype = getattr(torch, name)
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    grid = codes[codes.isfinite()].unique().double()
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(64, 2, 2, 8, generator=draw) * torch.logspace(-6, 5, 64)[:, None, None, None]
    x[0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    x[1, 0, 0, 0], x[1, 1, 0, 0] = (grid[5:7].mean().item(),) * 2  # half way
    scales = (torch.tensor(0.37), torch.tensor(1.9)) if scaled else (None, None)
    pages = torch.zeros(5, 3, 2, 16, 2, 8).to(dtype)[:, 1]
    page_ids, offsets = torch.arange(64) // 16 + 1, torch.arange(64) % 16
    kv_write(pages, x, page_ids, offsets, *scales)
    found = pages[page_ids, :, offsets].double()
    wanted = x.clone()
    for which, scale in enumerate(scales):
        if scale is not None:
            wanted[:, which] /= scale
    wanted = wanted.clamp(grid.min().item(), grid.max().item()).double()
    assert found.isnan().equal(wanted.isnan())
    error, gap = (found - wanted).abs().nan_to_num(), (wanted.nan_to_num()[..., None] - grid).abs().amin(-1)
    assert torch.equal(error, gap), "not the nearest value"
    assert pages[0].float().count_nonzero() == 0


def test_offsets_are_64_bit() -> None:
    """The last page begins 4.3 · 10⁹ elements in; the buffer is reserved, not touched, and one byte an element."""
    page_elements, num_pages = 2 * 64 * 8 * 128, 32_770
    pages = torch.empty(num_pages, 2, 64, 8, 128, dtype=torch.uint8)
    assert (num_pages - 1) * page_elements > 2**32
    for page in (1, num_pages - 1):
        pages[page].zero_()
    kv = torch.full((1, 2, 8, 128), 9, dtype=torch.uint8)
    kv_write(pages, kv, torch.tensor([num_pages - 1]), torch.tensor([63]))
    assert (pages[num_pages - 1, :, 63] == 9).all()
    assert pages[num_pages - 1].count_nonzero() == kv.numel()
    assert pages[1].count_nonzero() == 0
