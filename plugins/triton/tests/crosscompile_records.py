"""Compiles every kernel variant for devices that are not here and writes a conformance file of level X for each.

python plugins/triton/tests/crosscompile_records.py benchmarks/results/conformance
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from test_crosscompile import SHARED_MEMORY, compiled

from l4core.platform import Platform
from l4core.testing.conformance.setup import KitSetup
from l4core.testing.platforms import fake_platform
from l4core.testing.record import CaseResult, Record, describe, write_records


class CrossCompiled(KitSetup):
    """The kit's description of an architecture, without its tests."""

    plugin, backend, level = "l4_triton", "triton", "X"
    arch: ClassVar[str]

    def platform(self) -> Platform:
        here = super().platform().library("triton")
        return fake_platform(self.arch, {"triton": here or ""})


def record(arch: str) -> Record:
    """A case a kernel: passed when it compiles, fits the device's shared memory and spills nothing."""
    kit = type("Kit", (CrossCompiled,), {"arch": arch})()
    cases = []
    for found in compiled(arch):
        good = found["spills"] == 0 and int(str(found["shared"])) <= SHARED_MEMORY[arch]
        name = f"compiles, fits, spills nothing: {found['variant']}, {found['kernel']}"
        cases.append(CaseResult(name=name, outcome="passed" if good else "failed", reason="" if good else str(found)))
    return replace(describe(kit, cases), runtime="")


if __name__ == "__main__":
    write_records([record(arch) for arch in SHARED_MEMORY if arch != "sm90"], Path(sys.argv[1]))
