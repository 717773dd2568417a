"""The simulated engine must notice wrong accounting: each fault a scheduler could have is made by hand once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest

from l4core.engine.batch import NewPages, ScheduledSequence
from l4core.engine.schedule.scheduler import SchedulerLimits
from l4core.kv.blocks import KVGroup
from l4core.request import Request, SamplingParams
from l4core.testing.simulation import SimulatedMemory, next_token, output_alone

GLOBAL = KVGroup(name="global", layer_ids=(1,), chunk_size=None)
LOCAL = KVGroup(name="local", layer_ids=(0,), chunk_size=4)


LOCAL_PAGES = 10
"""Both groups have a page a superpage; the local ones begin here."""


def ask(request_id: str = "a", tokens: int = 6, **params: object) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=list(range(tokens)),
        params=SamplingParams(**params),  # type: ignore[arg-type]
        eos_token_ids=(3,),
        max_total_tokens=20,
    )


def piece(start: int, end: int, pages: list[int], *, request_id: str = "a", row: int = 0) -> ScheduledSequence:
    return ScheduledSequence(
        request=ask(request_id),
        row=row,
        start=start,
        token_ids=list(range(start, end)),
        new_pages={
            "global": NewPages(first_index=start // 2, pages=pages),
            "local": NewPages(first_index=start // 2, pages=[page + LOCAL_PAGES for page in pages]),
        },
        draws=False,
        is_decode=False,
    )


@pytest.fixture
def memory() -> SimulatedMemory:
    limits = SchedulerLimits(max_running=2, max_tokens_per_step=8, chunk_size=4, max_context=20)
    made = SimulatedMemory([GLOBAL, LOCAL], 2, 20, limits)
    first = piece(0, 4, [1, 2])
    made.enter(first)
    made.write(first)
    assert made.read(GLOBAL, first) == made.read(LOCAL, first) == [0, 1, 2, 3]
    return made


def test_a_local_read_begins_at_the_chunk_and_wraps_round_the_ring(memory: SimulatedMemory) -> None:
    second = piece(4, 6, [3])
    memory.enter(second)
    memory.write(second)
    assert memory.read(LOCAL, second) == [4, 5]
    assert memory.read(GLOBAL, second) == [0, 1, 2, 3, 4, 5]
    assert memory.tables["local"][0] == [11, 12, 13, 0]


def freed_too_early(memory: SimulatedMemory) -> None:
    memory.poison("global", [2])
    memory.read(GLOBAL, piece(0, 4, []))


def two_writers(memory: SimulatedMemory) -> None:
    other = piece(0, 1, [2], request_id="b", row=1)
    memory.enter(other)
    memory.write(other)


def entry_not_sent(memory: SimulatedMemory) -> None:
    memory.write(piece(4, 5, []))


def written_twice(memory: SimulatedMemory) -> None:
    memory.write(piece(3, 4, []))


def anothers_page(memory: SimulatedMemory) -> None:
    memory.enter(piece(0, 4, [3, 4], request_id="b", row=0))
    memory.read(GLOBAL, piece(0, 4, []))


def a_superpage_in_two_uses(memory: SimulatedMemory) -> None:
    overlapping = piece(4, 5, [LOCAL_PAGES + 1])
    memory.enter(overlapping)
    memory.write(overlapping)


def a_prefix_of_other_tokens(memory: SimulatedMemory) -> None:
    """As if two prompts had one hash."""
    prompt = [9, *range(1, 6)]
    thief = msgspec.structs.replace(piece(0, 4, [1, 2]), request=replace(ask("b"), prompt_token_ids=prompt))
    memory.enter(thief)
    memory.read(GLOBAL, thief)


def piece_over_a_border(memory: SimulatedMemory) -> None:
    memory.read(LOCAL, piece(3, 5, []))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (freed_too_early, "global: found None"),
        (two_writers, "two writers of global page 2"),
        (entry_not_sent, "position 4 has no global page"),
        (written_twice, "global position 3 written twice"),
        (anothers_page, "global: found None"),
        (a_superpage_in_two_uses, "global page 11 overlaps local pages"),
        (a_prefix_of_other_tokens, "global: found _Cell"),
        (piece_over_a_border, r"the piece \[3, 5\) crosses a chunk border"),
    ],
)
def test_a_fault_is_named(memory: SimulatedMemory, fault: Callable[[SimulatedMemory], None], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        fault(memory)


def test_words_depend_on_all_global_and_this_chunks_local_tokens() -> None:
    tokens = [1, 2, 3, 4, 5, 6]
    assert next_token([LOCAL], tokens, 1000) == next_token([LOCAL], [9, 9, 9, 9, 5, 6], 1000)
    assert next_token([GLOBAL], tokens, 1000) != next_token([GLOBAL], [9, *tokens[1:]], 1000)
    assert next_token([GLOBAL, LOCAL], tokens, 2, forbidden=(1,)) == 0


def test_the_oracle_stops_where_a_request_must() -> None:
    assert len(output_alone([GLOBAL], ask(max_tokens=5, min_tokens=5), 4)) == 5
    ended = output_alone([GLOBAL], ask(max_tokens=None), 4)
    assert ended.index(3) == len(ended) - 1
