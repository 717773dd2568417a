"""The prompt's share of a step: with known costs a step takes what the target allows and no more; and costs become known by measuring."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l4core.engine.batch import ScheduledBatch, ScheduledSequence
from l4core.engine.inbox import Inbox
from l4core.engine.pace import FIRST_PREFILL_TOKENS, Fit, Pace
from l4core.engine.schedule.step_costs import MIN_PREFILL_TOKENS, StepBudget, StepCosts, even_piece, piece_scores
from l4core.kv.blocks import KVGroup
from l4core.request import Request, SamplingParams, StepStats
from l4core.testing.simulation import SimulatedEngine

EMPTY = Inbox()
CHUNK = 64
GROUPS = (
    KVGroup(name="global", layer_ids=(3,), chunk_size=None),
    KVGroup(name="local", layer_ids=(0, 1, 2), chunk_size=CHUNK),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What steps truly take, in ms."""

    base: float
    decode: float
    token: float
    score: float

    def ms(self, batch: ScheduledBatch) -> float:
        work = sum(self.piece_ms(s) for s in batch.sequences if not s.is_decode)
        return self.base + self.decode * batch.num_decodes + work

    def piece_ms(self, piece: ScheduledSequence) -> float:
        count = len(piece.token_ids)
        return count * self.token + piece_scores(piece.start, count) * self.score

    def costs(self, target_ms: float) -> StepCosts:
        return StepCosts(
            target_ms=target_ms,
            base_ms=self.base,
            decode_ms=self.decode,
            token_ms=self.token,
            score_ms=self.score,
            max_prefill_tokens=100_000,
        )


machines = st.builds(
    Machine,
    base=st.floats(0, 10),
    decode=st.floats(0, 1),
    token=st.floats(0.001, 0.5),
    score=st.floats(0, 0.001),
)


def simulated(max_tokens_per_step: int = 512, context: int = 4096) -> SimulatedEngine:
    return SimulatedEngine(
        GROUPS,
        page_size=8,
        num_superpages=2000,
        max_running=32,
        max_tokens_per_step=max_tokens_per_step,
        max_context=context,
        prefix_cache=False,
    )


def ask(name: str, prompt_len: int, max_tokens: int) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=[hash(name) % 5] * prompt_len,
        params=SamplingParams(max_tokens=max_tokens),
        eos_token_ids=(),
        max_total_tokens=4096,
    )


@settings(max_examples=30)
@given(machine=machines, target_ms=st.floats(1, 60), prompts=st.lists(st.integers(1, 200), min_size=1, max_size=4))
def test_a_step_with_decodes_keeps_the_target_or_gives_prompts_the_least(
    machine: Machine, target_ms: float, prompts: list[int]
) -> None:
    """And it wastes nothing: where a prompt is cut short by nothing else, one more token would have broken the target."""
    engine = simulated()
    engine.scheduler.costs = machine.costs(target_ms)
    for number in range(3):
        engine.scheduler.add(ask(f"d{number}", 2, 100))
    engine.step()
    for number, length in enumerate(prompts):
        engine.scheduler.add(ask(f"p{number}", length, 1))
    for _ in range(40):
        left = {s.request.request_id: s.num_tokens - s.num_computed for s in engine.scheduler.sequences}
        batch = engine.scheduler.schedule()
        assert batch is not None
        pieces = [s for s in batch.sequences if not s.is_decode]
        if pieces and batch.num_decodes:
            for piece in pieces:
                assert piece.start // CHUNK == (piece.start + len(piece.token_ids) - 1) // CHUNK
            num_tokens = sum(len(s.token_ids) for s in pieces)
            ms = machine.ms(batch)
            last = pieces[-1]
            least = (
                len(last.token_ids) <= MIN_PREFILL_TOKENS
            )  # a piece of that length is never refused, however deep it reads
            assert ms - (machine.piece_ms(last) if least else 0) <= target_ms + 1e-6 or num_tokens <= MIN_PREFILL_TOKENS
            if len(pieces) == 1:
                piece = pieces[0]
                rest = min(left[piece.request.request_id], CHUNK - piece.start % CHUNK)
                number = -(-rest // len(piece.token_ids))
                if number > 1:  # in one step fewer, some step would have broken the target
                    longer = -(-rest // (number - 1))
                    more = longer * machine.token + piece_scores(piece.start, longer) * machine.score
                    alone = machine.base + machine.decode * batch.num_decodes
                    assert alone + more > target_ms - 1e-6
        engine.scheduler.commit(engine.execute(batch))


def test_without_decodes_or_costs_a_prompt_gets_the_whole_step() -> None:
    engine = simulated(max_tokens_per_step=48)
    engine.scheduler.costs = Machine(base=5, decode=1, token=1, score=0).costs(target_ms=1)
    engine.scheduler.add(ask("alone", 200, 1))
    assert engine.step().stats.num_prefill_tokens == 48
    assert not StepBudget(0)
    assert StepBudget(7).piece(10**6, 2 * 10**6) == 7


def test_a_prompt_always_moves_even_when_decodes_alone_break_the_target() -> None:
    engine = simulated()
    engine.scheduler.costs = Machine(base=50, decode=1, token=1, score=0).costs(target_ms=10)
    engine.scheduler.add(ask("decode", 2, 100))
    engine.step()
    engine.scheduler.add(ask("prompt", 100, 1))
    taken = [engine.step().stats.num_prefill_tokens for _ in range(8)]
    assert taken[0] == MIN_PREFILL_TOKENS
    assert sum(taken) == 100


@given(st.floats(0.001, 1), st.floats(0, 1e-4), st.integers(0, 2_000_000), st.floats(0.1, 500))
def test_the_piece_is_the_largest_that_fits(token_ms: float, score_ms: float, start: int, ms: float) -> None:
    costs = StepCosts(target_ms=ms, token_ms=token_ms, score_ms=score_ms, max_prefill_tokens=10**6)
    length = StepBudget(10**6, costs, 1).piece(
        start, start + 10**13
    )  # a rest so long that even pieces are the longest ones

    def took(n: int) -> float:
        return n * token_ms + piece_scores(start, n) * score_ms

    assert length == MIN_PREFILL_TOKENS or took(length) <= ms * (1 + 1e-9)
    assert length == 10**6 or took(length + 1) > ms * (1 - 1e-9)


@given(st.integers(1, 20_000), st.integers(1, 9000), st.sampled_from([1, 16, 64]))
def test_pieces_of_one_length_take_no_more_steps(rest: int, most: int, unit: int) -> None:
    lengths, left = [], rest
    while left:
        lengths.append(even_piece(left, most, unit))
        left -= lengths[-1]
    assert max(lengths) <= most
    assert len(lengths) == -(-rest // most)
    assert max(lengths) - min(lengths) <= unit * len(lengths)


def test_beside_decodes_a_chunk_is_cut_in_halves_and_not_in_a_whole_and_a_rest() -> None:
    assert StepBudget(8161, None, 31).piece(0, 8192, 64) == 4096
    assert StepBudget(8192).piece(0, 8192, 64) == 8192


# --- the loop that measures ----------------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def drive(
    machine: Machine,
    target_ms: float,
    *,
    prompt_len: int,
    noise: float = 0.02,
    stalls: dict[int, float] | None = None,
    seed: int = 0,
    alone: int = 8,
    light: float = 1.0,
) -> list[tuple[int, float]]:
    """Eight requests decode while a long prompt comes in → (prompt tokens, ms) of each step until its last token. stalls: step → extra
    ms.  alone: steps of decodes before it.  light: what they take, of a step's own cost with prompts in it."""
    clock, draw = Clock(), random.Random(seed)
    pace, steps = Pace(target_ms, clock), list[tuple[int, float]]()
    start, done = 0, 0
    for _ in range(alone):
        pace.stamp(EMPTY)
        clock.seconds += light * (machine.base + 8 * machine.decode) * (1 + noise * draw.uniform(-1, 1)) / 1e3
        pace.observe(StepStats(num_decode_tokens=8), busy=True)
    while done < prompt_len:
        inbox = pace.stamp(EMPTY)
        assert inbox.step_costs is not None
        budget = StepBudget(8192 - 8, inbox.step_costs, 8)
        length = budget.piece(start, min(prompt_len, (start // 8192 + 1) * 8192), 64)
        ms = machine.base + 8 * machine.decode + length * machine.token + piece_scores(start, length) * machine.score
        ms = ms * (1 + noise * draw.uniform(-1, 1)) + (stalls or {}).get(len(steps), 0.0)
        clock.seconds += ms / 1e3
        stats = StepStats(
            num_prefill_tokens=length, num_prefill_scores=piece_scores(start, length), num_decode_tokens=8
        )
        pace.observe(stats, busy=True)
        steps.append((length, ms))
        start, done = start + length, done + length
    return steps


SCOUT = Machine(base=8.0, decode=0.05, token=0.007, score=3e-8)
"""About 8 of 48 layers on one card: 8 ms of weights, 7 ms for 1,000 tokens, and at 128k of context 4 ms more for them."""


@pytest.mark.parametrize("target_ms", [12.0, 20.0, 40.0])
def test_the_target_is_held_while_a_long_prompt_comes_in(target_ms: float) -> None:
    steps = drive(SCOUT, target_ms, prompt_len=131_072)
    late = [ms for _, ms in steps if ms > target_ms]
    assert len(late) <= 0.01 * len(steps)
    middle = [ms for _, ms in steps[8:-1]]
    assert sum(middle) / len(middle) > 0.8 * target_ms, "the target leaves room that no prompt uses"


@settings(max_examples=30)
@given(
    base=st.floats(1, 20),
    token=st.floats(0.003, 0.05),
    score=st.floats(0, 1e-7),
    room=st.floats(3, 30),
    seed=st.integers(0, 1000),
)
def test_any_machine_is_learned(base: float, token: float, score: float, room: float, seed: int) -> None:
    machine = Machine(base=base, decode=0.05, token=token, score=score)
    target_ms = base + 0.4 + room
    steps = drive(machine, target_ms, prompt_len=65_536, seed=seed)
    least = sum(length <= MIN_PREFILL_TOKENS for length, _ in steps)
    late = sum(ms > 1.05 * target_ms and length > MIN_PREFILL_TOKENS for length, ms in steps)
    assert late <= 3 + 0.02 * len(steps)
    assert least <= 0.1 * len(steps) + 3


def test_compiling_and_stalls_do_not_starve_the_prompt() -> None:
    """Ten seconds in the first step, and half a second now and then."""
    steps = drive(SCOUT, 20.0, prompt_len=131_072, stalls={0: 10_000.0, 40: 500.0, 41: 500.0})
    assert len(steps) < 1.3 * len(drive(SCOUT, 20.0, prompt_len=131_072)) + 10
    assert min(length for length, _ in steps[42:60]) > 800, "two stalls in a row changed what is known"


def test_kernels_compiled_one_after_the_other_do_not_starve_the_prompt() -> None:
    """Pieces of a new length meet kernels that are not compiled yet: seen on an H200, four slow steps in a row, and again later."""
    stalls = {10: 190.0, 11: 190.0, 14: 140.0, 23: 175.0, 24: 175.0, 25: 160.0, 26: 485.0, 28: 1075.0}
    steps = drive(SCOUT, 20.0, prompt_len=131_072, stalls=stalls)
    assert len(steps) <= 1.1 * len(drive(SCOUT, 20.0, prompt_len=131_072))
    assert sum(ms > 20 for number, (_, ms) in enumerate(steps) if number not in stalls) <= 0.02 * len(steps)


@pytest.mark.parametrize("factor", [0.5, 2.5])
def test_a_machine_that_changes_for_good_is_learned_anew(factor: float) -> None:
    """Other requests' work, another clock: from step 60 on everything takes `factor` times as long."""
    pace, clock = Pace(30.0, now := Clock()), now
    took: list[tuple[int, float]] = []
    for number in range(140):
        inbox = pace.stamp(EMPTY)
        assert inbox.step_costs is not None
        length = StepBudget(8192, inbox.step_costs, 8).piece(0, 10**6, 64) if number >= 20 else 0
        ms = (SCOUT.base + length * SCOUT.token) * (factor if number >= 60 else 1.0)
        clock.seconds += ms / 1e3
        pace.observe(
            StepStats(num_prefill_tokens=length, num_prefill_scores=length**2 / 2, num_decode_tokens=8), busy=True
        )
        took.append((length, ms))
    assert all(ms < 31 for _, ms in took[80:])
    assert all(ms > 22 for _, ms in took[90:])


def test_a_restless_machine_gives_prompts_half_of_the_room_at_least() -> None:
    """Every fifth step takes twice its time, whatever is in it."""
    steps = drive(SCOUT, 20.0, prompt_len=65_536, stalls=dict.fromkeys(range(3, 2000, 5), 10.0))
    assert len(steps) < 4 * len(drive(SCOUT, 20.0, prompt_len=65_536))


def test_prompts_may_hit_experts_that_decodes_do_not() -> None:
    """A step of few decodes reads a fraction of the weights; with a prompt in it, all of them."""
    plain = drive(SCOUT, 20.0, prompt_len=131_072)
    steps = drive(SCOUT, 20.0, prompt_len=131_072, light=0.3)
    assert sum(ms > 20 for _, ms in steps) <= 0.01 * len(steps)
    assert len(steps) < 1.3 * len(plain)


def test_nothing_known_means_a_careful_start() -> None:
    pace = Pace(30.0, Clock())
    assert pace.costs().max_prefill_tokens == FIRST_PREFILL_TOKENS
    assert pace.costs().token_ms == 0


def test_idle_time_is_no_step() -> None:
    clock = Clock()
    pace = Pace(30.0, clock)
    stats = StepStats(num_prefill_tokens=100, num_prefill_scores=5000, num_decode_tokens=1)
    for _ in range(6):
        pace.stamp(EMPTY)
        clock.seconds += 0.01
        pace.observe(stats, busy=False)
        clock.seconds += 100.0
    costs = pace.costs()
    assert costs.base_ms + costs.decode_ms + 100 * costs.token_ms + 5000 * costs.score_ms == pytest.approx(10.0)


@given(st.lists(st.tuples(st.integers(1, 8192), st.integers(0, 10**6)), min_size=1, max_size=40))
def test_fitted_costs_are_never_negative(steps: list[tuple[int, int]]) -> None:
    fit, draw = Fit((1024.0, 1024.0 * 8192), patience=6), random.Random(0)
    for tokens, start in steps:
        fit.add((tokens, piece_scores(start, tokens)), draw.uniform(0.1, 100), beside=5.0)
        assert all(value >= 0 for value in fit.coefficients)
