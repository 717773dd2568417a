"""Real temporary distributions: a module and a *.dist-info folder on the import path, as pip would leave them."""

from __future__ import annotations

import importlib
import textwrap
from pathlib import Path

GOOD = """
from l4core.plugin_api import SamplerEntry, hookimpl

@hookimpl
def l4_samplers():
    return [SamplerEntry(name={name!r}, api=1, create="json:loads")]
"""


class Site:
    """A folder on sys.path. `install` writes a distribution into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules: list[str] = []

    def install(
        self,
        distribution: str,
        source: str,
        *,
        version: str = "1.0",
        entry_points: str | None = None,
        module: str | None = None,
    ) -> str:
        """→ the import name. entry_points: text of entry_points.txt, default one entry named as the module."""
        module = module or distribution.replace("-", "_")
        (self.folder / f"{module}.py").write_text(textwrap.dedent(source))
        info = self.folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(entry_points or f"[l4core]\n{module} = {module}\n")
        self.modules.append(module)
        importlib.invalidate_caches()
        return module

    def install_good(self, distribution: str, sampler: str) -> None:
        self.install(distribution, GOOD.format(name=sampler))
