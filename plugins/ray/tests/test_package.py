"""The wheel holds the package and its command, and nothing of the tests."""

from __future__ import annotations

import zipfile
from pathlib import Path

from helpers.packages import build_wheel


def test_the_wheel(tmp_path: Path) -> None:
    with zipfile.ZipFile(build_wheel(Path(__file__).parents[1], tmp_path)) as archive:
        names = archive.namelist()
        commands = next(archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    assert {"l4_ray/__init__.py", "l4_ray/py.typed", "l4_ray/leash.py"} <= set(names)
    assert not [name for name in names if "test" in name]
    assert "l4-ray = l4_ray.cli:main" in commands
