from __future__ import annotations

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
