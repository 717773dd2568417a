"""The program itself: its commands, and that asking for help loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

from helpers.commands import RunL4
from l4core import __version__
from l4core.cli.main import COMMANDS

HEAVY = ("torch", "transformers", "starlette", "uvicorn", "numpy", "yaml", "huggingface_hub")


def test_help_lists_every_command(run_l4: RunL4) -> None:
    ended = run_l4("--help")
    assert ended.code == 0
    for name in COMMANDS:
        assert f"\n  {name} " in ended.out


def test_the_program_alone_prints_its_help(run_l4: RunL4) -> None:
    ended = run_l4()
    assert ended.code == 2
    assert ended.err.startswith("Usage: l4 ")
    assert "error" not in ended.err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(run_l4: RunL4, name: str) -> None:
    ended = run_l4(name, "--help")
    assert ended.code == 0
    assert f"Usage: l4 {name}" in ended.out
    assert "General:" in ended.out


def test_command_names_take_an_underscore(run_l4: RunL4) -> None:
    assert run_l4("demo_model", "--help").code == 0


def test_version(run_l4: RunL4) -> None:
    assert run_l4("--version").out.strip().endswith(__version__)


@pytest.mark.parametrize("argv", [["--help"], ["serve", "--help"], ["generate", "--help"], ["env", "--help"]])
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    script = (
        "import sys\nfrom l4core.cli import main\n"
        f"try:\n    main({argv!r})\nexcept SystemExit as ended:\n    assert ended.code == 0\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
