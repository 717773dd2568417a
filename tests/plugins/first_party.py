"""The six hardware packages of plugins/, imported from there whether or not they are installed, as what load_plugins would give."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from pathlib import Path

from l4core import builtin_plugins
from l4core.plugin_entries import Plugins, Provided

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "l4-aiter": "aiter",
    "l4-cpu": "cpu",
    "l4-fa3": "fa3",
    "l4-intel-xpu": "intel_xpu",
    "l4-triton": "triton",
    "l4-trtllm-mha": "trtllm_mha",
}
"""Package → its folder, which is also its backend's name."""

LIBRARIES = {
    "flash_attn_interface": "3.0.0b1",
    "flashinfer": "0.7.2",
    "aiter": "0.1.20",
    "vllm_xpu_kernels": "0.1.16.2",
    "triton": "3.7.1",
}
"""What the packages look for, in versions they take."""
LIBRARY_OF = {
    "fa3": "flash_attn_interface",
    "trtllm_mha": "flashinfer",
    "aiter": "aiter",
    "intel_xpu": "vllm_xpu_kernels",
    "triton": "triton",
}


def module_name(package: str) -> str:
    return package.replace("-", "_")


def house(*, without: Iterable[str] = ()) -> Plugins:
    """The core's own backends and those of all packages but `without`."""
    found = [Provided(entry=e, distribution="l4core", version="0") for e in builtin_plugins.l4_attention_backends()]
    for package, folder in FOLDERS.items():
        if package in without:
            continue
        path = str(ROOT / "plugins" / folder)
        if path not in sys.path:
            sys.path.append(path)
        module = importlib.import_module(module_name(package))
        found += [Provided(entry=e, distribution=package, version="0.1.0") for e in module.l4_attention_backends()]
    return Plugins(attention_backends=tuple(sorted(found, key=lambda p: p.entry.name)))
