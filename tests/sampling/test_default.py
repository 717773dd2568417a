"""The built-in sampler passes the kit every sampler passes, and says what it takes."""

import pytest

from l4core.plugin_api import SamplingParams
from l4core.plugin_ops.sampling import UNCHANGED
from l4core.sampling.default import create
from l4core.testing.conformance import SamplerConformance


class TestDefault(SamplerConformance):
    plugin, sampler = "l4core.builtin_plugins", "default"


@pytest.mark.parametrize(
    "plain", [{}, {"temperature": 0.0}, {"temperature": 0.0, "top_p": 0.5, "top_k": 3, "min_p": 0.1}]
)
def test_plain_requests_are_left_alone(plain: dict[str, float]) -> None:
    assert create().parse(SamplingParams(**plain)) is UNCHANGED


@pytest.mark.parametrize(
    "asks", [{"top_p": 0.9}, {"top_k": 1}, {"min_p": 0.1}, {"temperature": 0.0, "presence_penalty": 1.0}]
)
def test_other_requests_are_transformed(asks: dict[str, float]) -> None:
    assert create().parse(SamplingParams(**asks)) is not UNCHANGED


def test_arguments_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="takes no sampler_args; found threshold"):
        create().parse(SamplingParams(sampler_args={"threshold": 0.1}))
