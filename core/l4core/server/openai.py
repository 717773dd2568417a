"""The table of routes. Starlette's routes, /openapi.json and the metrics' labels are all made of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeAlias

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from l4core.server import replies, status, tokens
from l4core.server.chat import chat_completions
from l4core.server.completions import completions
from l4core.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from l4core.server.service import Service

Handler: TypeAlias = Callable[[Service, Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """path: as OpenAPI spells it.  body, reply, event: of the request, of the 200, of one streamed event; reply None = text/plain."""

    method: str
    path: str
    handler: Handler
    summary: str
    body: type[msgspec.Struct] | None = None
    reply: type[msgspec.Struct] | None = None
    event: type[msgspec.Struct] | None = None
    unavailable: type[msgspec.Struct] | None = None


def routes(openapi: Handler) -> tuple[Route, ...]:
    """All routes. openapi: handler of /openapi.json, which describes this very table."""
    return (
        Route(
            method="POST",
            path="/v1/chat/completions",
            handler=chat_completions,
            summary="Answer a conversation",
            body=ChatRequest,
            reply=replies.ChatCompletion,
            event=replies.ChatChunk,
        ),
        Route(
            method="POST",
            path="/v1/completions",
            handler=completions,
            summary="Continue prompts given as text or token ids, or score them",
            body=CompletionRequest,
            reply=replies.Completion,
            event=replies.Completion,
        ),
        Route(method="GET", path="/v1/models", handler=status.models, summary="Models", reply=replies.ModelList),
        Route(
            method="GET", path="/v1/models/{model_id}", handler=status.model, summary="One model", reply=replies.Model
        ),
        Route(
            method="POST",
            path="/tokenize",
            handler=tokens.tokenize,
            summary="Text or messages to token ids",
            body=TokenizeRequest,
            reply=replies.Tokens,
        ),
        Route(
            method="POST",
            path="/detokenize",
            handler=tokens.detokenize,
            summary="Token ids to text",
            body=DetokenizeRequest,
            reply=replies.Text,
        ),
        Route(
            method="GET",
            path="/health",
            handler=status.health,
            summary="Whether the engine is alive",
            reply=replies.Status,
            unavailable=replies.Status,
        ),
        Route(
            method="GET",
            path="/ready",
            handler=status.ready,
            summary="Whether new requests are taken",
            reply=replies.Status,
            unavailable=replies.Status,
        ),
        Route(
            method="POST",
            path="/flush_cache",
            handler=status.flush_cache,
            summary="Forget all cached prefixes",
            reply=replies.Status,
        ),
        Route(method="GET", path="/version", handler=status.version, summary="Version of L4", reply=replies.Version),
        Route(method="GET", path="/metrics", handler=status.metrics, summary="Prometheus metrics"),
        Route(method="GET", path="/openapi.json", handler=openapi, summary="This description"),
    )
