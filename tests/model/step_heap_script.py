"""One case of test_step_heap.py, which prints a number."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import torch

from l4core.model.step_heap import keep_step_memory, packing_into_huge_pages


def steps() -> int:
    """→ page faults of the last of some equal steps: glibc before 2.38 takes a few until a freed piece serves an aligned one of its size."""
    keep_step_memory(0)
    faults = []
    for _ in range(16):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        kept = [torch.ones(12 << 20) for _ in range(2)]
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        del kept
    return faults[-1]


def packing() -> int:
    """→ MiB in huge pages."""
    with packing_into_huge_pages(120 << 20):
        kept = [torch.ones(3 << 18) for _ in range(40)]
    found = re.search(r"AnonHugePages:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    assert found is not None
    assert len(kept) == 40
    return int(found[1]) >> 10


if __name__ == "__main__":
    print({"steps": steps, "packing": packing}[sys.argv[1]]())
