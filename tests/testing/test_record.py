"""conformance.json: what a run proved, written by the command and by pytest; the README's table comes from such files and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from l4core.errors import ConfigError
from l4core.testing import __main__ as command
from l4core.testing import compiled, table
from l4core.testing.record import CaseResult, Record, read_record, write_records

ROOT = Path(__file__).parents[2]
FILES = ROOT / "benchmarks" / "results" / "conformance"

RECORD = Record(
    backend="fa3",
    package="l4-fa3",
    version="0.1.0",
    provider="flash_attn_interface 3.0.0b1",
    level="R",
    device="cuda",
    arch="sm90",
    card="NVIDIA H100",
    runtime="cuda 13.0",
    torch="2.11.0",
    python="3.12.3",
    date="2026-11-24T21:00Z",
    commit="0123456789abcdef",
    options={},
    cases=(
        CaseResult(name="equals the definition: long decode", outcome="passed"),
        CaseResult(name="equals the definition: tree verify", outcome="skipped", reason="no tree mask"),
    ),
)

# ---------------------------------------------------------------- files


def test_a_record_comes_back_from_its_file(tmp_path: Path) -> None:
    (path,) = write_records([RECORD], tmp_path / "new")
    assert path.name == "fa3-sm90-R.json"
    assert read_record(path) == RECORD
    assert json.loads(path.read_text())["counts"] == {"passed": 1, "skipped": 1, "failed": 0}


def test_records_of_one_run_do_not_overwrite_each_other(tmp_path: Path) -> None:
    paths = write_records([RECORD, replace(RECORD, provider="vllm 0.33"), replace(RECORD, level="D")], tmp_path)
    assert [path.name for path in paths] == ["fa3-sm90-R.json", "fa3-sm90-R-2.json", "fa3-sm90-D.json"]


@pytest.mark.parametrize("text", ["[]", '{"schema": 7}', '{"schema": 1}', '{"schema": 1, "cases": [{"x": 1}]}'])
def test_what_is_no_record_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "odd.json").write_text(text)
    with pytest.raises(ValueError, match=r"odd.json: not a conformance file of schema 1"):
        read_record(tmp_path / "odd.json")


# ---------------------------------------------------------------- the command


def test_the_command_writes_what_the_kit_proved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "conformance.json"
    arguments = ["sdpa", "--quick", "--out", str(out), "--commit", "abc"]
    done = subprocess.run(
        [sys.executable, "-m", "l4core.testing", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = read_record(out)
    assert (record.backend, record.package, record.level, record.device, record.commit) == (
        "sdpa",
        "l4core",
        "R",
        "cpu",
        "abc",
    )
    assert record.provider.startswith("torch ")
    assert record.counts["failed"] == 0
    results = {case.name: case for case in record.cases}
    assert results["equals the definition: verify at a border"].outcome == "passed"
    assert results["equals the definition: tree verify"].reason.endswith("torch's attention takes none here")
    assert results["no host sync: local decode"].reason == "device cpu cannot tell a host sync"
    assert f"on {record.card}: {record.counts['passed']} passed" in done.stdout


def test_pytest_writes_the_same_for_an_authors_own_tests(tmp_path: Path) -> None:
    """And a failed case ends up in the file with its reason, not as a level."""
    (tmp_path / "test_mine.py").write_text(
        "from l4core.testing.conformance import QuickAttentionConformance\n"
        "class TestMine(QuickAttentionConformance):\n"
        "    plugin, backend, level = 'testing.wrong_backends', 'full attention', 'V'\n"
    )
    flags = ["-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", str(tmp_path)]
    flags += [
        "-p",
        "l4core.testing.record",
        "--conformance-out",
        str(tmp_path / "out"),
        "-k",
        "local_decode or local or usable",
    ]
    code = f"import sys, pytest; sys.path.insert(0, {str(ROOT / 'tests')!r}); sys.exit(pytest.main({[*flags, str(tmp_path)]!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    (path,) = (tmp_path / "out").glob("*.json")
    record = read_record(path)
    (failed,) = [case for case in record.cases if case.name == "equals the definition: local decode"]
    assert failed.outcome == "failed"
    assert "case 'local decode': largest error" in failed.reason
    assert "none:" in table.render([record])


def test_a_backend_that_is_not_there_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["nosuch"]) == 2
    assert "no installed plugin offers the attention backend 'nosuch'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["sdpa", "--combinations", "few"], "--combinations is 'few'; wanted a positive number or all"),
        (["sdpa", "--attention-option", "x"], "--attention-option is 'x'; wanted KEY=VALUE"),
    ],
)
def test_wrong_flags_are_errors(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(arguments) == 2
    assert text in capsys.readouterr().err


# ---------------------------------------------------------------- the table


def test_no_file_no_level() -> None:
    rows = [line for line in table.render([RECORD]).splitlines() if line.startswith("| `")]
    cells = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]] for row in rows}
    assert list(cells) == [f"`{name}`" for name in table.KNOWN]
    assert cells["`fa3`"][2:] == [
        "R",
        "NVIDIA H100, torch 2.11.0",
        "flash_attn_interface 3.0.0b1",
        "1, 1",
        "0123456789ab 2026-11-24",
    ]
    assert cells["`aiter`"][2:] == ["–", "", "", "", ""]


def test_each_level_used_is_explained_and_a_failure_is_none() -> None:
    text = table.render([RECORD, replace(RECORD, backend="aiter", level="V")])
    assert "**R** ran on its hardware; **V** vendor kernel executed on a CPU." in text
    failed = replace(RECORD, cases=(*RECORD.cases, CaseResult(name="x", outcome="failed", reason="y")))
    assert "| none: 1 cases failed |" in table.render([failed])
    assert "| R |" not in table.render([failed])


def test_a_double_did_not_run_on_the_card_it_stands_for() -> None:
    assert "| D | a CPU, standing for sm90, torch 2.11.0 |" in table.render([replace(RECORD, level="D")])


def test_uncommitted_changes_are_not_left_out() -> None:
    assert "| 0123456789ab-dirty 2026-11-24 |" in table.render([replace(RECORD, commit="0123456789abcdef-dirty")])


# ---------------------------------------------------------------- compiled for what is not here

COMPILER = """
import json, sys
print("some warning")
print(json.dumps({"variant": "decode", "kernel": "k", "spills": 0}))
if sys.argv[1] == "odd":
    sys.exit("LLVM ERROR: no such thing")
"""


def test_kernels_that_compile_are_cases_of_level_x(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stand_in_compiler.py").write_text(COMPILER)
    monkeypatch.syspath_prepend(str(tmp_path))
    out = tmp_path / "out"
    arguments = ["sdpa", "stand_in_compiler", "sm100", "odd", "--provider", "triton 3.7", "--out", str(out)]
    assert compiled.main(arguments) == 1
    good, odd = (read_record(out / f"sdpa-{arch}-X.json") for arch in ("sm100", "odd"))
    assert good.cases == (CaseResult(name="compiles: decode, k", outcome="passed", reason="spills 0"),)
    assert odd.counts == {"passed": 1, "skipped": 0, "failed": 1}
    assert odd.cases[1].reason == "stand_in_compiler odd ended with 1: LLVM ERROR: no such thing"
    assert "| X | compiled for sm100, torch" in table.render([good])


def test_a_third_partys_backend_has_a_row_of_its_own() -> None:
    text = table.render([replace(RECORD, backend="mine", package="l4-mine", options={"splits": "4"})])
    assert "| `mine` `splits=4` | `l4-mine` |" in text


def test_only_the_marked_part_of_a_page_is_written(tmp_path: Path) -> None:
    page, folder = tmp_path / "page.md", tmp_path / "files"
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    write_records([RECORD], folder)
    assert table.main([str(folder), str(page)]) == 0
    assert page.read_text() == f"before\n{table.BEGIN}\n{table.render([RECORD])}{table.END}\nafter\n"
    with pytest.raises(ConfigError, match="has no part between"):
        table.rewrite("nothing", "x")
    assert table.main([str(folder)]) == 2


def test_the_readme_is_what_the_files_say() -> None:
    """A change that was meant: `python -m l4core.testing.table benchmarks/results/conformance README.md`."""
    page = (ROOT / "README.md").read_text()
    assert page == table.rewrite(page, table.render(table.read_folder(FILES)))


def test_every_file_kept_is_of_a_level_and_green() -> None:
    for path in FILES.glob("*.json"):
        record = read_record(path)
        assert record.counts["failed"] == 0, path.name
        assert record.counts["passed"] > 0, path.name
        assert record.commit, path.name
