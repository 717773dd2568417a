"""/openapi.json describes exactly what is served."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest

from l4core import __version__
from l4core.server.openai import routes


async def no_handler(*_: Any) -> Any:
    raise AssertionError


@pytest.fixture(scope="module")
def document(http: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = http.get("/openapi.json").json()
    return found


def test_the_documents_routes_are_the_servers(document: dict[str, Any]) -> None:
    described = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert described == {(route.method, route.path) for route in routes(no_handler)}
    assert len(described) == 12


def test_every_described_route_answers(http: httpx.Client, document: dict[str, Any]) -> None:
    for path, item in document["paths"].items():
        for method in item:
            status = http.request(method.upper(), path.replace("{model_id}", "smol")).status_code
            assert status == (415 if "requestBody" in item[method] else 200), path


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    names = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)))
    assert names
    assert names <= set(document["components"]["schemas"])
    assert document["openapi"].startswith("3.1")
    assert document["info"]["version"] == __version__


def test_bodies_have_types_bounds_and_what_is_required(document: dict[str, Any]) -> None:
    chat = document["components"]["schemas"]["ChatRequest"]
    assert chat["required"] == ["messages"]
    assert chat["properties"]["messages"]["minItems"] == 1
    assert {"type": "number", "minimum": 0, "maximum": 100} in chat["properties"]["temperature"]["anyOf"]
    assert {"type": "integer", "minimum": 1, "maximum": 128} in chat["properties"]["n"]["anyOf"]
    completion = document["components"]["schemas"]["CompletionRequest"]
    assert len(completion["properties"]["prompt"]["anyOf"]) == 4


def test_replies_and_events_are_described(document: dict[str, Any]) -> None:
    content = document["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    assert content["application/json"]["schema"]["$ref"].endswith("/ChatCompletion")
    event = content["text/event-stream"]["schema"]["properties"]["data"]["anyOf"][1]
    assert event["contentSchema"]["$ref"].endswith("/ChatChunk")
    for path, item in document["paths"].items():
        for operation in item.values():
            assert operation["responses"]["default"]["content"]["application/json"], path
            assert operation["operationId"]


def test_only_health_and_ready_go_without_a_key(document: dict[str, Any]) -> None:
    free = {p for p, item in document["paths"].items() for o in item.values() if {"key": []} not in o["security"]}
    assert free == {"/health", "/ready"}


def test_fields_that_are_taken_or_refused_are_described_so(document: dict[str, Any]) -> None:
    for name in ("ChatRequest", "CompletionRequest", "TokenizeRequest", "DetokenizeRequest", "Message"):
        assert document["components"]["schemas"][name]["additionalProperties"] is False
    chat = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert chat["user"] == {}
    assert chat["tools"] == {"enum": [[], None]}
    assert chat["temperature"] != {}
