"""How commands end badly: two lines on stderr, no traceback, exit code 2 for usage and 1 otherwise."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from helpers.commands import RunL4
from l4core.cli.command import L4Command
from l4core.cli.elsewhere import ELSEWHERE
from l4core.cli.errors import run, wants_debug
from l4core.config import field_of
from l4core.errors import CheckpointError, ConfigError, L4Error


def test_unknown_option_names_the_nearest(run_l4: RunL4) -> None:
    ended = run_l4("serve", "m", "--contxt-length", "3")
    assert ended.code == 2
    assert ended.err == "error: unknown option --contxt-length\nfix: did you mean --context-length?\n"


def test_unknown_option_like_nothing_else(run_l4: RunL4) -> None:
    ended = run_l4("serve", "m", "--zzzzqqqq")
    assert ended.code == 2
    assert "fix: l4 serve --help lists them all" in ended.err


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_flag_of_another_engine_says_what_to_do_here(run_l4: RunL4, name: str) -> None:
    """None of them is an option here, by any spelling."""
    ended = run_l4("serve", "m", f"--{name.replace('_', '-')}")
    assert (ended.code, ended.err) == (
        2,
        f"error: unknown option --{name.replace('_', '-')}\nfix: {ELSEWHERE[name]}\n",
    )


def test_flags_that_the_fixes_name_are_here() -> None:
    for fix in ELSEWHERE.values():
        for flag in re.findall(r"--([a-z-]+)", fix):
            field_of(flag)


def test_a_word_that_is_none_of_some_gets_them_as_they_are_spelled(run_l4: RunL4) -> None:
    ended = run_l4("serve", "m", "--kv-cache-dtype", "fp9")
    assert ended.code == 2
    assert "'fp9' is not one of auto, float32, bfloat16, float16, fp8, fp8_e4m3, fp8_e5m2" in ended.err


def test_unknown_command_names_the_nearest(run_l4: RunL4) -> None:
    ended = run_l4("srve")
    assert (ended.code, ended.err) == (2, "error: unknown command 'srve'\nfix: did you mean serve?\n")


@pytest.mark.parametrize("second", ["--tp", "--tp-size", "--tensor_parallel_size"])
def test_an_option_given_twice(run_l4: RunL4, second: str) -> None:
    ended = run_l4("serve", "m", "--tp", "1", second, "1")
    assert ended.code == 2
    assert "error: option --tp is given twice" in ended.err


def test_a_flag_given_twice(run_l4: RunL4) -> None:
    assert run_l4("serve", "m", "--enforce-eager", "--disable-cuda-graph").code == 2


def test_bad_value(run_l4: RunL4) -> None:
    ended = run_l4("serve", "m", "--port", "many")
    assert ended.code == 2
    assert "'many'" in ended.err
    assert "--port" in ended.err


def test_value_out_of_range(run_l4: RunL4) -> None:
    ended = run_l4("serve", "m", "--port", "70000")
    assert ended.code == 2
    assert "port is 70000; wanted at most 65535" in ended.err


def test_not_built_yet(run_l4: RunL4) -> None:
    ended = run_l4("serve", "m", "--enable-multimodal")
    assert ended.code == 2
    assert "--enable-multimodal is not built yet" in ended.err


def test_experts_are_dealt_out_to_groups_of_equal_size(run_l4: RunL4) -> None:
    ended = run_l4("serve", "m", "--tp", "8", "--ep", "3")
    assert ended.code == 2
    assert "--ep" in ended.err


def test_a_value_that_is_not_built_yet(run_l4: RunL4) -> None:
    ended = run_l4("serve", "m", "--speculative-algorithm", "STANDALONE")
    assert ended.code == 2
    assert "--speculative-algorithm STANDALONE is not built yet" in ended.err


def test_failure_is_1_and_has_no_traceback(run_l4: RunL4, tmp_path: Path) -> None:
    ended = run_l4("check", str(tmp_path / "nothing"))
    assert ended.code == 1
    assert ended.err.startswith("error: ")
    assert "Traceback" not in ended.err


def command_that(error: Exception) -> click.Command:
    @click.command(cls=L4Command)
    @click.option("--log-level")
    def command(log_level: str | None) -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code"), [(L4Error("m"), 1), (CheckpointError("m"), 1), (ConfigError("m"), 2), (KeyboardInterrupt(), 130)]
)
def test_exit_codes(error: Exception, code: int) -> None:
    assert run(command_that(error), [], program="x") == code


def test_debug_keeps_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    run(command_that(L4Error("message", fix="the fix")), ["--log_level", "debug"], program="x")
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("error: message\nfix: the fix\n")


def test_a_bug_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        run(command_that(ZeroDivisionError()), [], program="x")


@pytest.mark.parametrize(
    ("argv", "debug"),
    [
        (["--log-level", "debug"], True),
        (["--log_level=debug"], True),
        (["--log-level", "info"], False),
        (["debug"], False),
        (["--log-level"], False),
    ],
)
def test_wants_debug(argv: list[str], debug: bool) -> None:
    assert wants_debug(argv) is debug
