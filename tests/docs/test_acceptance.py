"""Every row of docs/acceptance.md names a test, a kit, a command or a file of results that is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = [
    [cell.strip() for cell in line.strip().strip("|").split("|")]
    for line in (ROOT / "docs" / "acceptance.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith(("| ---", "| promise"))
]


def names_in(path: Path) -> set[str]:
    """Functions and classes: a kit is a class."""
    return {
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }


@pytest.mark.parametrize(("promise", "shown"), ROWS, ids=[row[0][:60] for row in ROWS])
def test_each_promise_is_shown_by_something_that_exists(promise: str, shown: str) -> None:
    command = re.fullmatch(r"`make (\S+)( ONCE=1)?`", shown)
    if command:
        assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), promise
        return
    script = re.fullmatch(r"`python (\S+\.py)`", shown)
    if script:
        assert (ROOT / script[1]).is_file(), promise
        return
    path, _, name = shown.partition("::")
    if not name:
        assert path.startswith("benchmarks/results/"), f"{promise}: {shown} is neither a test nor a file of results"
        assert (ROOT / path).is_file(), f"{promise}: {shown} is not there"
        return
    assert name in names_in(ROOT / path), f"{promise}: {shown} is not there"
