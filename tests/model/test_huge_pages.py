"""Large CPU weights are marked for huge pages in the kernel's own books; everything else is left alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from l4core.model.huge_pages import HUGE_PAGE, advise_huge_pages

linux = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), reason="this kernel has no transparent huge pages"
)


def vm_flags(address: int) -> list[str]:
    """Flags of the mapping that holds this address, from /proc/self/smaps."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"no mapping holds {address:x}")


@linux
def test_the_kernel_knows() -> None:
    weight = torch.empty(8 * HUGE_PAGE, dtype=torch.uint8)
    assert advise_huge_pages([weight]) >= 6 * HUGE_PAGE
    assert "hg" in vm_flags(weight.data_ptr() + 4 * HUGE_PAGE)


@linux
def test_small_weights_and_other_devices_are_left_alone() -> None:
    small, elsewhere = torch.empty(1000), torch.empty(8 * HUGE_PAGE, device="meta")
    assert advise_huge_pages([small, elsewhere]) == 0
