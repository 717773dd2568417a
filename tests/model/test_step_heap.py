"""What the C library does with the memory of steps and of packed weights; each case in a process of its own, for the settings are the process's."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
SCRIPT = Path(__file__).with_name("step_heap_script.py")
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def run(case: str, **env: str) -> int:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), case], env=plain | env, capture_output=True, text=True, check=True, timeout=120
    )
    return int(done.stdout)


def test_a_step_uses_the_memory_of_the_step_before() -> None:
    """In page faults: a step of 2 × 48 MB has none where memory is kept, 24,576 where it is not."""
    assert run("steps") < 100


def test_who_sets_malloc_by_environment_keeps_it() -> None:
    assert run("steps", MALLOC_TRIM_THRESHOLD_="131072") > 20_000


@pytest.mark.skipif(not THP.exists() or "[never]" in THP.read_text(), reason="no huge pages here")
def test_packed_memory_lies_in_huge_pages() -> None:
    """In MiB, of 40 pieces of 3 MiB."""
    assert run("packing") >= 100
