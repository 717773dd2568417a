"""A request of which nothing matters but that it has come."""

from __future__ import annotations

from l4core.request import Request, SamplingParams


def bare_request(name: str = "r") -> Request:
    return Request(
        request_id=name, prompt_token_ids=[1], params=SamplingParams(seed=0), eos_token_ids=(), max_total_tokens=9
    )
