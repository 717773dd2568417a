"""A row of the option table: what it says of a field of a config class, and how a value is held to it. Knows no option by name."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from l4core.errors import ConfigError, NotBuiltError

__all__ = ["LATER", "Option", "allowed_types", "check", "option_of", "options"]

LATER = "is not built yet in this version of L4"


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """What the table says of one field. unit: of the value.  minimum, maximum: allowed themselves; above: not.
    not_built: the value (other than the default) is refused with this text.
    later: values that will be choices, and are refused as not built yet.  auto: the word "auto" may stand for the default, None."""

    help: str
    group: str
    aliases: tuple[str, ...] = ()
    unit: str = ""
    choices: tuple[str, ...] = ()
    later: tuple[str, ...] = ()
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    not_built: str = ""
    metavar: str = ""
    auto: bool = False


def options(cls: type[Any]) -> Iterator[tuple[str, Any, Option]]:
    """(field name, type, Option) of every row of a config class, in order."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        yield f.name, hints[f.name], f.metadata["option"]


def option_of(cls: type[Any], name: str) -> Option:
    """The row of one field."""
    row: Option = cls.__dataclass_fields__[name].metadata["option"]
    return row


def allowed_types(hint: Any) -> tuple[type[Any], ...]:
    """Plain types a field accepts: `int | None` → (int, NoneType)."""
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return tuple(typing.get_origin(p) or p for p in parts)


TYPE_WORDS = {type(None): "nothing", tuple: "a list"}
"""Types as YAML and JSON know them."""


def check(config: Any) -> None:
    """Every field of a config against its row. Raises ConfigError, and NotBuiltError for what does not exist yet."""
    for name, hint, option in options(type(config)):
        value = getattr(config, name)
        allowed = allowed_types(hint)
        exact = type(value) in allowed or (isinstance(value, int) and float in allowed and not isinstance(value, bool))
        if not exact:
            wanted = " or ".join(TYPE_WORDS.get(t, t.__name__) for t in allowed)
            raise ConfigError(f"{name} is {value!r} ({type(value).__name__}); wanted {wanted}")
        if option.not_built and value != type(config).__dataclass_fields__[name].default:
            raise NotBuiltError(option.not_built)
        if value is None:
            continue
        if value in option.later:
            raise NotBuiltError(
                f"--{name.replace('_', '-')} {value} {LATER}",
                fix=f"leave it out, or: {', '.join(option.choices) or option.help}",
            )
        if isinstance(value, tuple) and not all(isinstance(item, str) for item in value):
            raise ConfigError(f"{name} is {list(value)!r}; wanted a list of strings")
        if option.choices and value not in option.choices:
            raise ConfigError(f"{name} is {value!r}; wanted one of {', '.join(option.choices)}")
        if option.minimum is not None and not value >= option.minimum:
            raise ConfigError(
                f"{name} is {value!r}; wanted at least {option.minimum}{' ' + option.unit if option.unit else ''}"
            )
        if option.above is not None and not value > option.above:
            raise ConfigError(
                f"{name} is {value!r}; wanted above {option.above:g}", fix="leave it out, or a larger one"
            )
        if option.maximum is not None and not value <= option.maximum:
            raise ConfigError(f"{name} is {value!r}; wanted at most {option.maximum}")
