"""The persistent block tables: what a step is handed of a row, and that nothing of the row's earlier owner is in it."""

from __future__ import annotations

import torch

from l4core import SamplingParams
from l4core.attention.step_rows import StepRows
from l4core.engine.batch import NewPages, ScheduledSequence
from l4core.engine.run.block_tables import BlockTables
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


def step(
    tables: BlockTables, name: str, start: int, end: int, *, row: int = 1, padding: int = 0
) -> tuple[list[int], list[int]]:
    """Columns and slots of a sequence whose tokens [start, end) are new, with rows of padding before them."""
    ints = [torch.tensor([value], dtype=torch.int32) for value in (row, start, end)]
    rows = StepRows(
        rows=ints[0],
        starts=ints[1],
        seq_lens=ints[2],
        positions=torch.arange(start - padding, end),
        owner=torch.zeros(padding + end - start, dtype=torch.int32),
    )
    found, slots = tables.step(rows)
    return found[name][0].tolist(), slots[name].tolist()


def test_a_row_has_no_pages_of_the_sequence_that_had_it_before() -> None:
    t = tables()
    for name in ("global", "local"):
        write(t, name, 0, [5, 6, 7, 8])
        write(t, name, 0, [9])
    assert step(t, "global", 0, 2) == ([9] + [0] * 19, [18, 19])
    assert step(t, "local", 0, 2) == ([9] + [0] * 7, [18, 19])


def test_later_pages_of_a_sequence_leave_its_earlier_ones_alone() -> None:
    t = tables()
    write(t, "global", 0, [5, 6])
    write(t, "global", 2, [7])
    assert step(t, "global", 5, 6) == ([5, 6, 7] + [0] * 17, [15])


def test_only_as_many_columns_as_the_longest_sequence_needs() -> None:
    t = tables()
    write(t, "global", 0, [5, 6, 7])
    ints = [torch.tensor([value], dtype=torch.int32) for value in (1, 4, 5)]
    rows = StepRows(
        rows=ints[0], starts=ints[1], seq_lens=ints[2], positions=torch.tensor([4]), owner=torch.zeros(1, dtype=int)
    )
    found, _ = t.step(rows, longest=5)
    assert {name: table.shape[1] for name, table in found.items()} == {"global": 3, "local": 8}


def test_a_chunk_has_no_pages_of_the_one_two_before() -> None:
    t = tables()
    for chunk in range(3):
        write(t, "local", 4 * chunk, [10 * chunk + k for k in range(1, 5)])
    assert step(t, "local", 23, 24) == ([21, 22, 23, 24, 0, 0, 0, 0], [49])
    write(t, "local", 12, [31])
    assert step(t, "local", 24, 25) == ([0, 0, 0, 0, 31, 0, 0, 0], [62])
    write(t, "local", 13, [32, 33])
    assert step(t, "local", 25, 30) == ([0, 0, 0, 0, 31, 32, 33, 0], [63, 64, 65, 66, 67])


def test_a_verify_over_a_border_sees_both_chunks() -> None:
    t = tables()
    write(t, "local", 0, [1, 2, 3])
    write(t, "local", 3, [4, 5])
    assert step(t, "local", 6, 10) == ([1, 2, 3, 4, 5, 0, 0, 0], [8, 9, 10, 11])


def test_padding_before_a_sequence_is_written_to_the_null_page_and_keeps_no_chunk_alive() -> None:
    t = tables()
    write(t, "local", 0, [1, 2, 3, 4])
    write(t, "local", 4, [5])
    assert step(t, "local", 8, 9, padding=3) == ([0, 0, 0, 0, 5, 0, 0, 0], [1, 0, 1, 10])
    assert step(t, "local", 7, 9, padding=2) == ([1, 2, 3, 4, 5, 0, 0, 0], [1, 0, 9, 10])


def test_paddings_row_is_the_null_page() -> None:
    t = tables()
    write(t, "global", 0, [5, 6])
    assert step(t, "global", 0, 1, row=t.padding_row) == ([0] * 20, [0])
