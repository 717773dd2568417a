"""Signatures of everything plugins may use, as text. `python tests/plugins/dump_api.py --write` renews api.txt after a change that was meant."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import pkgutil
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DUMP = Path(__file__).with_name("api.txt")


def public_modules() -> list[str]:
    """plugin_api, hookspecs, plugin_ops, and what of testing is for plugin authors."""
    conformance = importlib.import_module("l4core.testing.conformance")
    return [
        "l4core.plugin_api",
        "l4core.hookspecs",
        "l4core.plugin_ops.attention",
        "l4core.plugin_ops.quantize",
        "l4core.plugin_ops.sampling",
        "l4core.plugin_ops.tree",
        *(f"l4core.testing.conformance.{m.name}" for m in pkgutil.iter_modules(conformance.__path__)),
        "l4core.testing.platforms",
    ]


def dump() -> str:
    return "\n".join(line for module in public_modules() for line in (f"# {module}", *_module(module), "")) + "\n"


def _module(name: str) -> Iterator[str]:
    module = importlib.import_module(name)
    own = [n for n in vars(module) if not n.startswith("_") and getattr(vars(module)[n], "__module__", None) == name]
    for public in sorted(getattr(module, "__all__", own)):
        yield from _object(public, getattr(module, public))


def _object(name: str, value: Any) -> Iterator[str]:
    if inspect.isclass(value):
        bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
        yield f"class {name}({bases})"
        yield from sorted(f"    {line}" for line in _members(value))
    elif inspect.isfunction(value):
        yield f"def {name}{_signature(value)}"
    elif isinstance(value, int | str | tuple):
        yield f"{name} = {value!r}"
    else:
        yield f"{name}: {_type(value)}"


def _members(cls: type[Any]) -> Iterator[str]:
    if issubclass(cls, enum.Enum):
        yield from (f"{member.name} = {member.value!r}" for member in cls)
        return
    for field in dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ():
        yield f"{field.name}: {_annotation(field.type)}{_default(field)}"
    for name, value in vars(cls).items():
        if name.startswith("_"):
            continue
        if isinstance(value, property):
            yield f"property {name}"
        elif inspect.isfunction(value):
            mark = "abstract " if getattr(value, "__isabstractmethod__", False) else ""
            yield f"{mark}def {name}{_signature(value)}"
    if not dataclasses.is_dataclass(cls):
        yield from (f"{name}: {_annotation(hint)}" for name, hint in vars(cls).get("__annotations__", {}).items())


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return f" = {getattr(field.default_factory, '__name__', field.default_factory)}()"
    return "" if field.default is dataclasses.MISSING else f" = {field.default!r}"


def _annotation(hint: Any) -> str:
    return hint if isinstance(hint, str) else getattr(hint, "__name__", str(hint))


def _signature(function: types.FunctionType) -> str:
    """As written, not evaluated: the same on every Python."""
    signature = inspect.signature(function)
    return str(signature).replace("'", "")


def _type(value: Any) -> str:
    """An alias by the names of its parts: which file they stand in is nobody's business."""
    text = re.sub(r"l4core(\.\w+)*\.", "", str(value))
    return text if text.startswith("typing.") or "|" in text else type(value).__name__


if __name__ == "__main__":
    text = dump()
    if "--write" in sys.argv:
        DUMP.write_text(text)
    else:
        sys.stdout.write(text)
