"""The key: on every route but two, whatever the path, method or Host says."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from l4core.errors import ConfigError
from l4core.server.openai import routes
from l4core.server.security import resolve_key

KEY = "sesame-open"
OPEN = {"/health", "/ready"}


async def no_handler(*_: Any) -> Any:
    raise AssertionError


ALL_ROUTES = [(route.method, route.path.replace("{model_id}", "smol")) for route in routes(no_handler)]


@pytest.fixture(scope="module")
def locked(start_server: Any) -> Iterator[httpx.Client]:
    running = start_server(server={"api_key": KEY, "log_level": "debug"})
    with httpx.Client(base_url=running.url, timeout=30, verify=False) as client:
        yield client
    assert running.stop() is None


@pytest.mark.parametrize(("method", "path"), ALL_ROUTES)
def test_every_route_of_the_app_wants_the_key(locked: httpx.Client, method: str, path: str) -> None:
    headers: dict[str, str]
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": KEY},
        {"authorization": f"Basic {KEY}"},
        {"authorization": "Bearer"},
        {"authorization": f"Bearer {KEY}x"},
        {"authorization": f"Bearer {KEY[:-1]}"},
        {"x-api-key": KEY},
    ):
        reply = locked.request(method, path, headers=headers)
        assert (reply.status_code == 200) is (path in OPEN), (headers, reply.text)
        if path not in OPEN:
            assert reply.status_code == 401
            assert reply.json()["error"]["code"] == "invalid_api_key"
            assert KEY not in reply.text
    reply = locked.request(method, path, headers={"authorization": f"Bearer {KEY}"})
    assert reply.status_code in ({200} if method == "GET" or path == "/flush_cache" else {415}), reply.text


def test_the_open_routes_are_routes() -> None:
    assert {path for _, path in ALL_ROUTES} >= OPEN


@pytest.mark.parametrize(
    "path",
    ["/", "/nowhere", "/health/", "/healthz", "/ready/../v1/models", "/HEALTH", "/health%2f", "//health", "/docs"],
)
def test_unknown_paths_are_401_not_404(locked: httpx.Client, path: str) -> None:
    assert locked.get(path).status_code == 401


@pytest.mark.parametrize("host", ["localhost/health?", "localhost/ready#", "a@localhost/health", "health"])
def test_the_host_header_opens_nothing(locked: httpx.Client, host: str) -> None:
    assert locked.get("/v1/models", headers={"host": host}).status_code == 401


def test_two_authorization_headers_are_refused(locked: httpx.Client) -> None:
    headers = [("authorization", "Bearer wrong"), ("authorization", f"Bearer {KEY}")]
    assert locked.get("/v1/models", headers=headers).status_code == 401


def test_a_key_that_is_not_ascii_is_only_wrong(locked: httpx.Client) -> None:
    assert locked.get("/v1/models", headers=[(b"authorization", "Bearer schlüssel".encode())]).status_code == 401


def test_the_key_is_in_no_log(locked: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        locked.get("/v1/models", headers={"authorization": f"Bearer {KEY}"})
        locked.post("/v1/completions", headers={"authorization": f"Bearer {KEY}"}, json={"prompt": "RAISE A FUSS"[:5]})
    assert KEY not in caplog.text


def test_the_environment_gives_a_key_and_an_empty_one_is_an_error() -> None:
    assert resolve_key(None, {}) is None
    assert resolve_key(None, {"L4_API_KEY": "b"}) == "b"
    assert resolve_key("a", {"L4_API_KEY": "b"}) == "a"
    with pytest.raises(ConfigError, match="--api-key is empty"):
        resolve_key("", {"L4_API_KEY": "b"})
    with pytest.raises(ConfigError, match="L4_API_KEY is empty"):
        resolve_key(None, {"L4_API_KEY": " "})
