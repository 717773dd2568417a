"""`l4 backends`: every attention backend, whether it is usable and why not, here or on another machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from l4core.cli.command import L4Command
from l4core.errors import ConfigError

if TYPE_CHECKING:
    from l4core.platform import Platform
    from l4core.plugin_api import AttentionRequirements, ExpertRequirements


@click.command(cls=L4Command, short_help="List attention backends: chosen, usable, or why not.")
@click.argument("model", required=False, metavar="[MODEL]", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--platform", "name", metavar="NAME", help="another machine: sm90, gfx942, xpu, cpu, … (default: this one)"
)
@click.option(
    "--with",
    "libraries",
    multiple=True,
    metavar="NAME==VERSION",
    help="a library there, by import name; may be repeated",
)
@click.option("--installed", is_flag=True, help="that machine has the libraries of this one")
@click.option("--experts", is_flag=True, help="the kernels of the mixture of experts instead")
@click.option("--json", "as_json", is_flag=True, help="an object instead of text")
def backends(
    model: Path | None, name: str | None, libraries: tuple[str, ...], installed: bool, experts: bool, as_json: bool
) -> None:
    """List attention backends, best first: chosen, usable, or why not.

    MODEL (a folder) sets what is required of them; without it the released Llama 4 models do.
    """
    from l4core.attention.explain import RELEASED_LLAMA4, explain
    from l4core.plugin_manager import load_plugins

    platform = choose_platform(name, libraries, installed=installed)
    if experts:
        from l4core.experts.explain import RELEASED_SCOUT, explain_experts

        needed = RELEASED_SCOUT if model is None else expert_requirements_of(model)
        kernels = explain_experts(load_plugins(), platform, needed)
        click.echo(json.dumps(kernels.json(), indent=2) if as_json else kernels.text())
        return
    required = RELEASED_LLAMA4 if model is None else requirements_of(model)
    found = explain(load_plugins(), platform, required)
    click.echo(json.dumps(found.json(), indent=2) if as_json else found.text())


def choose_platform(name: str | None, libraries: Sequence[str], *, installed: bool) -> Platform:
    """This machine, or the fake one of that name with exactly the given libraries (installed: with those of this machine)."""
    from l4core.platform import detect
    from l4core.testing.platforms import fake_platform, parse_libraries

    if name is None and (libraries or installed):
        raise ConfigError("--with and --installed describe another machine", fix="name it with --platform")
    if libraries and installed:
        raise ConfigError("--with and --installed exclude each other", fix="leave one of them out")
    if name is None:
        return detect()
    return fake_platform(name, None if installed else parse_libraries(libraries))


def requirements_of(folder: Path) -> AttentionRequirements:
    """What a checkpoint asks of a backend on one device, in the checkpoint's own dtype."""
    import torch

    from l4core.config import EngineConfig
    from l4core.engine.start.resolve import requirements
    from l4core.model.config import ModelConfig

    config = ModelConfig.from_folder(folder)
    dtype: torch.dtype = getattr(torch, config.dtype)
    return requirements(EngineConfig(model=str(folder)), config, q_dtype=dtype, kv_dtype=dtype)


def expert_requirements_of(folder: Path) -> ExpertRequirements:
    """The same of an expert kernel, for weights in the compute dtype. ConfigError for a model without experts."""
    import torch

    from l4core.config import EngineConfig
    from l4core.engine.start.resolve import expert_requirements
    from l4core.model.config import ModelConfig

    config = ModelConfig.from_folder(folder)
    if not any(config.moe_layers):
        raise ConfigError(f"{folder} has no experts", fix="leave --experts out")
    return expert_requirements(EngineConfig(model=str(folder)), config, getattr(torch, config.dtype), "plain", "plain")
