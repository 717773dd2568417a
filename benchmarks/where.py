"""Where and of what something was measured, the same in every result: date, commit, card or CPU, versions. Names no host, no user and no path.

A script puts `where()` first into the JSON that it writes. Knows nothing of what is measured, opens no device and needs no torch.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
VERSIONS = ("torch", "triton")


def where(device: str = "auto", *packages: str) -> dict[str, Any]:
    """device: "cpu" where it was measured on the CPU, else the card counts if there is one.  packages: whose versions belong here too."""
    name = None if device.startswith("cpu") else card()
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        **({"cpu": cpu()} if name is None else {"card": name}),
        **{package: found for package in (*VERSIONS, *packages) if (found := version(package))},
    }


def commit(folder: Path = HERE) -> str:
    """The clone's commit, with a + where its files are not that commit's. Where there is no git or no clone: what L4_COMMIT says, or ""."""
    found = _said("git", "-C", str(folder), "rev-parse", "--short", "HEAD")
    if not found:
        return os.environ.get("L4_COMMIT", "")
    return found + "+" * bool(_said("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"))


def card() -> str | None:
    """The first accelerator's name. Asked of its driver: a context of this process would take memory from what is measured in another."""
    names = _said("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    if names:
        return names[0].strip()
    torch = sys.modules.get("torch")  # another vendor's, and the script computes with it
    return torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None


def cpu() -> str:
    """Its architecture, the cores that this process may use, and the instructions that kernels ask for."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ", ".join([platform.machine(), f"{cores} cores", *(flag for flag in CPU_FLAGS if flag in flags)])


def version(package: str) -> str | None:
    """None where it is not installed."""
    if package in sys.modules and hasattr(sys.modules[package], "__version__"):
        return str(sys.modules[package].__version__)  # with what it was built for
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _said(*command: str) -> str:
    """What the command prints, "" where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
