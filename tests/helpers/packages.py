"""Built wheels, and virtual environments that hold chosen ones of ours beside the dependencies that are installed here."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
OURS = ("l4", "_l4", "_editable_impl_l4", "__editable__")


def build_wheel(project: Path, out: Path) -> Path:
    """The project's wheel, built with the build backend installed here."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(project),
    ]
    before = set(out.glob("*.whl"))
    subprocess.run(command, check=True, timeout=300)
    (wheel,) = set(out.glob("*.whl")) - before
    return wheel


def pip_install(target: Path, *projects: Path) -> None:
    """Projects or wheels into a folder, without the network and without what they depend on."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "--no-compile",
    ]
    subprocess.run([*pip, "--target", str(target), *map(str, projects)], check=True, timeout=300)


def environment_with(wheels: list[Path], folder: Path) -> Path:
    """A fresh virtual environment with these wheels of ours alone; their dependencies are links to what this one has. → its python"""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site = next((folder / "lib").glob("python*/site-packages"))
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(OURS) and not (site / entry.name).exists():
            os.symlink(entry, site / entry.name)
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*install, *map(str, wheels)], check=True, timeout=300)
    return python
