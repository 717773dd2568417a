"""From bytes on the wire to a checked request struct: size while reading, JSON, field names, types. Every refusal is a RequestError."""

from __future__ import annotations

import asyncio
import re
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from l4core.errors import RequestError
from l4core.server.fields import check_fields

BODY_PAUSE_SECONDS = 60.0
JSON_TYPES = re.compile(r"application/([\w.-]+\+)?json")
PATH_IN_MESSAGE = re.compile(r"^(?P<what>.*?)(?: - at (?:`(?:key|value)` in )?`\$(?P<path>.*)`)?$", re.DOTALL)

JSON_NAMES = {list: "array", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}

T = TypeVar("T", bound=msgspec.Struct)


async def read_request(http: Request, wanted: type[T], max_bytes: int) -> T:
    """The body as a `wanted`. Raises RequestError: 400 (what it says), 408, 413, 415."""
    _check_type(http.headers.get("content-type", ""))
    return parse(await _read_body(http, max_bytes), wanted)


def parse(body: bytes, wanted: type[T]) -> T:
    """JSON text → struct. Unknown fields, fields not built yet, wrong types and malformed JSON are 400 and name the field."""
    try:
        raw: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:  # NaN and Infinity end here too
        raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from error
    except RecursionError as error:
        raise RequestError("the body is JSON nested too deeply", code="invalid_json") from error
    if not isinstance(raw, dict):
        raise RequestError(f"the body is a JSON {JSON_NAMES[type(raw)]}; wanted an object", code="invalid_json")
    check_fields(raw, wanted)
    try:
        return msgspec.convert(raw, wanted, str_keys=True)
    except msgspec.ValidationError as error:
        raise _type_error(str(error)) from error
    except RecursionError as error:
        raise RequestError("the body is JSON nested too deeply", code="invalid_json") from error


def _type_error(message: str) -> RequestError:
    """msgspec's "Expected `int`, got `str` - at `$.a[0]`" → "a[0]: expected …"."""
    found = PATH_IN_MESSAGE.match(message)
    path = (found["path"] or "").lstrip(".") if found else ""
    text = found["what"] if found else message
    if not path:
        return RequestError(text, code="invalid_type")
    return RequestError(f"{path}: {text[:1].lower()}{text[1:]}", param=path, code="invalid_type")


def _check_type(content_type: str) -> None:
    """JSON must be declared: a browser can be made to send anything else to a loopback port without asking."""
    kind = content_type.partition(";")[0].strip().lower()
    if not JSON_TYPES.fullmatch(kind):
        raise RequestError(
            f"content-type is {kind or 'missing'}; wanted application/json (curl: -H 'content-type: application/json')",
            status=415,
            code="unsupported_media_type",
        )


async def _read_body(http: Request, max_bytes: int) -> bytes:
    """Counted while it is read, so a chunked body without a length is bounded too."""
    encoding = http.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise RequestError(f"content-encoding is {encoding}; wanted none", status=415, code="unsupported_media_type")
    declared = http.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    while True:
        try:
            message = await asyncio.wait_for(http.receive(), BODY_PAUSE_SECONDS)
        except TimeoutError as error:
            raise RequestError(
                f"no more of the body came for {BODY_PAUSE_SECONDS:.0f} s", status=408, code="timeout"
            ) from error
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message.get("body", b"")
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
        if not message.get("more_body", False):
            return bytes(body)


def _too_large(max_bytes: int) -> RequestError:
    return RequestError(
        f"the body is larger than {max_bytes:,} bytes (--max-body-bytes)", status=413, code="body_too_large"
    )
