"""Runs a script that compares kernels with their definition, in a process of its own: Triton decides at import whether it compiles or interprets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_script(script: Path, device: str = "cpu") -> str:
    """→ what it printed, stripped. On a CPU under Triton's interpreter. AssertionError with its last words when it fails."""
    interpreted = {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), device],
        env={**os.environ, **interpreted},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()
