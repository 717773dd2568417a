"""The law of the draw: right distribution, ties to the lowest id, T → 0 is greedy, the CPU shortcut gives the same token, rows stand alone."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from l4core.sampling.draw import argmax_lowest, draw, draw_by_law
from l4core.sampling.noise import gumbel_noise
from l4core.sampling.records import DrawKey

INF = math.inf


def keys(num: int, temperature: float = 1.0, seed: int = 0) -> list[DrawKey]:
    return [DrawKey(temperature=temperature, seed=seed + i // 7, position=i) for i in range(num)]


def test_the_law_spelled_out() -> None:
    logits = torch.tensor([[1.0, 0.5, -2.0, 0.9]])
    key = DrawKey(temperature=0.7, seed=11, position=3)
    scores = logits[0].double() / 0.7 + gumbel_noise(torch.tensor([11]), torch.tensor([3]), 4, "cpu")[0].double()
    assert int(draw_by_law(logits, [key])) == int(scores.argmax())
    assert int(draw(logits, [key])) == int(scores.argmax())


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 2.5])
def test_draws_follow_softmax(temperature: float) -> None:
    """Chi-square over 15,000 draws of 12 tokens, 11 degrees of freedom: below 31.3 with probability 0.999. Seeds are fixed."""
    logits = torch.linspace(0, 2.5, 12) * torch.tensor([1, -1] * 6)
    num = 15_000
    tokens = draw(logits.expand(num, 12), keys(num, temperature))
    wanted = (logits.double() / temperature).softmax(0) * num
    counts = torch.bincount(tokens, minlength=12)
    assert float(((counts - wanted) ** 2 / wanted).sum()) < 31.3


def test_draws_of_neighbouring_seeds_and_positions_are_independent() -> None:
    """Chi-square of pairs on a 4 × 4 table of even chances, 15 degrees of freedom: below 37.7 with probability 0.999."""
    flat = torch.zeros(1, 4)
    grid = [[DrawKey(temperature=1.0, seed=s, position=p) for p in range(101)] for s in range(101)]
    tokens = torch.stack([draw(flat.expand(101, 4), line) for line in grid])
    for first, second in ((tokens[:, 1:], tokens[:, :-1]), (tokens[1:], tokens[:-1])):
        pairs = torch.bincount((first * 4 + second).flatten(), minlength=16).double()
        wanted = pairs.sum() / 16
        assert float(((pairs - wanted) ** 2 / wanted).sum()) < 37.7


def test_greedy_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(3, 100_003)
    logits[1, [777, 99_999]] = 1.0
    logits[2, :5] = -INF
    assert argmax_lowest(logits).tolist() == [0, 777, 5]
    assert draw(logits, keys(3, temperature=0.0)).tolist() == [0, 777, 5]


def test_a_score_tie_goes_to_the_lowest_id() -> None:
    """At a distance of 2^20 temperatures the noise vanishes in rounding, so all but the best tie among themselves."""
    key = DrawKey(temperature=1e-6, seed=0, position=0)
    logits = torch.full((1, 64), -1e6)
    logits[0, 40] = logits[0, 41] = 0.0
    noise = gumbel_noise(torch.tensor([0]), torch.tensor([0]), 64, "cpu")[0]
    assert int(draw(logits, [key])) == 40 + int(noise[41] > noise[40])


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-30, 1e-6, 1e-3])
def test_small_temperatures_are_greedy(temperature: float) -> None:
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)) * 30
    assert torch.equal(draw(logits, keys(50, temperature)), argmax_lowest(logits))


# (position, token) under seed 0 whose word is among the 2^7 largest, where u would round to 1 and the noise to −inf.
WORST = [(454, 48947), (1239, 71466), (1519, 165544)]


@pytest.mark.parametrize(("position", "token"), WORST)
def test_the_only_allowed_token_is_drawn_even_with_the_worst_noise(position: int, token: int) -> None:
    logits = torch.full((1, 170_000), -INF)
    logits[0, token] = -3.0
    key = DrawKey(temperature=1.0, seed=0, position=position)
    assert int(draw(logits, [key])) == token
    assert int(draw_by_law(logits, [key])) == token


@st.composite
def batches(pick: st.DrawFn) -> tuple[torch.Tensor, list[DrawKey]]:
    """Rows from flat to peaked, whole vocabulary to a few tokens, with ties."""
    vocab_size = pick(st.sampled_from([1, 2, 5, 63, 400, 9000]))
    num = pick(st.integers(1, 6))
    rows = torch.randn(num, vocab_size, generator=torch.Generator().manual_seed(pick(st.integers(0, 10**6))))
    rows *= torch.tensor([pick(st.sampled_from([0.0, 0.1, 1.0, 3.0, 10.0, 100.0, 1e30])) for _ in range(num)])[:, None]
    if pick(st.booleans()):
        rows = (rows * 2).round() / 2
    for row in rows:
        row[: pick(st.sampled_from([0, vocab_size // 2, vocab_size - 1]))] = -INF
        row[vocab_size // 3] += pick(st.sampled_from([0.0, 5.0, 20.0]))
    temperature = st.sampled_from([1e-40, 1e-7, 0.01, 0.3, 0.7, 1.0, 3.0, 100.0])
    line = [
        DrawKey(
            temperature=pick(temperature), seed=pick(st.integers(-5, 2**64 - 1)), position=pick(st.integers(0, 2**40))
        )
        for _ in range(num)
    ]
    return rows, line


@given(batches())
@example((torch.zeros(2, 9000), keys(2)))
@example((torch.zeros(2, 9000).index_fill(1, torch.tensor([9]), 7.0), keys(2, 0.1)))
def test_cpu_shortcut_equals_the_law(batch: tuple[torch.Tensor, list[DrawKey]]) -> None:
    logits, line = batch
    assert torch.equal(draw(logits, line), draw_by_law(logits, line))


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0, 8.0])
def test_cpu_shortcut_equals_the_law_at_full_size(scale: float) -> None:
    logits = torch.randn(3, 202_048, generator=torch.Generator().manual_seed(1)) * scale
    for start in (0, 100):
        line = [DrawKey(temperature=0.8, seed=4, position=start + i) for i in range(3)]
        assert torch.equal(draw(logits, line), draw_by_law(logits, line))


@pytest.mark.parametrize("drawn", [draw, draw_by_law])
def test_a_row_alone_and_inside_64(drawn: object) -> None:
    assert callable(drawn)
    logits = torch.randn(64, 4099, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.2, 9, 64)[:, None]
    line = [DrawKey(temperature=0.2 + i / 20, seed=i % 5, position=i) for i in range(64)]
    together = drawn(logits, line)
    for i in range(64):
        assert drawn(logits[i : i + 1].clone(), line[i : i + 1])[0] == together[i]
    assert torch.equal(drawn(logits.flip(0), line[::-1]).flip(0), together)


def test_greedy_and_sampled_rows_mix() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(3))
    line = [DrawKey(temperature=t, seed=1, position=i) for i, t in enumerate((0.0, 1.0, 0.0, 2.0))]
    mixed = draw(logits, line)
    assert torch.equal(mixed[::2], argmax_lowest(logits)[::2])
    assert torch.equal(mixed[1::2], draw_by_law(logits[1::2], line[1::2]))


def test_logits_are_left_as_they_are() -> None:
    logits = torch.randn(3, 500)
    before = logits.clone()
    draw(logits, keys(3))
    assert torch.equal(logits, before)
