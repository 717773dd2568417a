"""A backstop beside the tests of equality: 200,000 first and second tokens, drawn with a draft and verified, are spread as the target says.

A second rule for accepting, or noise shared by two rows, would leave the tokens plausible and this distance large.
"""

from __future__ import annotations

import pytest
import torch

from l4core.sampling.draw import draw_by_law
from l4core.sampling.records import DrawKey
from l4core.sampling.verify import accepted_path

NUM, VOCAB, POSITION = 200_000, 7, 11
NOISE_FLOOR = 0.010
"""Of 49 cells and 200,000 samples, the distance is 0.006 by chance alone."""


@pytest.mark.parametrize(("temperature", "guess"), [(1.0, 2), (0.6, 0), (1.7, 5)])
def test_total_variation(temperature: float, guess: int) -> None:
    draw = torch.Generator().manual_seed(3)
    first = torch.randn(VOCAB, generator=draw) * 1.5  # logits of the first token
    second = torch.randn(VOCAB, VOCAB, generator=draw) * 1.5  # of the second, by the first
    expected = (first / temperature).softmax(0)[:, None] * (second / temperature).softmax(1)
    found = pairs(first, second, temperature, guess)
    counts = torch.bincount(found[:, 0] * VOCAB + found[:, 1], minlength=VOCAB * VOCAB).view(VOCAB, VOCAB)
    assert float((counts / NUM - expected).abs().sum() / 2) < NOISE_FLOOR


def pairs(first: torch.Tensor, second: torch.Tensor, temperature: float, guess: int) -> torch.Tensor:
    """int64 [NUM, 2]. One step verifies the guess; where it was wrong, a second step draws the second token."""
    rows = [
        draws(first.expand(NUM, -1), temperature, POSITION),
        draws(second[guess].expand(NUM, -1), temperature, POSITION + 1),
    ]
    again = draws(second[rows[0]], temperature, POSITION + 1)
    found = []
    for a, b, c in zip(*(row.tolist() for row in (*rows, again)), strict=True):
        path = accepted_path([guess], (), [a, b])
        tokens = [(a, b)[row] for row in path]
        found.append(tokens if len(tokens) == 2 else [*tokens, c])
    return torch.tensor(found)


def draws(logits: torch.Tensor, temperature: float, position: int) -> torch.Tensor:
    keys = [DrawKey(temperature=temperature, seed=seed, position=position) for seed in range(NUM)]
    return draw_by_law(logits, keys)


def test_the_distance_sees_a_wrong_rule() -> None:
    """Drawing both rows with one position's noise: each token alone is spread rightly, the pair is not."""
    draw = torch.Generator().manual_seed(3)
    first, second = torch.randn(VOCAB, generator=draw), torch.randn(VOCAB, VOCAB, generator=draw)
    a = draws(first.expand(NUM, -1), 1.0, POSITION)
    b = draws(second[a], 1.0, POSITION)
    counts = torch.bincount(a * VOCAB + b, minlength=VOCAB * VOCAB).view(VOCAB, VOCAB)
    expected = first.softmax(0)[:, None] * second.softmax(1)
    assert float((counts / NUM - expected).abs().sum() / 2) > 10 * NOISE_FLOOR
