"""What a run of the attention kits proved, as a file: backend, version, provider, machine, commit, level, every case. Read by `table`.

Used by `python -m l4core.testing` and, in any pytest run of a kit, by `-p l4core.testing.record --conformance-out FILE`.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from l4core.plugin_api import Usable
from l4core.testing.conformance.entry import version_of
from l4core.testing.conformance.setup import KitSetup

__all__ = ["SCHEMA", "CaseResult", "Record", "Recorder", "describe", "describe_machine", "read_record"]

SCHEMA = 1
Outcome = Literal["passed", "skipped", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseResult:
    """name: the kit's test and its case, "equals the definition: local decode".  reason: why it was skipped or failed."""

    name: str
    outcome: Outcome
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One backend on one machine. provider: as the verdict names it.  device: torch's device string; card, arch, runtime: of the platform
    that was probed, for levels below S the one a double stands for.  date: ISO, UTC.
    commit: of the source tree, "" when there is none.  level: see conformance.setup.LEVELS.  options: as from --attention-option."""

    backend: str
    package: str
    version: str
    provider: str
    level: str
    device: str
    arch: str
    card: str
    runtime: str
    torch: str
    python: str
    date: str
    commit: str
    options: Mapping[str, str]
    cases: Sequence[CaseResult]

    @property
    def counts(self) -> dict[Outcome, int]:
        outcomes = [case.outcome for case in self.cases]
        return {
            "passed": outcomes.count("passed"),
            "skipped": outcomes.count("skipped"),
            "failed": outcomes.count("failed"),
        }

    def json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self), "counts": self.counts}


def read_record(path: Path) -> Record:
    """ValueError, naming the file, for another schema or missing fields."""
    data = json.loads(path.read_text())
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ValueError(f"{path}: not a conformance file of schema {SCHEMA}")
    try:
        cases = tuple(CaseResult(**case) for case in data["cases"])
        fields = {key: data[key] for key in Record.__slots__ if key != "cases"}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a conformance file of schema {SCHEMA}: {error!r}") from error
    return Record(**fields, cases=cases)


def describe(kit: KitSetup, cases: Sequence[CaseResult], *, commit: str = "") -> Record:
    """The record of a kit that ran with these results, here and now."""
    platform, entry = kit.platform(), kit.entry
    verdicts = [entry.probe(platform, req) for req in kit.grid()]
    providers = sorted({verdict.provider for verdict in verdicts if isinstance(verdict, Usable)})
    return describe_machine(
        kit.plugin,
        kit.backend,
        cases,
        level=kit.level,
        arch=platform.arch,
        card=platform.device_name,
        runtime=platform.runtime,
        device=kit.device,
        provider=", ".join(filter(None, providers)),
        options=kit.options,
        commit=commit,
    )


def describe_machine(
    plugin: str,
    backend: str,
    cases: Sequence[CaseResult],
    *,
    level: str,
    arch: str,
    provider: str,
    card: str = "",
    runtime: str = "",
    device: str = "cpu",
    options: Mapping[str, str] | None = None,
    commit: str = "",
) -> Record:
    """A record dated now. commit: "" = that of this tree."""
    import torch

    package, _, version = version_of(plugin).rpartition(" ")
    return Record(
        backend=backend,
        package=package,
        version=version,
        provider=provider,
        level=level,
        device=device,
        arch=arch,
        card=card,
        runtime=runtime,
        torch=torch.__version__,
        python=".".join(map(str, sys.version_info[:3])),
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%MZ"),
        commit=commit or _commit(),
        options=dict(options or {}),
        cases=tuple(cases),
    )


def _commit() -> str:
    """Of the tree this file lies in, with "-dirty" after uncommitted changes; "" outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


class Recorder:
    """A pytest plugin: collects the results of every attention kit of a run."""

    def __init__(self, *, commit: str = "") -> None:
        self._commit = commit
        self._results: dict[type[KitSetup], list[CaseResult]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        report: pytest.TestReport = yield
        kit = getattr(item, "cls", None)
        counts = report.when == "call" or report.outcome != "passed"
        if isinstance(kit, type) and issubclass(kit, KitSetup) and counts:
            result = CaseResult(name=_case_name(item), outcome=report.outcome, reason=_reason(report))
            self._results.setdefault(kit, []).append(result)
        return report

    def records(self) -> list[Record]:
        """One a kit class; those without a result are left out."""
        return [describe(kit(), cases, commit=self._commit) for kit, cases in self._results.items()]


def _case_name(item: pytest.Item) -> str:
    """ "test_no_host_sync[tree verify]" → "no host sync: tree verify"."""
    name, _, case = item.name.removesuffix("]").partition("[")
    words = name.removeprefix("test_").replace("_", " ")
    return f"{words}: {case}" if case else words


def _reason(report: pytest.TestReport) -> str:
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    if report.outcome == "failed":
        crash = getattr(report.longrepr, "reprcrash", None)
        return str(getattr(crash, "message", report.longrepr)).split("\n")[0]
    return ""


# ---------------------------------------------------------------- as a plugin of an ordinary pytest run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--conformance-out", default="", help="folder for a conformance file of each attention kit that runs"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--conformance-out"):
        config.pluginmanager.register(Recorder(), "l4-conformance")


def pytest_sessionfinish(session: pytest.Session) -> None:
    recorder = session.config.pluginmanager.get_plugin("l4-conformance")
    if isinstance(recorder, Recorder):
        write_records(recorder.records(), Path(session.config.getoption("--conformance-out")))


def write_records(records: Sequence[Record], folder: Path, *, name: str = "") -> list[Path]:
    """One file a record: `name`, or BACKEND-ARCH-LEVEL.json, with a number more where that would be another's of the same run."""
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for record in records:
        stem = name.removesuffix(".json") or f"{record.backend}-{record.arch}-{record.level}"
        path, number = folder / f"{stem}.json", 2
        while path in paths:
            path, number = folder / f"{stem}-{number}.json", number + 1
        path.write_text(json.dumps(record.json(), indent=1, ensure_ascii=False) + "\n")
        paths.append(path)
    return paths
