"""How many tokens requests of one beginning compute, at Scout's chunk and layers. The scheduler alone; whatever it asks for is taken as computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from zlib import crc32

import pytest

from l4core.engine.batch import DrawnTokens, StepTokens
from l4core.engine.schedule.scheduler import LOOKS_PER_STEP, Scheduler, SchedulerLimits
from l4core.engine.schedule.sequence import NO_ROW
from l4core.kv.blocks import KVGroup
from l4core.kv.manager import KVManager
from l4core.kv.prefix import PageHashes
from l4core.request import Request, SamplingParams

CHUNK, PAGE = 8192, 64
GROUPS = (
    KVGroup(name="global", layer_ids=tuple(range(3, 48, 4)), chunk_size=None),
    KVGroup(name="local", layer_ids=tuple(i for i in range(48) if i % 4 != 3), chunk_size=CHUNK),
)
UNIQUE = range(37, 101)
"""Own tokens of each of 64 requests."""


class Counted:
    """A scheduler and what it had computed: tokens by request id, those of the prompt only."""

    def __init__(self, superpages: int) -> None:
        limits = SchedulerLimits(max_running=64, max_tokens_per_step=8192, chunk_size=CHUNK, max_context=100_000)
        self.kv = KVManager(GROUPS, PAGE, superpages + 1)
        self.scheduler = Scheduler(limits, self.kv)
        self.computed: Counter[str] = Counter()

    def run(self, requests: Sequence[Request]) -> None:
        """To the end of all of them."""
        for request in requests:
            self.scheduler.add(request)
        while self.scheduler.has_work:
            self.step()
        self.scheduler.check_integrity()

    def step(self) -> None:
        batch = self.scheduler.schedule()
        sequences = batch.sequences if batch is not None else ()
        for seq in sequences:
            self.computed[seq.request.request_id] += 0 if seq.is_decode else len(seq.token_ids)
        drawn = [DrawnTokens(request_id=s.request.request_id, token_ids=(7,) if s.draws else ()) for s in sequences]
        self.scheduler.commit(StepTokens(drawn=drawn))


def request(name: str, shared: int, own: int, new: int = 3) -> Request:
    """`shared` tokens that all have, then `own` tokens that nobody else has."""
    prompt = [*range(shared), *(crc32(name.encode()) + i for i in range(own))]
    return Request(
        request_id=name,
        prompt_token_ids=prompt,
        params=SamplingParams(max_tokens=new, ignore_eos=True, seed=0),
        eos_token_ids=(),
        max_total_tokens=len(prompt) + new,
    )


@pytest.mark.parametrize("shared", [8_000, 8_050])
def test_64_requests_compute_their_own_tokens(shared: int) -> None:
    """All at once: the first computes what they share, the others wait for it."""
    counted = Counted(30_000)
    counted.run([request(f"r{i}", shared, own) for i, own in enumerate(UNIQUE)])
    assert counted.computed.pop("r0") == shared + UNIQUE[0]
    for i, own in enumerate(UNIQUE[1:], start=1):
        assert counted.computed[f"r{i}"] <= own + PAGE - 1
        assert counted.computed[f"r{i}"] == own + shared % PAGE


def test_also_when_the_first_has_passed_the_border() -> None:
    """Its local pages of the chunk before are nobody's, and stay while memory is free."""
    counted = Counted(30_000)
    counted.run([request("first", 8_000, 3_000, new=500)])
    counted.run([request(f"r{i}", 8_000, own) for i, own in enumerate(UNIQUE)])
    assert all(counted.computed[f"r{i}"] == own for i, own in enumerate(UNIQUE))


def test_without_its_local_tail_a_prefix_reaches_to_the_border() -> None:
    """Other requests' memory evicts local pages first, those of the tail from its end backwards; then 8,192 of 12,000 tokens are left."""
    counted = Counted(270)
    kv = counted.kv
    counted.run([request("first", 12_000, 50)])
    seen, other, probe = [], kv.new_tables(), request("probe", 12_000, 50)
    counted.scheduler.add(probe)
    (waiting,) = counted.scheduler.sequences
    while not seen or seen[-1] > CHUNK:
        seen.append(kv.find_prefix(waiting.hashes, 12_000))
        assert kv.reserve(other, other.capacity + PAGE) is not None
    counted.scheduler.abort("probe")
    assert sorted(seen, reverse=True) == seen
    assert {length for length in seen if length > CHUNK} >= {11_968, CHUNK + PAGE}, "a page at a time"
    kv.release(other)
    counted.run([request("second", 12_000, 50)])
    assert counted.computed["second"] == 50 + 12_000 - CHUNK


def test_a_long_prompt_costs_others_no_more_of_their_prefixes_than_it_needs() -> None:
    """Local pages that it leaves behind at its borders are the first to go, so the 80,000 tokens before it stay."""
    counted = Counted(900)
    counted.run([request("before", 80_000, 50)])
    counted.run([request("long", 0, 60_000)])
    counted.run([request("again", 80_000, 50)])
    assert counted.computed["again"] <= 50 + 80_000 % CHUNK


class Watched(PageHashes):
    """Counts how often someone asks for a page."""

    num_looks = 0

    def __getitem__(self, index: int) -> bytes:
        Watched.num_looks += 1
        return super().__getitem__(index)


def test_a_long_request_that_waits_looks_at_few_pages() -> None:
    """Its 1,250 cached pages are no memory for what comes behind them while another decodes 300 steps; then it starts behind them all the same."""
    counted = Counted(900)
    scheduler = counted.scheduler
    counted.run([request("before", 80_000, 50)])
    scheduler.add(request("decodes", 0, 45_000, new=300))
    counted.step()
    waits = request("waits", 80_000, 15_000)
    scheduler.add(waits)
    seq = next(seq for seq in scheduler.sequences if seq.request is waits)
    seq.hashes = Watched("", PAGE, seq.token_ids)
    Watched.num_looks = 0
    steps = 0
    while seq.row == NO_ROW:
        counted.step()
        steps += 1
    assert steps > 200
    assert Watched.num_looks < 3 * LOOKS_PER_STEP * steps < 1_250 * steps
    counted.run([])
    assert counted.computed["waits"] <= 15_000 + PAGE
