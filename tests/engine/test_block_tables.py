"""The persistent block tables: what stands in a row, and what no longer does."""

from __future__ import annotations

import numpy as np
import torch

from l4core import SamplingParams
from l4core.engine.batch import NewPages, ScheduledSequence
from l4core.engine.block_tables import BlockTables
from l4core.kv.blocks import KVGroup
from l4core.request import Request

PAGE, CHUNK = 2, 8
GROUPS = (
    KVGroup(name="global", layer_ids=(0,), chunk_size=None),
    KVGroup(name="local", layer_ids=(1,), chunk_size=CHUNK),
)


def tables() -> BlockTables:
    return BlockTables(GROUPS, page_size=PAGE, max_running=2, max_context=40, device=torch.device("cpu"))


def write(tables: BlockTables, name: str, first_index: int, pages: list[int]) -> None:
    request = Request(
        request_id="a", prompt_token_ids=[1], params=SamplingParams(), eos_token_ids=(), max_total_tokens=40
    )
    new = {name: NewPages(first_index=first_index, pages=pages)}
    tables.write(
        [ScheduledSequence(request=request, row=1, start=0, token_ids=[1], new_pages=new, draws=True, is_decode=False)]
    )


def row(tables: BlockTables, name: str) -> list[int]:
    found: list[int] = tables.rows(name, np.array([1]), 1000)[0].tolist()
    return found


def test_a_row_has_no_pages_of_the_sequence_that_had_it_before() -> None:
    t = tables()
    for name in ("global", "local"):
        write(t, name, 0, [5, 6, 7, 8])
        write(t, name, 0, [9])
    assert row(t, "global") == [9] + [0] * 19
    assert row(t, "local")[:4] == [9, 0, 0, 0]


def test_later_pages_of_a_sequence_leave_its_earlier_ones_alone() -> None:
    t = tables()
    write(t, "global", 0, [5, 6])
    write(t, "global", 2, [7])
    assert row(t, "global") == [5, 6, 7] + [0] * 17


def test_a_new_chunk_has_no_pages_of_the_one_two_before() -> None:
    t = tables()
    for chunk in range(3):
        write(t, "local", 4 * chunk, [10 * chunk + k for k in range(1, 5)])
    assert row(t, "local") == [21, 22, 23, 24, 11, 12, 13, 14]
    write(t, "local", 12, [31])
    assert row(t, "local") == [21, 22, 23, 24, 31, 0, 0, 0]
    write(t, "local", 13, [32, 33])
    assert row(t, "local") == [21, 22, 23, 24, 31, 32, 33, 0]


def test_pages_over_a_border_fill_both_chunks() -> None:
    """A verify may do that."""
    t = tables()
    write(t, "local", 0, [1, 2, 3])
    write(t, "local", 3, [4, 5])
    assert row(t, "local") == [1, 2, 3, 4, 5, 0, 0, 0]
