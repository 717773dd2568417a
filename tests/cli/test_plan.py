"""`l4 plan` as its user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from l4core.cli.main import l4
from l4core.errors import ConfigError


def run(*arguments: str) -> str:
    result = CliRunner().invoke(l4, ["plan", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_table_that_a_person_reads() -> None:
    text = run("--model", "scout", "--gpu", "H100-80GB", "--tp", "8")
    assert "scout on 8 × H100-80GB" in text
    assert "3 global or 1 local pages" in text
    assert "0.0% waste" in text
    assert "--kv-cache-dtype fp8" in text
    assert "not built yet" in text


def test_the_json_has_the_largest_context() -> None:
    found = json.loads(run("--model", "maverick", "--gpu", "H200", "--tp", "8", "--quantization", "fp8", "--json"))
    assert found["max_context"] == 1_048_576
    assert found["superpage"] == {"global": 3, "local": 1}
    assert found["weight_bytes"] + found["kv_bytes"] <= 0.88 * found["memory_bytes"]


def test_a_folder_and_any_memory(tiny: Path) -> None:
    found = json.loads(run("--model", str(tiny), "--memory", "8", "--page-size", "16", "--json"))
    assert found["tp"] == 1
    assert found["max_context"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "scout"], "one of the two"),
        (["--model", "scout", "--gpu", "H200", "--memory", "80"], "one of the two"),
        (["--model", "scout", "--gpu", "H300"], "known are L4-24GB"),
        (["--model", "nothing-here", "--gpu", "H200"], "wanted a folder"),
    ],
)
def test_wrong_flags_are_errors_with_the_way_out(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(l4, ["plan", *arguments], catch_exceptions=False, standalone_mode=False)
