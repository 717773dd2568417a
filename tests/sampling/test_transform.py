"""Penalties against a naive version, bias, the order of the default transform, and the coins that plugins throw."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from l4core.plugin_api import SamplerRow, SamplingParams
from l4core.plugin_ops.sampling import (
    apply_logit_bias,
    apply_penalties,
    changes_logits,
    coins,
    default_transform,
    scaled_logits,
)
from l4core.plugin_ops.upload import upload
from l4core.sampling.noise import gumbel_noise

INF = math.inf
MakeRow = Callable[..., SamplerRow]


def left(row: torch.Tensor) -> list[int]:
    return row.isfinite().nonzero()[:, 0].tolist()


token_lists = st.lists(st.integers(0, 11), max_size=20)
penalty_params = st.builds(
    SamplingParams,
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.3, 2.0]),
)


@given(
    requests=st.lists(st.tuples(token_lists, token_lists, penalty_params), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_penalties(requests: list[tuple[list[int], list[int], SamplingParams]], seed: int, naive: Any) -> None:
    logits = torch.randn(len(requests), 12, generator=torch.Generator().manual_seed(seed)) * 5
    rows = [
        SamplerRow(params=params, parsed=None, prompt_token_ids=prompt, output_token_ids=output, position=0)
        for prompt, output, params in requests
    ]
    wanted = [naive.penalties(row.tolist(), *request) for row, request in zip(logits, requests, strict=True)]
    torch.testing.assert_close(apply_penalties(logits, rows), torch.tensor(wanted), rtol=1e-6, atol=1e-5)


def test_penalties_know_prompt_from_output(sampler_row: MakeRow) -> None:
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    row = sampler_row(prompt=[0, 0, 1], output=[1, 1, 2], repetition_penalty=2.0)
    assert apply_penalties(logits.clone(), [row]).tolist() == [[1.0, -4.0, 1.0, -2.0]]
    row = sampler_row(prompt=[0, 0, 1], output=[1, 1, 2], frequency_penalty=0.5, presence_penalty=1.0)
    assert apply_penalties(logits.clone(), [row]).tolist() == [[2.0, -4.0, 0.5, -2.0]]


def test_penalties_leave_forbidden_tokens_forbidden(sampler_row: MakeRow) -> None:
    row = sampler_row(output=[0, 1], repetition_penalty=0.5, presence_penalty=-2.0, logit_bias={0: 100.0})
    assert default_transform(torch.tensor([[-INF, 1.0]]), [row])[0, 0] == -INF


def test_logit_bias(sampler_row: MakeRow) -> None:
    rows = [sampler_row(), sampler_row(logit_bias={3: 2.5, 0: -100.0}), sampler_row(logit_bias={1: 1.0})]
    found = apply_logit_bias(torch.zeros(3, 4), rows)
    assert found.tolist() == [[0, 0, 0, 0], [-100.0, 0, 0, 2.5], [0, 1.0, 0, 0]]


def test_order_of_the_default_transform(sampler_row: MakeRow) -> None:
    """Bias before top-k; top-p among what top-k left; min-p after both."""
    logits = torch.tensor([[math.log(x) for x in (0.4, 0.3, 0.2, 0.1)]])

    def kept(**params: Any) -> list[int]:
        return left(default_transform(logits.clone(), [sampler_row(**params)])[0])

    assert kept(top_k=2, logit_bias={3: 5.0}) == [0, 3]
    assert kept(top_p=0.75) == [0, 1, 2]
    assert kept(top_k=3, top_p=0.75) == [0, 1]  # 0.4 and 0.3 of the 0.9 that are left
    assert kept(top_k=3, top_p=0.95, min_p=0.6) == [0, 1]
    assert kept(top_k=2, output=[0] * 3, frequency_penalty=2.0) == [1, 2]


@given(
    params=st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.7]),
        top_p=st.sampled_from([1.0, 0.5]),
        top_k=st.sampled_from([-1, 0, 2]),
        min_p=st.sampled_from([0.0, 0.4]),
        presence_penalty=st.sampled_from([0.0, 0.0, 1.0]),
        frequency_penalty=st.sampled_from([0.0, 0.0, 1.0]),
        repetition_penalty=st.sampled_from([1.0, 1.0, 1.5]),
        logit_bias=st.sampled_from([{}, {}, {3: 9.0}]),
    )
)
def test_changes_logits_is_whether_anything_changes(params: SamplingParams) -> None:
    logits = torch.tensor([[1.0, 0.5, 0.0, 2.0, -1.0]])
    row = SamplerRow(params=params, parsed=None, prompt_token_ids=[1], output_token_ids=[0], position=2)
    assert changes_logits(params) == (not torch.equal(default_transform(logits.clone(), [row]), logits))


def test_a_transformed_row_does_not_depend_on_its_neighbours(sampler_row: MakeRow) -> None:
    logits = torch.randn(64, 999, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.1, 6, 64)[:, None]
    rows = [
        sampler_row(
            output=list(range(i)),
            temperature=0.1 + i / 30,
            top_p=1.0 if i % 3 == 0 else 0.9,
            top_k=i % 4 * 20,
            min_p=i % 5 / 50,
            frequency_penalty=i % 2 * 0.5,
            repetition_penalty=1 + i % 7 / 10,
        )
        for i in range(64)
    ]
    together = default_transform(logits.clone(), rows)
    for i in range(64):
        assert torch.equal(default_transform(logits[i : i + 1].clone(), rows[i : i + 1])[0], together[i])


def test_scaled_logits() -> None:
    logits = torch.tensor([[1.0, 3.0, -INF], [0.0, -1.0, -2.0]])
    assert scaled_logits(logits, [0.5, 2.0]).tolist() == [[-4.0, 0.0, -INF], [0.0, -0.5, -1.0]]
    coldest = scaled_logits(logits, [1e-300, 1.0])[0].tolist()
    assert coldest[0] < -1e38
    assert coldest[1:] == [0.0, -INF]


def test_coins_are_even_and_a_function_of_seed_position_and_name(sampler_row: MakeRow) -> None:
    rows = [sampler_row(seed=s, position=p) for s in range(-20, 20) for p in range(100)]
    thrown = coins(rows, "xtc", "cpu")
    assert torch.equal(coins(rows[::-1], "xtc", "cpu").flip(0), thrown)
    assert torch.equal(coins(rows[7:8], "xtc", "cpu")[0], thrown[7])
    assert thrown.min() > 0
    assert thrown.max() < 1
    assert len(set(thrown.tolist())) > 3990
    ranked = thrown.double().sort().values
    distance = (ranked - torch.arange(4000) / 4000).abs().max()
    assert distance < 1.95 / math.sqrt(4000)
    other = coins(rows, "other", "cpu")
    assert abs(torch.corrcoef(torch.stack([thrown, other]))[0, 1]) < 0.06


def test_coins_are_not_the_noise_of_the_draw(sampler_row: MakeRow) -> None:
    """Counter word 3 is 0 in the draw and never 0 in a coin, so a coin of token 0's counter is another number."""
    row = sampler_row(seed=1, position=5)
    noise = gumbel_noise(torch.tensor([1]), torch.tensor([5]), 1, "cpu")
    u = -torch.expm1(-torch.exp(-noise.double()))
    assert abs(float(u) - float(coins([row], "xtc", "cpu"))) > 1e-3


def test_a_coin_without_a_seed_is_refused(sampler_row: MakeRow) -> None:
    with pytest.raises(ValueError, match="without a seed asks for a coin at position 5"):
        coins([sampler_row(seed=None)], "xtc", "cpu")


def test_uploaded_values_have_the_type_asked_for_whatever_torchs_default() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert upload([0.7], torch.float32, "cpu").item() == pytest.approx(0.7, abs=1e-7)
    finally:
        torch.set_default_dtype(before)
    assert upload(np.array([0.5, 2.0]), torch.float32, "cpu").dtype == torch.float32
    assert upload([], torch.int64, "cpu").shape == (0,)
