"""An OpenAI server of a few lines, whose times and mistakes are chosen by the test. Standard library only, in a thread."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

TOKEN_SECONDS = 0.002


@dataclass
class Fake:
    """misbehave: number of the request (from 0, the warm-up included) → "", or what goes wrong.  chunked: False = HTTP/1.0 style, closed at the
    end.  seen: bodies.  in_flight, most: requests now, and the most there were."""

    misbehave: Callable[[int], str] = lambda number: ""
    chunked: bool = True
    first_seconds: float = 0.005
    seen: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    in_flight: int = 0
    most: int = 0
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        try:
            await self._answer(reader, writer)
        except ConnectionError:
            pass  # the client hung up
        finally:
            self.in_flight -= 1
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        method, path, _ = (await reader.readline()).decode().split()
        headers = {}
        while line := (await reader.readline()).strip().decode():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        self.headers.append(headers)
        if method == "GET":
            await self._whole(writer, 200, {"data": [{"id": "fake"}]})
            return
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        number = len(self.seen)
        self.seen.append({**body, "path": path})
        wrong = self.misbehave(number)
        if wrong == "drop":
            return
        if wrong == "429":
            await self._whole(writer, 429, {"error": {"message": "the queue is full"}})
            return
        end = b"\r\n" if self.chunked else b""
        writer.write(b"HTTP/1.1 200 OK\r\n" + (b"Transfer-Encoding: chunked\r\n" if self.chunked else b"") + b"\r\n")
        async for piece in self._events(body, wrong):
            writer.write((b"%x\r\n" % len(piece) if self.chunked else b"") + piece + end)
            await writer.drain()
        if self.chunked and wrong != "cut":
            writer.write(b"0\r\n\r\n")
            await writer.drain()

    async def _events(self, body: dict[str, Any], wrong: str) -> AsyncIterator[bytes]:
        chat, count = "messages" in body, body["max_tokens"] - (wrong == "short")
        if chat:
            yield event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        if wrong == "hang":
            await asyncio.sleep(60)
        await asyncio.sleep(self.first_seconds)
        for index in range(count):
            if wrong == "error" and index == 1:
                yield event({"error": {"message": "a kernel went wrong"}})
            if wrong == "cut" and index == 1:
                return
            piece = event({"choices": [{"delta": {"content": "x"}} if chat else {"text": "x"}]})
            yield piece[: len(piece) // 2]  # events do not come in whole pieces
            yield piece[len(piece) // 2 :]
            await asyncio.sleep(TOKEN_SECONDS)
        yield event({"choices": [{"delta": {}, "finish_reason": "length"} if chat else {"text": ""}]})
        prompt = body["messages"][0]["content"].split() if chat else body["prompt"]
        usage = {
            "prompt_tokens": len(prompt),
            "completion_tokens": count,
            "prompt_tokens_details": {"cached_tokens": 3},
        }
        if wrong != "no usage":
            yield event({"choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"

    async def _whole(self, writer: asyncio.StreamWriter, status: int, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
        writer.write(b"HTTP/1.1 %d x\r\nContent-Length: %d\r\n\r\n" % (status, len(text)) + text)
        await writer.drain()


def event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


@contextmanager
def serving(fake: Fake) -> Iterator[Fake]:
    """The fake on a free port of the loopback, until the block ends."""
    loop = asyncio.new_event_loop()
    ready, stop = threading.Event(), asyncio.Event()

    async def main() -> None:
        server = await asyncio.start_server(fake.handle, "127.0.0.1", 0)
        fake.port = server.sockets[0].getsockname()[1]
        ready.set()
        await stop.wait()
        server.close()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        await asyncio.sleep(0.01)  # transports close in the loop's next turn

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()))
    thread.start()
    ready.wait(10)
    try:
        yield fake
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()
