"""Steps of fixed shape without a GPU: the same tokens as batches planned tensor by tensor, in the simple loop and the overlapped one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_the_tokens_of_a_padded_step_are_those_of_any_batch(tiny: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("fixed_step_script.py")), str(tiny)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 60
