"""What chat and completions share: answer as a whole or as events, with the usage where it was asked for."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from l4core.chat.assemble import TextDelta
from l4core.server.failures import json_response, reply_of
from l4core.server.generation import Answer, Generation, Told
from l4core.server.protocol import GenerationRequest
from l4core.server.replies import Usage
from l4core.server.service import off_loop_if_long
from l4core.server.sse import DONE, EventStream, event, while_connected


@dataclass(frozen=True, slots=True)
class UsageFields:
    """Which events carry the usage. at_end: one more event, all others say null.  always: every event."""

    at_end: bool
    always: bool

    @classmethod
    def asked_by(cls, body: GenerationRequest) -> UsageFields:
        """stream_options without stream is taken and has no effect: a whole answer always has its usage."""
        options = body.stream_options if body.stream else None
        at_end = bool(options and options.include_usage)
        return cls(at_end, always=bool(at_end and options and options.continuous_usage_stats))

    def of(self, generation: Generation, *, last: bool) -> Usage | UnsetType | None:
        if last or self.always:
            return generation.usage()
        return None if self.at_end else UNSET


class Shaper(Protocol):
    """Makes one call's reply. whole: all of it.  chunk: the event for a delta, b"" when the client would learn nothing.  end: the usage event."""

    def whole(self) -> msgspec.Struct: ...
    def chunk(self, answer: Answer, delta: TextDelta) -> bytes: ...
    def end(self) -> msgspec.Struct: ...


async def respond(http: Request, generation: Generation, shaper: Shaper, body: GenerationRequest) -> Response:
    """The reply; the status line of a stream is sent only after the first token, so that what goes wrong before is an HTTP error.

    The generation is closed when a stream ends; on an exception that is the caller's part.
    """
    if not body.stream:
        await while_connected(http.receive, generation.finish())
        return await off_loop_if_long(generation.num_candidates, lambda: json_response(shaper.whole()))
    first = await while_connected(http.receive, generation.next())
    events = _events(generation, shaper, first, with_end=UsageFields.asked_by(body).at_end)
    return EventStream(events, generation.close)


async def _events(generation: Generation, shaper: Shaper, told: Told, *, with_end: bool) -> AsyncGenerator[bytes, None]:
    """All chunks that one step brought are one piece, so that they are one write."""
    try:
        while told:
            if piece := b"".join(shaper.chunk(answer, delta) for answer, delta in generation.tell(told)):
                yield piece
            told = await generation.next()
        if with_end:
            yield event(shaper.end())
    except Exception as error:  # noqa: BLE001  (the status line is gone: the error is an event)
        yield event(reply_of(error))
    yield DONE
