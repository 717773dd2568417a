"""SamplingParams checks itself: a value of the wrong kind is a sentence that names the field, whatever its type."""

from __future__ import annotations

from typing import Any

import pytest

from l4core import SamplingParams
from l4core.errors import RequestError


@pytest.mark.parametrize("name", ["stop", "stop_token_ids", "logit_bias", "sampler_args"])
def test_none_means_none_of_them(name: str) -> None:
    given: dict[str, Any] = {name: None}
    assert SamplingParams(**given) == SamplingParams()


def test_one_is_as_good_as_a_list_of_one() -> None:
    one: dict[str, Any] = {"stop": "x", "stop_token_ids": 5}
    assert SamplingParams(**one) == SamplingParams(stop=("x",), stop_token_ids=(5,))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop", 5),
        ("stop", [1]),
        ("stop_token_ids", "5"),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [5] * 1025),
        ("logit_bias", [1]),
        ("logit_bias", {"5": 1.0}),
        ("logit_bias", dict.fromkeys(range(1025), 1.0)),
        ("ignore_eos", "no"),
        ("skip_special_tokens", None),
        ("include_stop_str_in_output", 1),
        ("sampler", None),
        ("sampler", "x" * 101),
        ("sampler_args", [1]),
        ("repetition_penalty", 1e-40),
        ("repetition_penalty", 0.0),
        ("temperature", float("nan")),
        ("n", True),
    ],
)
def test_a_wrong_value_names_its_field_in_a_short_sentence(name: str, value: object) -> None:
    given: dict[str, Any] = {name: value}
    with pytest.raises(RequestError, match=f"^{name} is ") as caught:
        SamplingParams(**given)
    assert caught.value.param == name
    assert len(caught.value.message) < 400
