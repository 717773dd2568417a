"""AITER's own Triton kernel on a machine without ROCm: its Python files imported one by one, their packages entered as empty ones.

`import aiter` itself asks for ROCm's files. The kernel needs of its package only an architecture, which a fake Triton driver gives, and a number of
compute units.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

COMPUTE_UNITS = 4
"""Few, so that small batches take the kernel without split keys and single rows the one with."""


class _EmptyPackages(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `aiter` and all below it under `root`; runs modules, but no package's __init__."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != "aiter":
            return None
        place = self.root.joinpath(*name.split("."))
        if place.is_dir():
            spec = importlib.machinery.ModuleSpec(name, self, is_package=True)
            spec.submodule_search_locations = [str(place)]
            return spec
        file = place.with_suffix(".py")
        return importlib.util.spec_from_file_location(name, file) if file.is_file() else None

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Driver:
    """Triton's active driver, as far as anyone asks."""

    def __init__(self, arch: str) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("hip", arch, 64)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def entered(root: Path, arch: str) -> Iterator[None]:
    """root: a folder that holds `aiter/` (an unpacked wheel or a source tree). Inside, `aiter.ops.triton…unified_attention` can be imported."""
    import triton

    finder = _EmptyPackages(root)
    device_info = ModuleType("aiter.ops.triton.utils.device_info")
    device_info.get_num_sms = lambda: COMPUTE_UNITS  # type: ignore[attr-defined]
    sys.meta_path.insert(0, finder)
    sys.modules[device_info.__name__] = device_info
    driver: Any = triton.runtime.driver
    before = driver._active  # asking for the active one would look for a device
    driver.set_active(_Driver(arch))
    try:
        yield
    finally:
        driver._active = before
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "aiter"]:
            del sys.modules[name]


@pytest.fixture
def enter_aiter() -> Callable[[Path, str], contextlib.AbstractContextManager[None]]:
    """The function above, for tests that cannot import a file beside them."""
    return entered
