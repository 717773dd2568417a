"""What `serve run l4_ray:app` is asked for becomes the command line of `l4 serve`, and means the same there."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("aiohttp", reason="aiohttp is not installed (make test-ray installs it)")

from l4_ray.plan import plan_of
from l4_ray.replica import key_environment, serve_arguments
from l4core.config import from_mapping
from l4core.errors import ConfigError
from l4core.launch_server import configs

OPTIONS: dict[str, Any] = {
    "model": "/models/scout",
    "served_model_name": "scout",
    "context_length": "auto",
    "disable_radix_cache": True,
    "disable_cuda_graph": False,
    "mem_fraction_static": 0.85,
    "attention_option": ["a=1", "b=2"],
    "max_queued_requests": 64,
}


def test_options_mean_the_same_on_the_command_line() -> None:
    assert configs(serve_arguments(OPTIONS)[1:]) == from_mapping(OPTIONS)


def test_the_key_is_not_where_all_can_read_it() -> None:
    options = {"model": "m", "api_key": "secret"}
    assert "secret" not in " ".join(serve_arguments(options))
    assert key_environment(options) == {"L4_API_KEY": "secret"}


def test_text_of_the_command_line_becomes_values() -> None:
    plan = plan_of(
        {"model": "m", "replicas": "2", "context-length": "4096", "disable_radix_cache": "true", "device": "cpu"}
    )
    assert (plan.replicas, plan.engine.context_length, plan.engine.disable_radix_cache, plan.gpus) == (
        2,
        4096,
        True,
        False,
    )
    assert plan_of({"model": "m"}).gpus


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model": "m", "replica": 2}, "unknown option 'replica'"),
        ({"model": "m", "replicas": 0}, "replicas is 0"),
        ({"model": "m", "port": 80}, "port is chosen"),
        ({"replicas": 1}, "no model"),
    ],
)
def test_what_cannot_be_is_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan_of(given)
