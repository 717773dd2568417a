"""One streamed request to an OpenAI server, with the time of every event. Standard library only: the load generator must not become the load,
so a response is parsed by a few lines on asyncio's streams instead of a general HTTP library."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from l4core.bench.datasets import Sample
from l4core.errors import ConfigError

MAX_HEADER_BYTES = 1 << 16
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
SHOWN = 200
"""Characters of a server's own error text that are kept."""


class Failed(Exception):  # noqa: N818  (never leaves `ask`)
    """Why a request did not end well; kind is what is counted."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where and how to ask. url: with or without /v1.  endpoint: a key of PATHS.  extra: further fields of every request."""

    url: str
    model: str = ""
    endpoint: str = "completions"
    api_key: str = ""
    ignore_eos: bool = True
    temperature: float = 0.0
    timeout: float = 3600.0
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def address(self) -> tuple[str, int, bool, str]:
        """host, port, is it TLS, path before /v1. ConfigError for what is no http(s) address."""
        try:
            parts = urlsplit(self.url)
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            parts, port = urlsplit(""), 0
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--url is {self.url!r}; wanted something like http://127.0.0.1:30000")
        return parts.hostname, port, parts.scheme == "https", parts.path.rstrip("/").removesuffix("/v1")

    def body(self, sample: Sample) -> dict[str, Any]:
        """ignore_eos goes along only when it is asked for: OpenAI's own server knows no such field."""
        asked: dict[str, Any] = (
            {"messages": [{"role": "user", "content": sample.text}]}
            if self.endpoint == "chat"
            else {"prompt": sample.prompt}
        )
        return {
            "model": self.model,
            **asked,
            "max_tokens": sample.max_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if self.ignore_eos else {}),
            **self.extra,
        }


@dataclass(slots=True, kw_only=True)
class Record:
    """What became of one request; times in seconds on the run's clock. due: when it should have been sent.  times: of each event with text.
    num_input, num_output: tokens as the server counted them.  error: "" = it ended well.  detail: the error with the server's words."""

    due: float
    sent: float = 0.0
    times: list[float] = field(default_factory=list)
    end: float = 0.0
    num_input: int = 0
    num_output: int = 0
    num_cached: int = 0
    error: str = ""
    detail: str = ""


async def ask(target: Target, sample: Sample, due: float, clock: Callable[[], float]) -> Record:
    """Never raises for what the server does: that is in the record."""
    record = Record(due=due, sent=clock())
    try:
        async with asyncio.timeout(target.timeout):
            await _stream(target, sample, record, clock)
    except TimeoutError:
        record.error, record.detail = "timeout", f"no end after {target.timeout:g} s"
    except Failed as failed:
        record.error, record.detail = failed.kind, str(failed)
    except (OSError, asyncio.IncompleteReadError) as error:
        record.error, record.detail = "connection", f"connection: {error or type(error).__name__}"
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        record.error, record.detail = "protocol", f"protocol: {error!r:.{SHOWN}}"
    record.end = clock()
    return record


async def first_model(target: Target) -> str:
    """The name of the first model the server lists. Raises ConfigError when there is none, or no server."""
    try:
        async with asyncio.timeout(30):
            reader, writer = await _open(target)
            try:
                await _send(writer, target, "GET", "/v1/models", b"")
                status, pieces = await _response(reader)
                text = b"".join([piece async for piece in pieces])
            finally:
                writer.close()
        if status == 401:
            raise ConfigError(f"{target.url} wants an API key", fix="--api-key KEY, or export L4_API_KEY=KEY")
        return str(json.loads(text)["data"][0]["id"])
    except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
        raise ConfigError(
            f"no answer from {target.url}: {error or 'timeout'}", fix="start one: l4 serve MODEL"
        ) from error
    except (ValueError, KeyError, TypeError, IndexError, Failed) as error:
        raise ConfigError(f"{target.url}/v1/models does not list a model: {error!r}", fix="--model NAME") from error


async def _stream(target: Target, sample: Sample, record: Record, clock: Callable[[], float]) -> None:
    reader, writer = await _open(target)
    try:
        await _send(writer, target, "POST", PATHS[target.endpoint], json.dumps(target.body(sample)).encode())
        status, pieces = await _response(reader)
        if status != 200:
            text = b"".join([piece async for piece in pieces])
            raise Failed(f"HTTP {status}", _message(text))
        if not await _events(pieces, record, clock):
            raise Failed("broken stream", "the events stopped before [DONE]")
        if not record.times:
            raise Failed("empty answer", "no event had text")
    finally:
        writer.close()
    if not record.num_output:
        raise Failed("no usage", "the server sent no usage, so its tokens are not known")
    if target.ignore_eos and record.num_output != sample.max_tokens:
        raise Failed("wrong length", f"{record.num_output} tokens came of {sample.max_tokens} asked for")


async def _events(pieces: AsyncIterator[bytes], record: Record, clock: Callable[[], float]) -> bool:
    """Server-sent events into the record → whether the stream said that it is done."""
    rest = b""
    async for piece in pieces:
        now = clock()
        lines = (rest + piece).split(b"\n")
        rest = lines.pop()
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return True
            _take(json.loads(data), record, now)
    return False


def _take(event: Mapping[str, Any], record: Record, now: float) -> None:
    if "error" in event:
        raise Failed("error event", _shown(event["error"]))
    usage = event.get("usage")
    if usage:
        record.num_input, record.num_output = usage["prompt_tokens"], usage["completion_tokens"]
        record.num_cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    if any(_has_text(choice) for choice in event.get("choices", ())):
        record.times.append(now)


def _has_text(choice: Mapping[str, Any]) -> bool:
    """Whether an event carries output: not the one that only opens a chat answer, nor one that only ends it."""
    delta = choice.get("delta", choice)
    return any(delta.get(name) for name in ("text", "content", "reasoning_content", "reasoning", "tool_calls"))


def _message(text: bytes) -> str:
    try:
        return _shown(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError):
        return text.decode(errors="replace")[:SHOWN]


def _shown(error: object) -> str:
    return str(error.get("message", error) if isinstance(error, dict) else error)[:SHOWN]


# --- HTTP/1.1, as much as a stream needs -----------------------------------------------------------------------------------------------


async def _open(target: Target) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port, secure, _ = target.address
    return await asyncio.open_connection(host, port, ssl=ssl.create_default_context() if secure else None)


async def _send(writer: asyncio.StreamWriter, target: Target, method: str, path: str, body: bytes) -> None:
    """One request a connection: the server closes it behind its answer."""
    host, port, _, prefix = target.address
    name = f"[{host}]" if ":" in host else host
    head = [
        f"{method} {prefix}{path} HTTP/1.1",
        f"Host: {name}:{port}",
        "Accept: text/event-stream, application/json",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    if target.api_key:
        head.append(f"Authorization: Bearer {target.api_key}")
    writer.write("\r\n".join([*head, "", ""]).encode() + body)
    await writer.drain()


async def _response(reader: asyncio.StreamReader) -> tuple[int, AsyncIterator[bytes]]:
    """Status, and the body in the pieces in which it comes."""
    words = (await _line(reader)).split(None, 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
        raise Failed("protocol", f"no HTTP/1.1 answer: {words!r:.{SHOWN}}")
    headers, size = dict[bytes, bytes](), 0
    while line := await _line(reader):
        size += len(line)
        if size > MAX_HEADER_BYTES:
            raise Failed("protocol", "endless headers")
        name, _, value = line.partition(b":")
        headers[name.strip().lower()] = value.strip().lower()
    if headers.get(b"transfer-encoding") == b"chunked":
        return int(words[1]), _chunks(reader)
    return int(words[1]), _plain(reader, int(headers[b"content-length"]) if b"content-length" in headers else None)


async def _line(reader: asyncio.StreamReader) -> bytes:
    line = await reader.readline()
    if not line.endswith(b"\n"):
        raise Failed("connection", "closed before the end of the headers")
    return line.strip()


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await _line(reader)).partition(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def _plain(reader: asyncio.StreamReader, size: int | None) -> AsyncIterator[bytes]:
    """size: bytes; None = until the server closes."""
    while size != 0 and (piece := await reader.read(1 << 16 if size is None else min(size, 1 << 16))):
        yield piece
        size = None if size is None else size - len(piece)
    if size:
        raise Failed("connection", f"closed {size} bytes before the end")
