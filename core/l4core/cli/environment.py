"""Collects what `l4 env` prints."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform as host
from collections.abc import Mapping
from dataclasses import dataclass

from l4core import __version__
from l4core.cli.plugins import plugin_table
from l4core.errors import L4Error
from l4core.platform import detect
from l4core.plugin_manager import PluginRow, load_plugins

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "huggingface-hub",
    "safetensors",
    "numpy",
    "pluggy",
    "starlette",
    "uvicorn",
    "msgspec",
    "triton",
)
PREFIXES = ("L4_", "HF_", "CUDA_", "HIP_", "ROCR_", "ZE_", "OMP_", "MKL_", "TORCH", "TRITON_")


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentReport:
    """packages: name → version, "not installed" where it is missing.  device: a line, or why none could be found.  variables: names only."""

    l4core: str
    python: str
    system: str
    packages: Mapping[str, str]
    device: str
    plugins: tuple[PluginRow, ...]
    variables: tuple[str, ...]

    def as_json(self) -> dict[str, object]:
        return dataclasses.asdict(self)

    def text(self) -> str:
        lines = [("l4core", self.l4core), ("python", self.python), ("system", self.system), ("device", self.device)]
        lines += list(self.packages.items())
        lines.append(("variables set", ", ".join(self.variables) or "none"))
        width = max(len(name) for name, _ in lines)
        head = "\n".join(f"{name.ljust(width)}  {value}" for name, value in lines)
        return f"{head}\n\n{plugin_table(self.plugins)}"


def report(environ: Mapping[str, str] = os.environ) -> EnvironmentReport:
    """The report of this process's environment."""
    return EnvironmentReport(
        l4core=__version__,
        python=f"{host.python_version()} ({host.python_implementation()})",
        system=f"{host.system()} {host.release()} {host.machine()}, {os.cpu_count()} cores",
        packages={name: version_of(name) for name in PACKAGES},
        device=device_line(),
        plugins=load_plugins(environ).rows,
        variables=tuple(sorted(name for name in environ if name.startswith(PREFIXES))),
    )


def version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def device_line() -> str:
    """The device that `--device auto` would take."""
    try:
        found = detect()
    except L4Error as error:
        return f"not found: {error.message}"
    parts = [found.device_type, found.arch, found.device_name, f"{found.memory_bytes / 1e9:.1f} GB", found.runtime]
    count = f"{found.num_devices} × " if found.num_devices > 1 else ""
    return count + " · ".join(dict.fromkeys(part for part in parts if part))
