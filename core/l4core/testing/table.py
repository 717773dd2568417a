"""The README's table of attention backends, written from conformance files and from nothing else: no file, no level.

python -m l4core.testing.table benchmarks/results/conformance README.md       rewrites the part between the two markers
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from l4core.errors import ConfigError, L4Error
from l4core.testing.conformance.setup import LEVELS
from l4core.testing.record import Record, read_record

__all__ = ["BEGIN", "END", "KNOWN", "main", "render", "rewrite"]

BEGIN, END = "<!-- conformance: begin -->", "<!-- conformance: end -->"

REAL = ("R", "S")
"""Levels for which the machine named is the one it ran on; a double or an interpreter runs on a CPU and is only asked as if it were that machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A backend of this repository. hardware: where it is meant to run."""

    package: str
    hardware: str


KNOWN: Mapping[str, Known] = {
    "trtllm_mha": Known(package="l4-trtllm-mha", hardware="NVIDIA SM100, SM103 (B200, B300)"),
    "fa3": Known(package="l4-fa3", hardware="NVIDIA SM90 (H100, H200)"),
    "aiter": Known(package="l4-aiter", hardware="AMD gfx942, gfx950 (MI300, MI350)"),
    "intel_xpu": Known(package="l4-intel-xpu", hardware="Intel GPUs"),
    "triton": Known(package="l4-triton", hardware="every other NVIDIA and AMD device with Triton"),
    "cpu": Known(package="l4-cpu", hardware="x86-64 CPUs with AVX2 or AVX-512"),
    "sdpa": Known(package="built in", hardware="any torch device"),
    "reference": Known(package="built in", hardware="any torch device; slow, the oracle"),
}


def render(records: Sequence[Record]) -> str:
    """Markdown: a row a record, a row without a level for a known backend that has none, and what the levels mean."""
    lines = [
        "| backend | package | made for | level | ran on | provider | cases passed, skipped | commit |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in [*KNOWN, *sorted({record.backend for record in records} - set(KNOWN))]:
        known = KNOWN.get(name, Known(package="", hardware=""))
        mine = sorted((r for r in records if r.backend == name), key=lambda r: ([*LEVELS].index(r.level), r.arch))
        lines += [_row(record, known) for record in mine] or [_cells(f"`{name}`", _package(known), known.hardware, "–")]
    used = [level for level in LEVELS if level in {record.level for record in records}]
    lines += [
        "",
        "; ".join(f"**{level}** {LEVELS[level]}" for level in used) + "." if used else "No conformance files.",
    ]
    return "\n".join(lines) + "\n"


def _row(record: Record, known: Known) -> str:
    counts = record.counts
    level = record.level if counts["passed"] and not counts["failed"] else f"none: {counts['failed']} cases failed"
    options = "".join(f" `{key}={value}`" for key, value in record.options.items())
    where = f"{_machine(record)}, torch {record.torch}"
    return _cells(
        f"`{record.backend}`{options}",
        _package(known) or f"`{record.package}`",
        known.hardware,
        level,
        where,
        record.provider,
        f"{counts['passed']}, {counts['skipped']}",
        f"{_short(record.commit)} {record.date[:10]}".strip(),
    )


def _machine(record: Record) -> str:
    if record.level in REAL:
        return record.card or record.arch
    return f"compiled for {record.arch}" if record.level == "X" else f"a CPU, standing for {record.arch}"


def _short(commit: str) -> str:
    """The first twelve digits; that there were changes on top of it is not left out."""
    digits, _, dirty = commit.partition("-")
    return digits[:12] + (f"-{dirty}" if dirty else "")


def _package(known: Known) -> str:
    return f"`{known.package}`" if known.package.startswith("l4-") else known.package


def _cells(*cells: str) -> str:
    return "| " + " | ".join([*cells, *[""] * (8 - len(cells))]) + " |"


def rewrite(page: str, table: str) -> str:
    """The page with `table` between the markers. ConfigError when it lacks them."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ConfigError(f"the page has no part between {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{table}{END}{after}"


def read_folder(folder: Path) -> list[Record]:
    return [read_record(path) for path in sorted(folder.glob("*.json"))]


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 2:
        print("usage: python -m l4core.testing.table FOLDER PAGE", file=sys.stderr)
        return 2
    folder, page = map(Path, arguments)
    try:
        page.write_text(rewrite(page.read_text(), render(read_folder(folder))))
    except (L4Error, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
