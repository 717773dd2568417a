"""Flags, environment and YAML file become the two configs. A flag beats L4_API_KEY, and that beats the file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from l4core.cli.options import TableOption
from l4core.config import EngineConfig, ServerConfig, field_of, from_mapping
from l4core.errors import ConfigError

API_KEY = "L4_API_KEY"


def read_configs(ctx: click.Context, *, model: str | None = None) -> tuple[EngineConfig, ServerConfig]:
    """Both configs of the command in ctx. model: a positional MODEL that the command took itself.

    ConfigError for a bad value, an unknown key in the file, or a missing model.
    """
    given = given_options(ctx) if model is None else {**given_options(ctx), "model": model}
    file: Path | None = ctx.params.get("config_file")
    values = merge(read_file(file) if file else {}, given, os.environ)
    if not values.get("model"):
        raise ConfigError(
            "no model is named", fix=f"{ctx.command_path} DIR|ID   (a small one to try: l4 demo-model smol-l4)"
        )
    return from_mapping(values)


def given_options(ctx: click.Context) -> dict[str, Any]:
    """Field name → value of every option of the table that is on the command line."""
    given = {
        param.name: ctx.params[param.name]
        for param in ctx.command.params
        if isinstance(param, TableOption) and ctx.get_parameter_source(param.name) is ParameterSource.COMMANDLINE
    }
    positional = ctx.params.get("model_argument")
    if positional is not None:
        if "model" in given:
            raise ConfigError(
                f"the model is given twice: {positional!r} and {given['model']!r}", fix="keep one of them"
            )
        given["model"] = positional
    return given


def merge(file: Mapping[str, Any], flags: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """One mapping of field names. file: names or aliases; flags: field names."""
    values: dict[str, Any] = {}
    for name, value in file.items():
        own = field_of(str(name))[1]
        if own in values:
            raise ConfigError(f"the file sets {own!r} twice (once as {name!r})", fix="keep one of the spellings")
        values[own] = tuple(value) if isinstance(value, list) else value
    if API_KEY in environ:
        values["api_key"] = environ[API_KEY]
    values |= flags
    if values.get("api_key") == "":
        raise ConfigError(
            f"the API key is empty (--api-key or {API_KEY})", fix=f"give a key, or leave it out: unset {API_KEY}"
        )
    return values


def read_file(path: Path) -> dict[str, Any]:
    """A YAML mapping. ConfigError for anything else, and for a key that stands there twice."""
    import yaml

    try:
        with path.open(encoding="utf-8") as file:
            node = yaml.compose(file, Loader=yaml.SafeLoader)
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; wanted lines like `context_length: 65536`")
    keys = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"{path} sets {key!r} twice", fix="keep one of the lines")
    return values
