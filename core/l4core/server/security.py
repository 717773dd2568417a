"""The key check: in front of everything, closed unless the path is in a list of two."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping

from starlette.types import ASGIApp, Receive, Scope, Send

from l4core.engine.process.spawn import API_KEY_VARIABLE
from l4core.errors import ConfigError, RequestError
from l4core.server.failures import error_response

OPEN_PATHS = frozenset({"/health", "/ready"})


def resolve_key(option: str | None, environ: Mapping[str, str]) -> str | None:
    """--api-key, else L4_API_KEY, else None (no check). An empty key is an error, not "no check": it comes from an unset shell variable."""
    key = option if option is not None else environ.get(API_KEY_VARIABLE)
    if key is not None and not key.strip():
        where = "--api-key" if option is not None else API_KEY_VARIABLE
        raise ConfigError(f"{where} is empty", fix=f"give a key, or leave {where} out to serve without one")
    return key


class KeyCheck:
    """ASGI middleware. Compares digests in constant time; looks at scope["path"] only, never at a URL made from the Host header."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app = app
        self._digest = None if key is None else _digest(key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"this server speaks HTTP only, not {scope['type']}")  # closed by default: no other door
        if self._allowed(scope):
            await self._app(scope, receive, send)
        else:
            await error_response(_refusal(scope))(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        if self._digest is None or scope["path"] in OPEN_PATHS:
            return True
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        return scheme.lower() == b"bearer" and hmac.compare_digest(_digest(token.strip()), self._digest)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _refusal(scope: Scope) -> RequestError:
    sent = any(name == b"authorization" for name, _ in scope["headers"])
    what = "the API key is wrong" if sent else "this server wants an API key"
    return RequestError(f"{what}; send Authorization: Bearer KEY", status=401, code="invalid_api_key")
