"""A plugin's attention kit on this device, dealt to several processes, because most of its time is compiling; their records become one file.

python benchmarks/gpu/conformance.py plugins/triton/tests/test_conformance.py --out benchmarks/results/conformance [--processes 12]
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from l4core.testing.record import read_record, write_records

PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]


def collected(kit: str, environment: dict[str, str]) -> list[str]:
    """Ids of the kit's tests."""
    done = subprocess.run([*PYTEST, "--collect-only", kit], env=environment, capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if "::" in line]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kit", help="the plugin's test file")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--commit", default="", help="where this tree has no .git: what the file shall say")
    parser.add_argument("--seconds", type=int, default=600, help="for all that runs")
    args = parser.parse_args()
    environment = os.environ | {"L4_TEST_DEVICE": "cuda"}
    tests = collected(args.kit, environment)
    with tempfile.TemporaryDirectory() as folder:
        parts = [Path(folder) / str(i) for i in range(args.processes)]
        running = [
            subprocess.Popen(
                [
                    *PYTEST,
                    "-p",
                    "l4core.testing.record",
                    "--conformance-out",
                    part.as_posix(),
                    *tests[i :: args.processes],
                ],
                env=environment,
            )
            for i, part in enumerate(parts)
        ]
        codes, deadline = [], time.monotonic() + args.seconds
        for process in running:
            try:
                codes.append(process.wait(max(0.1, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                process.kill()
                codes.append(124)
        if 124 in codes:
            print(f"not whole: processes ended with {codes}; give it more --seconds")
            return 124
        records = [read_record(path) for part in parts for path in sorted(part.glob("*.json"))]
    for name in sorted({record.backend for record in records}):
        mine = [record for record in records if record.backend == name]
        cases = {case.name: case for record in mine for case in record.cases}
        whole = dataclasses.replace(mine[0], cases=tuple(cases.values()), commit=args.commit or mine[0].commit)
        print(name, whole.counts, "of", len(tests), "tests; processes ended with", codes)
        write_records([whole], args.out)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
