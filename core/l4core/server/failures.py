"""Errors in OpenAI's shape: {"error": {message, type, param, code}}. What an error says is for its user; tracebacks go to the log only."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from l4core.errors import EngineDeadError, RequestError
from l4core.server.replies import ErrorDetail, ErrorReply

logger = logging.getLogger(__name__)
MAX_MESSAGE = 2000
MAX_PARAM = 200
"""Characters: an error repeats names and values of the request, which may be megabytes long."""
RETRY_AFTER_SECONDS = {429: "1", 503: "2"}


def status_of(error: Exception) -> int:
    """HTTP status for an error."""
    if isinstance(error, RequestError):
        return error.status
    if isinstance(error, HTTPException):
        return error.status_code
    return 503 if isinstance(error, EngineDeadError) else 500


def reply_of(error: Exception) -> ErrorReply:
    """Body for an error. An error that L4 does not raise on purpose is logged with its traceback and told without."""
    status = status_of(error)
    if isinstance(error, RequestError):
        detail = ErrorDetail(
            message=_cut(error.message, MAX_MESSAGE),
            type=_type_of(status),
            param=None if error.param is None else _cut(error.param, MAX_PARAM),
            code=error.code,
        )
    elif isinstance(error, HTTPException):
        detail = ErrorDetail(message=_words_of(error), type=_type_of(status), code=_code_of(status))
    elif isinstance(error, EngineDeadError):
        detail = ErrorDetail(message=error.message, type=_type_of(status), code="engine_dead")
    else:
        logger.error("a request failed", exc_info=error)
        detail = ErrorDetail(
            message="internal error; the server's log has it", type=_type_of(status), code="internal_error"
        )
    return ErrorReply(detail)


def error_response(error: Exception) -> Response:
    """The HTTP reply for an error; 429 and 503 say when to come back."""
    status = status_of(error)
    headers: dict[str, str] = dict((error.headers if isinstance(error, HTTPException) else None) or {})
    if status in RETRY_AFTER_SECONDS:
        headers["Retry-After"] = RETRY_AFTER_SECONDS[status]
    if status == 408:
        headers["Connection"] = "close"
    return json_response(reply_of(error), status=status, headers=headers)


def json_response(body: msgspec.Struct, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A struct as JSON."""
    return Response(msgspec.json.encode(body), status_code=status, headers=headers, media_type="application/json")


async def handle(http: Request, error: Exception) -> Response:
    """Starlette's exception handler for all errors."""
    return error_response(error)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}…"


def _type_of(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def _words_of(error: HTTPException) -> str:
    words = {404: "there is no such path; GET /openapi.json lists all", 405: "wrong method for this path"}
    return words.get(error.status_code, error.detail)


def _code_of(status: int) -> str | None:
    return {404: "not_found", 405: "method_not_allowed"}.get(status)
