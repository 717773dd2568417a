"""Level X: a backend's kernels compiled for architectures that are not here, as conformance files.

    python -m l4core.testing.compiled triton l4_triton.crosscompile sm100 gfx942 --out benchmarks/results/conformance

The module is run as `python -m MODULE ARCH`, one process an architecture since a compiler may abort, and prints one JSON object a kernel, with at
least "variant" and "kernel"; what else it says (spills, bytes of shared memory) is kept with the case.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from l4core.errors import L4Error
from l4core.testing.conformance.entry import module_of
from l4core.testing.record import CaseResult, Record, describe_machine, write_records

__all__ = ["ARCHITECTURES", "compile_cases", "main"]

ARCHITECTURES = ("sm80", "sm90", "sm100", "sm120", "gfx942", "gfx950")
"""What core's own kernels are compiled for."""


def compile_cases(module: str, arch: str) -> list[CaseResult]:
    """A passed case for each kernel that was compiled, and a failed one where the process did not end well."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", module, arch]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    cases = [_case(json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not cases:
        last = done.stderr.strip().splitlines()[-1:] or ["it printed nothing"]
        reason = f"{module} {arch} ended with {done.returncode}: {last[0]}"
        cases.append(CaseResult(name="compiles", outcome="failed", reason=reason))
    return cases


def _case(found: dict[str, Any]) -> CaseResult:
    rest = {key: value for key, value in found.items() if key not in ("variant", "kernel")}
    reason = ", ".join(f"{key} {value}" for key, value in rest.items())
    return CaseResult(name=f"compiles: {found['variant']}, {found['kernel']}", outcome="passed", reason=reason)


def main(arguments: Sequence[str] | None = None) -> int:
    """→ exit status, 1 when a kernel failed to compile."""
    parser = argparse.ArgumentParser(prog="python -m l4core.testing.compiled")
    parser.add_argument("name", metavar="NAME", help="the backend's name, as `l4 backends` prints it")
    parser.add_argument("module", metavar="MODULE", help="run as `python -m MODULE ARCH`")
    parser.add_argument("archs", metavar="ARCH", nargs="+")
    parser.add_argument("--provider", default="", help="what compiled it: a library and its version")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the files")
    parser.add_argument("--commit", default="", help="where this tree has no .git: what the files shall say")
    args = parser.parse_args(arguments)
    try:
        plugin = module_of(args.name)
    except L4Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    records: list[Record] = []
    for arch in args.archs:
        cases = compile_cases(args.module, arch)
        records.append(
            describe_machine(plugin, args.name, cases, level="X", arch=arch, provider=args.provider, commit=args.commit)
        )
        print(f"{args.name} for {arch}: {records[-1].counts}")
    write_records(records, args.out)
    return int(any(record.counts["failed"] for record in records))
