"""Runs commands in this process, as the `l4` program would."""

from __future__ import annotations

import pytest

from helpers.commands import Ended, RunL4
from l4core.cli.errors import run
from l4core.cli.main import l4


@pytest.fixture
def run_l4(capsys: pytest.CaptureFixture[str]) -> RunL4:
    """run_l4("serve", "--tp", "2") → exit code, stdout, stderr."""

    def call(*argv: str) -> Ended:
        code = run(l4, argv, program="l4")
        captured = capsys.readouterr()
        return Ended(code=code, out=captured.out, err=captured.err)

    return call
