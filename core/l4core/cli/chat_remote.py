"""A conversation with a running OpenAI endpoint, streamed; standard library only."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import SplitResult, urlsplit

from l4core.errors import ConfigError, L4Error, RequestError

TIMEOUT_SECONDS = 600.0


class RemoteChat:
    """One server. url: with or without /v1.  changes: request fields (`max_tokens`, `temperature`, …)."""

    def __init__(self, url: str, api_key: str | None, changes: Mapping[str, Any]) -> None:
        parts = split_url(url)
        self._url, self._secure = url, parts.scheme == "https"
        self._host, self._port = parts.hostname or "", parts.port
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._changes = dict(changes)
        self.model = self._first_model()

    def answer(self, messages: Sequence[Mapping[str, str]]) -> Iterator[str]:
        """Pieces of the answer as they come. Closing the iterator early hangs up, which aborts the request.

        RequestError when the server refuses this request, L4Error when it cannot be talked to.
        """
        body = {"model": self.model, "messages": list(messages), "stream": True, **self._changes}
        with closing(self._connect()) as connection:
            response = self._ask(connection, "POST", "/v1/chat/completions", json.dumps(body).encode())
            try:
                yield from read_stream(response)
            except (OSError, HTTPException) as error:
                raise L4Error(f"{self._url} broke off the answer: {error}") from error
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise L4Error(f"{self._url} sent what is no chat completion: {error!r}") from error

    def _first_model(self) -> str:
        with closing(self._connect()) as connection:
            response = self._ask(connection, "GET", "/v1/models")
            text = response.read()
        try:
            models = [str(model["id"]) for model in json.loads(text)["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise L4Error(f"{self._url} is no OpenAI endpoint: /v1/models answers {text[:80]!r}") from error
        if not models:
            raise L4Error(f"{self._url} lists no model")
        return models[0]

    def _connect(self) -> HTTPConnection:
        kind = HTTPSConnection if self._secure else HTTPConnection
        return kind(self._host, self._port, timeout=TIMEOUT_SECONDS)

    def _ask(self, connection: HTTPConnection, method: str, path: str, body: bytes | None = None) -> HTTPResponse:
        try:
            connection.request(method, self._prefix + path, body, self._headers)
            response = connection.getresponse()
        except (OSError, HTTPException) as error:
            raise L4Error(f"no answer from {self._url}: {error}", fix="start a server: l4 serve MODEL") from error
        if response.status >= 400:
            raise _refusal(response, self._url)
        return response


def split_url(url: str) -> SplitResult:
    """Raises ConfigError for what is no http(s) address."""
    try:
        parts = urlsplit(url)
        good = (
            parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0 and not re.search(r"\s", url)
        )
    except ValueError:  # a bad port, a bad IPv6 address
        good = False
    if not good:
        raise ConfigError(f"--url is {url!r}; wanted something like http://127.0.0.1:30000")
    return parts


def _refusal(response: HTTPResponse, url: str) -> L4Error:
    text = response.read(65536).decode(errors="replace")
    try:
        message = str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = text.strip()[:200] or response.reason
    if response.status == 401:
        return L4Error(f"{url} wants an API key: {message}", fix="--api-key KEY, or export L4_API_KEY=KEY")
    return RequestError(f"{url} answered {response.status}: {message}", status=response.status)


def read_stream(lines: Iterator[bytes] | HTTPResponse) -> Iterator[str]:
    """The text pieces of a chat completion's server-sent events. L4Error for an error event."""
    for line in lines:
        field, _, data = line.decode("utf-8").strip().partition(": ")
        if field != "data":
            continue
        if data == "[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise L4Error(f"the server ended the answer: {event['error'].get('message', event['error'])}")
        for choice in event.get("choices", []):
            text = choice.get("delta", {}).get("content")
            if text:
                yield text
