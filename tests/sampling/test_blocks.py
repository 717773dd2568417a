"""One transfer for many small tensors, and blocks that bound memory."""

import torch

from l4core.sampling.blocks import Outbox, blocks, rows_per_block


def test_outbox_returns_what_was_added() -> None:
    outbox = Outbox()
    added = [torch.tensor([1.5, -0.0, torch.nan, torch.inf]), torch.tensor([[2**31 - 1], [-7]]), torch.empty(3, 0)]
    for tensor in (*added, torch.arange(6).reshape(2, 3).t().float()):
        outbox.add(tensor)
    floats, ints, nothing, turned = outbox.fetch()
    assert floats.tobytes() == added[0].numpy().tobytes()
    assert ints.tolist() == [[2**31 - 1], [-7]]
    assert nothing.shape == (3, 0)
    assert turned.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert Outbox().fetch() == []


def test_blocks_cover_the_rows_in_order() -> None:
    assert list(blocks([4, 1, 3, 2, 0], 2)) == [[4, 1], [3, 2], [0]]
    assert list(blocks([], 2)) == []


def test_blocks_bound_memory() -> None:
    assert rows_per_block(torch.empty(1, 202_048, device="meta")) * 202_048 <= 2**24
    assert rows_per_block(torch.empty(1, 202_048)) == 5
    assert rows_per_block(torch.empty(1, 2**21)) == 1
