"""`key=value` flags that may be repeated, as one mapping."""

from __future__ import annotations

from collections.abc import Mapping

from l4core.errors import ConfigError


def parse_key_values(flag: str, items: tuple[str, ...]) -> Mapping[str, str]:
    """("a=1", "b=2") → {"a": "1", "b": "2"}. ConfigError that names `flag` for anything else."""
    options: dict[str, str] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"{flag} is {item!r}; wanted key=value")
        if key in options:
            raise ConfigError(f"{flag} names {key!r} twice")
        options[key] = value
    return options
