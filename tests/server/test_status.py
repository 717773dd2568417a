"""Health, models, version and metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from l4core import __version__
from l4core.request import Request, SamplingParams, SequenceUpdate, StepOutput, StepStats
from l4core.server.metrics import TABLE, Metrics

READ_BY_DASHBOARDS = {
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:request_time_per_output_token_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:prefix_cache_hits_total",
    "vllm:prefix_cache_queries_total",
    "vllm:num_preemptions_total",
    "vllm:request_success_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:corrupted_requests_total",
}


@pytest.fixture
def client(server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def series(http: httpx.Client) -> dict[tuple[str, str], float]:
    """(name, extra labels) → value."""
    reply = http.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(reply.text):
        for sample in family.samples:
            extra = {k: v for k, v in sample.labels.items() if k != "model_name"}
            assert sample.labels["model_name"] == "smol"
            found[sample.name, ",".join(f"{k}={v}" for k, v in sorted(extra.items()))] = sample.value
    return found


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("smol", "model", "l4")
    assert client.models.retrieve("smol") == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("meta-llama/other")


def test_health_ready_and_version(http: httpx.Client) -> None:
    for path in ("/health", "/ready"):
        reply = http.get(path)
        assert (reply.status_code, reply.json()) == (200, {"status": "ready"})
        assert http.head(path).status_code == 200
    assert http.get("/version").json() == {"version": __version__}


def test_aliases_are_the_same_series(http: httpx.Client) -> None:
    http.post("/v1/completions", json={"prompt": "a", "max_tokens": 3})
    found = series(http)
    assert {name for name, _ in found} >= READ_BY_DASHBOARDS
    for row in TABLE:
        own = {(n.removeprefix(row.name), x): v for (n, x), v in found.items() if n.startswith(row.name)}
        assert own, row.name
        for alias in row.aliases:
            other = {(n.removeprefix(alias), x): v for (n, x), v in found.items() if n.startswith(alias)}
            assert {key: value for key, value in own.items() if key in other} == other, alias
    assert not [name for name, _ in found if name.endswith("_created")]


def test_a_request_moves_the_counters_by_what_it_did(http: httpx.Client) -> None:
    before = series(http)
    http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 5, "n": 2})
    http.post("/v1/completions", json={"prompt": "a", "max_tokens": 99, "stop": "See", "ignore_eos": True, "seed": 1})
    http.post("/v1/completions", json={"prompt": ""})
    http.get("/nowhere")
    after = series(http)
    moved = {key: value - before.get(key, 0.0) for key, value in after.items() if value != before.get(key, 0.0)}
    assert moved["l4_generation_tokens_total", ""] >= 13  # the engine may be a step ahead of the stop string
    assert moved["l4_requests_finished_total", "finished_reason=length"] == 2
    assert moved["l4_requests_finished_total", "finished_reason=stop"] == 1
    assert ("l4_requests_dropped_total", "") not in moved
    assert moved["l4_time_to_first_token_seconds_count", ""] == 3
    assert moved["l4_inter_token_latency_seconds_count", ""] >= 10
    assert moved["l4_request_latency_seconds_count", ""] == 3
    assert moved["l4_request_prompt_tokens_sum", ""] == 10
    assert moved["l4_request_generation_tokens_sum", ""] >= 13
    assert moved["l4_prefix_cache_queries_total", ""] == 10
    assert moved["l4_http_responses_total", "route=/v1/completions,status=200"] == 2
    assert moved["l4_http_responses_total", "route=/v1/completions,status=400"] == 1
    assert moved["l4_http_responses_total", "route=unmatched,status=404"] == 1
    assert after["l4_engine_up", ""] == 1
    assert after["l4_kv_pages", "group=global,state=total"] == 1000


def test_vllms_prompt_tokens_are_all_of_them_and_ours_those_computed() -> None:
    """Five of eight were found in the prefix cache."""
    metrics = Metrics("m")
    prompt = Request(
        request_id="a", prompt_token_ids=[1] * 8, params=SamplingParams(), eos_token_ids=(), max_total_tokens=16
    )
    metrics.submitted([prompt])
    update = SequenceUpdate(request_id="a", new_token_ids=[2], num_cached_tokens=5)
    metrics.stepped(StepOutput(updates=[update], stats=StepStats(num_prefill_tokens=3)))
    found = {line.split("{")[0]: line.split()[-1] for line in metrics.render().decode().splitlines() if line[0] != "#"}
    names = ("vllm:prompt_tokens_total", "l4_prompt_tokens_total", "l4_prefix_cache_hits_total")
    assert [float(found[name]) for name in names] == [8, 3, 5]
