"""Top-k, top-p and min-p against naive versions, on the CPU's path and on the one for accelerators."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from l4core.plugin_ops import sampling
from l4core.plugin_ops.sampling import mask_min_p, mask_top_k, mask_top_p
from l4core.sampling.draw import draw_by_law
from l4core.sampling.records import DrawKey

INF = math.inf
few_fixtures = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

# Multiples of 1/8 divided by powers of two are exact in float32, so that ties and order are those of the naive version.
logit_lists = st.lists(st.integers(-40, 40).map(lambda n: n / 8) | st.just(-INF), min_size=1, max_size=30).filter(
    lambda xs: max(xs) > -INF
)
exact_temperatures = st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0])


@pytest.fixture(params=["host", "device"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The masks choose by the kind of device; "device" sends CPU tensors down the other way."""
    if request.param == "device":
        monkeypatch.setattr(sampling, "_on_host", lambda _: False)


def left(row: torch.Tensor) -> list[int]:
    return row.isfinite().nonzero()[:, 0].tolist()


def assert_only_masked(row: torch.Tensor, before: Sequence[float]) -> None:
    assert all(x in (y, -INF) for x, y in zip(row.tolist(), before, strict=True))


@few_fixtures
@given(logits=logit_lists, k=st.integers(1, 35))
def test_top_k(logits: list[float], k: int, naive: Any) -> None:
    row = mask_top_k(torch.tensor([logits]), [k])[0]
    assert left(row) == sorted(naive.ranking(logits)[:k])
    assert_only_masked(row, logits)


@few_fixtures
@given(logits=logit_lists, p=st.floats(1e-6, 1.0, exclude_max=True), temperature=exact_temperatures)
def test_top_p(logits: list[float], p: float, temperature: float, naive: Any) -> None:
    """A prefix of the ranking, with mass p, and without its last token less than p. Sums are trusted to 1e-6."""
    row = mask_top_p(torch.tensor([logits]), [p], [temperature])[0]
    ranking, probs = naive.ranking(logits), naive.probs(logits, temperature)
    kept = left(row)
    assert kept == sorted(ranking[: len(kept)])
    assert math.fsum(probs[i] for i in kept) >= p - 1e-6
    assert math.fsum(probs[i] for i in ranking[: len(kept) - 1]) < p + 1e-6
    assert len(kept) >= 1
    assert_only_masked(row, logits)


@few_fixtures
@given(logits=logit_lists, p=st.floats(1e-3, 1.0), temperature=exact_temperatures)
def test_min_p(logits: list[float], p: float, temperature: float, naive: Any) -> None:
    row = mask_min_p(torch.tensor([logits]), [p], [temperature])[0]
    probs = naive.probs(logits, temperature)
    clear = [i for i, x in enumerate(probs) if abs(x / max(probs) - p) > 1e-5]
    assert [i for i in left(row) if i in clear] == [i for i in clear if probs[i] / max(probs) > p]
    assert_only_masked(row, logits)


def test_top_p_counts_ties_and_keeps_the_token_that_crosses() -> None:
    quarter = torch.zeros(1, 4)
    for p, kept in ((0.1, 1), (0.25, 1), (0.2501, 2), (0.5, 2), (0.75, 3), (0.76, 4), (0.999, 4)):
        assert left(mask_top_p(quarter.clone(), [p], [1.0])[0]) == list(range(kept)), p


def test_min_p_one_keeps_the_best_and_its_equals() -> None:
    assert left(mask_min_p(torch.tensor([[1.0, 2.0, 2.0, 1.9]]), [1.0], [1.0])[0]) == [1, 2]


def test_masks_count_temperature_scaled_probabilities() -> None:
    logits = torch.tensor([[math.log(x) for x in (0.5, 0.3, 0.2)]])
    assert left(mask_top_p(logits.clone(), [0.7], [1.0])[0]) == [0, 1]
    assert left(mask_top_p(logits.clone(), [0.7], [0.4])[0]) == [0]
    assert left(mask_top_p(logits.clone(), [0.7], [10.0])[0]) == [0, 1, 2]
    assert left(mask_min_p(logits.clone(), [0.5], [1.0])[0]) == [0, 1]
    assert left(mask_min_p(logits.clone(), [0.5], [10.0])[0]) == [0, 1, 2]


def test_each_row_has_its_own_values_and_rows_that_are_off_stay() -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    masked = mask_top_k(logits.clone(), [0, 3, -1, 40, 7])
    assert [len(left(row)) for row in masked] == [40, 3, 40, 40, 7]
    masked = mask_top_p(logits.clone(), [1.0, 0.5, 0.5, 1e-9, 0.9], [1.0, 0.0, 1.0, 1.0, 1.0])
    assert torch.equal(masked[:2], logits[:2])
    assert len(left(masked[3])) == 1
    masked = mask_min_p(logits.clone(), [0.0, 0.5, 0.5, 1.0, 0.9], [1.0, 0.0, 1.0, 1.0, 1.0])
    assert torch.equal(masked[:2], logits[:2])
    assert len(left(masked[3])) == 1


def test_both_paths_agree_at_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(3, 30_000, generator=torch.Generator().manual_seed(1)) * torch.tensor([[0.2], [2.0], [7.0]])

    def everything() -> list[torch.Tensor]:
        return [
            mask_top_p(logits.clone(), [0.97, 0.9, 0.3], [0.7] * 3),
            mask_min_p(logits.clone(), [0.1, 0.01, 1e-9], [0.7] * 3),
            mask_top_k(logits.clone(), [20_000, 50, 1]),
        ]

    monkeypatch.setattr(sampling, "_on_host", lambda _: True)
    host = everything()
    monkeypatch.setattr(sampling, "_on_host", lambda _: False)
    assert all(torch.equal(a, b) for a, b in zip(host, everything(), strict=True))


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 0.9), (1.0, 0.5), (1.5, 0.95)])
def test_draws_after_top_p_follow_the_renormalised_softmax(temperature: float, top_p: float, naive: Any) -> None:
    """Chi-square over 15,000 draws, at most 9 degrees of freedom: below 27.9 with probability 0.999."""
    logits = [1.0, -0.5, 2.0, 0.25, 1.5, -2.0, 0.0, 0.75, 1.25, -1.0]
    masked = mask_top_p(torch.tensor([logits]), [top_p], [temperature])
    kept = left(masked[0])
    probs = naive.probs([logits[i] for i in kept], temperature)
    num = 15_000
    line = [DrawKey(temperature=temperature, seed=i // 100, position=i % 100) for i in range(num)]
    counts = torch.bincount(draw_by_law(masked.expand(num, 10), line), minlength=10).tolist()
    assert sum(counts[i] for i in kept) == num
    assert len(kept) < 10
    assert sum((counts[i] - num * p) ** 2 / (num * p) for i, p in zip(kept, probs, strict=True)) < 27.9
