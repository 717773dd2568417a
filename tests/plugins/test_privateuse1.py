"""A vendor's device that torch and L4 do not know by name (PrivateUse1) is selected for, checked, and runs the model: no branch for it in the core.

Its kernels are the CPU's, so this proves the way there and the host's reads, not any vendor's arithmetic.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("privateuse1_script.py")


@pytest.fixture(scope="module")
def result(tiny: Path) -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, str(SCRIPT), str(tiny)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_it_is_detected_and_selected_for(result: dict[str, Any]) -> None:
    """The smoke check ran on it."""
    assert result["selection"] == {"device_type": "fakedev", "vendor": "fakedev", "chosen": "sdpa"}


def test_the_engine_gives_the_tokens_of_the_cpu(result: dict[str, Any]) -> None:
    assert len(result["tokens"]["cpu"]) == 2
    assert result["tokens"]["fakedev"] == result["tokens"]["cpu"]


def test_the_kit_finds_a_host_sync_on_it(result: dict[str, Any]) -> None:
    """The tenth wrong backend: right in its numbers, and caught; sdpa, which reads nothing back, passes."""
    kits = result["kits"]
    assert kits.pop("host sync: no host sync").startswith(
        "host sync (testing, not installed, torch), case 'local decode': host sync, for 4/2 heads of 16"
    )
    assert set(kits.values()) == {""}


def test_every_way_of_reading_it_is_told(result: dict[str, Any]) -> None:
    silent = [name for name, told in result["syncs"].items() if not told]
    assert silent == ["arithmetic", "repeat into a known size"]
