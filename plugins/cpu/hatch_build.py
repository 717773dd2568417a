"""`pip install` compiles the kernels: an editable install beside their sources, any other straight into the wheel."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = Path(__file__).parent / "l4_cpu"
sys.path.insert(0, PACKAGE.as_posix())

import build_kernels  # noqa: E402  (by itself: the package imports l4core, which need not be there yet)


class KernelBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Without a compiler, or for a machine the kernels are not made for, the package is installed all the same, and its probes say what it lacks."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        out = PACKAGE if version == "editable" else Path(self._folder.name)
        try:
            built = build_kernels.build(out)
        except build_kernels.CannotBuildError as error:
            self.app.display_warning(f"l4-cpu is installed without its kernels: {error}")
            return
        if version != "editable":
            build_data["force_include"] |= {path.as_posix(): f"l4_cpu/{path.name}" for path in built}
            build_data["tag"] = f"py3-none-{build_kernels.platform_tag()}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        self._folder.cleanup()
