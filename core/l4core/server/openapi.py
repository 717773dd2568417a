"""/openapi.json, generated from the table of routes and the structs; nothing in it is written by hand twice."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from l4core import __version__
from l4core.server.fields import HARMLESS, MESSAGE_HARMLESS, MESSAGE_NOT_BUILT, NOT_BUILT
from l4core.server.openai import Route
from l4core.server.protocol import Message
from l4core.server.replies import ErrorReply
from l4core.server.security import OPEN_PATHS

JSON = "application/json"
REFERENCE = "#/components/schemas/{name}"


def describe(routes: Iterable[Route]) -> dict[str, Any]:
    """An OpenAPI 3.1 document."""
    table = tuple(routes)
    structs: list[type[msgspec.Struct]] = [
        ErrorReply,
        *(s for r in table for s in (r.body, r.reply, r.event, r.unavailable) if s is not None),
    ]
    unique = list(dict.fromkeys(structs))
    schemas, components = msgspec.json.schema_components(unique, ref_template=REFERENCE)
    references: dict[type[msgspec.Struct], Any] = dict(zip(unique, schemas, strict=True))
    for body in {route.body for route in table if route.body is not None}:
        _close(components[body.__name__], HARMLESS, NOT_BUILT)
    _close(components[Message.__name__], MESSAGE_HARMLESS, MESSAGE_NOT_BUILT)
    paths: dict[str, dict[str, Any]] = {}
    for route in table:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, references)
    return {
        "openapi": "3.1.0",
        "info": {"title": "L4", "version": __version__, "description": "An OpenAI endpoint for Llama 4"},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: Route, references: dict[type[msgspec.Struct], Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": route.handler.__name__,
        "summary": route.summary,
        "responses": _responses(route, references),
        "security": [{}] if route.path in OPEN_PATHS else [{}, {"key": []}],  # {}: without a key, when none was set
    }
    names = re.findall(r"{(\w+)}", route.path)
    if names:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if route.body is not None:
        operation["requestBody"] = {"required": True, "content": {JSON: {"schema": references[route.body]}}}
    return operation


def _responses(route: Route, references: dict[type[msgspec.Struct], Any]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if route.reply is not None:
        content[JSON] = {"schema": references[route.reply]}
    if route.event is not None:
        content["text/event-stream"] = {"schema": _event(references[route.event])}
    if not content:
        content = {JSON: {"schema": {"type": "object"}}} if route.path.endswith(".json") else {"text/plain": {}}
    found: dict[str, Any] = {"200": {"description": "OK", "content": content}}
    if route.unavailable is not None:
        found["503"] = {"description": "Not now", "content": {JSON: {"schema": references[route.unavailable]}}}
    found["default"] = {"description": "An error", "content": {JSON: {"schema": references[ErrorReply]}}}
    return found


def _event(data: Any) -> dict[str, Any]:
    """One server-sent event: its data is JSON in a string (the last one's is [DONE])."""
    text = {"type": "string", "contentMediaType": JSON, "contentSchema": data}
    return {"type": "object", "required": ["data"], "properties": {"data": {"anyOf": [{"const": "[DONE]"}, text]}}}


def _close(schema: dict[str, Any], harmless: Iterable[str], not_built: Mapping[str, Sequence[Any]]) -> None:
    """Say what fields.py does: any other name is refused, of some only the values that mean "off" are taken."""
    known = schema["properties"]
    known.update({name: {} for name in sorted(harmless) if name not in known})
    known.update({name: {"enum": [*off, None]} for name, off in not_built.items() if name not in known})
    schema["additionalProperties"] = False
