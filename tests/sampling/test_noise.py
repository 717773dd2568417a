"""The noise is a pure function with known values, never infinite, Gumbel distributed, the same in all three ways of making it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from l4core.plugin_ops.philox import key_words, philox_4x32, seed_tensor, split_64
from l4core.sampling.noise import NOISE_MAX, NOISE_MIN, gumbel_from_words, gumbel_noise, gumbel_noise_at
from l4core.sampling.philox_host import philox_words

ONES = 0xFFFFFFFF
# The three vectors that Random123 publishes for philox4x32 with 10 rounds: counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
seeds = st.integers(-(2**63), 2**64 - 1)
positions = st.integers(0, 2**62)


def noise(seed: int, position: int, vocab_size: int) -> torch.Tensor:
    return gumbel_noise(seed_tensor([seed], "cpu"), torch.tensor([position]), vocab_size, "cpu")[0]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    k0, k1 = (torch.tensor([word]) for word in key)
    assert [int(word) for word in philox_4x32((c0, c1, c2, c3), (k0, k1))] == list(words)


def test_host_twin_known_answer() -> None:
    assert philox_words(*(np.zeros(1, np.uint64) for _ in range(3)))[0].tolist() == list(KNOWN[0][2])


@given(seed=seeds, position=positions, blocks=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5))
def test_host_twin_equals_torch(seed: int, position: int, blocks: list[int]) -> None:
    low, high = split_64(torch.tensor([position]))
    words = philox_4x32((torch.tensor(blocks), low, high, torch.zeros_like(low)), key_words(seed_tensor([seed], "cpu")))
    wide = [np.array(x, dtype=np.uint64) for x in (blocks, [position], [seed % 2**64])]
    assert philox_words(*wide).tolist() == torch.stack(words, dim=1).tolist()
    repeated = [wide[0], wide[1].repeat(len(blocks)), wide[2].repeat(len(blocks))]
    assert philox_words(*repeated).tolist() == torch.stack(words, dim=1).tolist()


@given(seed=seeds, position=positions, vocab_size=st.integers(1, 70))
def test_chosen_tokens_have_the_noise_of_the_whole(seed: int, position: int, vocab_size: int) -> None:
    whole = noise(seed, position, vocab_size)
    ids = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(position % 1000))[None]
    chosen = gumbel_noise_at(seed_tensor([seed], "cpu"), torch.tensor([position]), ids)
    assert torch.equal(chosen[0], whole[ids[0]])
    assert torch.equal(noise(seed, position, vocab_size + 9)[:vocab_size], whole)


def test_rows_of_a_batch_are_those_of_single_calls() -> None:
    some = [(0, 0), (-5, 1), (2**64 - 5, 1), (7, 2**33 + 1), (7, 1)]
    together = gumbel_noise(seed_tensor([s for s, _ in some], "cpu"), torch.tensor([p for _, p in some]), 1001, "cpu")
    for (seed, position), row in zip(some, together, strict=True):
        assert torch.equal(row, noise(seed, position, 1001))
    assert torch.equal(together[1], together[2]), "seeds count modulo 2^64"
    assert len({row.numpy().tobytes() for row in together}) == 4


@pytest.mark.parametrize("seed", [1, 2**32 + 1, -1])
def test_every_half_of_seed_and_position_counts(seed: int) -> None:
    keys = [
        (seed, 3),
        (seed ^ 1, 3),
        (seed ^ 2**32, 3),
        (seed ^ 2**63, 3),
        (seed, 4),
        (seed, 3 + 2**32),
        (seed, 3 + 2**40),
    ]
    rows = [noise(s, p, 8) for s, p in keys]
    assert all(not torch.equal(rows[0], row) for row in rows[1:])


def test_noise_is_finite_within_its_bounds_and_falls_as_the_word_grows() -> None:
    """g is a composition of monotone steps, so its extremes are those of the word; between them it must only never rise."""
    edges = {x for k in range(33) for d in range(-300, 301) if 0 <= (x := 2**k + d) < 2**32}
    words = torch.tensor(sorted(edges | set(range(0, 2**32, 2**20)) | set(range(2**32 - 1000, 2**32))))
    g = gumbel_from_words(words)
    assert g.isfinite().all()
    assert NOISE_MIN < g[-1] <= g.min()
    assert g.max() <= g[0] < NOISE_MAX
    assert (g.diff() <= 0).all()


def test_noise_is_minus_log_minus_log1p_minus_u() -> None:
    words = torch.tensor([0, 1, 2, 1000, 2**20, 2**31, 3 * 2**30, 2**32 - 2**12])
    wanted = [-math.log(-math.log1p(-(x + 0.5) * 2.0**-32)) for x in words.tolist()]
    torch.testing.assert_close(gumbel_from_words(words), torch.tensor(wanted), rtol=0, atol=2e-5)


def test_noise_has_gumbels_distribution() -> None:
    """Kolmogorov–Smirnov: 200,000 values, distance below 1.95 / √n with probability 0.999."""
    values = torch.cat([noise(3, p, 20_000) for p in range(10)]).double().sort().values
    cdf = (-(-values).exp()).exp()
    steps = torch.arange(len(values) + 1) / len(values)
    assert max((cdf - steps[:-1]).abs().max(), (steps[1:] - cdf).abs().max()) < 1.95 / math.sqrt(len(values))


def test_seeds_take_any_size() -> None:
    assert seed_tensor([0, -1, 2**64 - 1, 2**63, 2**64 + 5], "cpu").tolist() == [0, -1, -1, -(2**63), 5]
