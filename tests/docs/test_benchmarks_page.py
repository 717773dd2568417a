"""benchmarks/README.md names every script, every command is one that is there, and so is every result."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PAGE = (BENCHMARKS / "README.md").read_text()
ROWS = [line.strip("|").split("|") for line in PAGE.splitlines() if line.startswith("| `")]


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*/*.py")), ids=lambda path: path.name)
def test_every_script_is_named(path: Path) -> None:
    assert re.search(rf"`(\w+/)?{re.escape(path.name)}`", PAGE), f"{path.name} is not in benchmarks/README.md"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip())
def test_scripts_options_and_results_of_a_row_are_there(row: list[str]) -> None:
    scripts, _, command, result = (cell.strip() for cell in row)
    for name in re.findall(r"`([\w/]+\.py)`", scripts):
        assert (BENCHMARKS / name).is_file(), name
    found = re.search(r"benchmarks/([\w/]+\.py)([^`]*)", command)
    if found:
        script = BENCHMARKS / found[1]
        assert script.is_file(), command
        for option in re.findall(r"(?<=\s)--\w[\w-]*", found[2].partition(" -- ")[0]):
            assert f'"{option}"' in script.read_text(), f"{script.name} has no {option}"
    if result != "–":
        assert (BENCHMARKS / "results" / result.strip("`")).is_file(), result
