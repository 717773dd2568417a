"""What XTC does to a known distribution, and that its coin is the request's own."""

import torch
from l4_xtc_sampler.sampler import create

from l4core.plugin_api import SamplerRow, SamplingParams

PROBS = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])


def transform(position: int = 7, seed: int = 1, **fields: object) -> list[int]:
    """Ids that are left."""
    params = SamplingParams(seed=seed, sampler="xtc", **fields)
    sampler = create()
    row = SamplerRow(
        params=params, parsed=sampler.parse(params), prompt_token_ids=[0], output_token_ids=[], position=position
    )
    return sampler.transform(PROBS.log()[None].clone(), [row])[0].isfinite().nonzero()[:, 0].tolist()


def always(threshold: float) -> dict[str, float]:
    return {"threshold": threshold, "probability": 1.0}


def test_only_the_least_likely_top_choice_stays() -> None:
    assert transform(sampler_args=always(0.12)) == [0, 2, 4]
    assert transform(sampler_args=always(0.2)) == [0, 2, 3, 4]


def test_threshold_zero_leaves_the_least_likely_token_that_may_be_drawn() -> None:
    assert transform(sampler_args=always(0.0), logit_bias={2: -100.0, 0: 3.0}, top_k=4) == [4]


def test_nothing_is_removed_below_two_top_choices() -> None:
    assert transform(sampler_args=always(0.35)) == [0, 1, 2, 3, 4]
    assert transform(sampler_args=always(0.45)) == [0, 1, 2, 3, 4]


def test_probability_zero_and_greedy_change_nothing() -> None:
    assert transform(sampler_args={"threshold": 0.12, "probability": 0.0}) == [0, 1, 2, 3, 4]
    assert transform(sampler_args=always(0.12), temperature=0.0) == [0, 1, 2, 3, 4]


def test_the_default_steps_come_first_and_the_temperature_counts() -> None:
    assert transform(sampler_args=always(0.12), top_k=2) == [3]
    # T = 0.5 squares the odds: 0.4 and 0.3 become 0.56 and 0.32, 0.15 falls to 0.08
    assert transform(sampler_args=always(0.12), temperature=0.5) == [0, 2, 3, 4]


def test_the_coin_falls_by_seed_and_position_as_often_as_asked() -> None:
    half = {"threshold": 0.12, "probability": 0.3}
    acted = [len(transform(position=p, sampler_args=half)) < 5 for p in range(600)]
    assert acted == [len(transform(position=p, sampler_args=half)) < 5 for p in range(600)]
    assert acted != [len(transform(position=p, seed=2, sampler_args=half)) < 5 for p in range(600)]
    assert 140 < sum(acted) < 220  # 180 ± 11
