"""How many cases: `make test` runs a smaller number of the same cases that `make test-all` runs."""

import os

FULL = os.environ.get("L4_FULL") == "1"

DEVICE = os.environ.get("L4_TEST_DEVICE", "cpu")
"""Where the engine under test computes; the oracles stay on the CPU. `L4_TEST_DEVICE=cuda pytest tests/engine/test_parity.py` on a GPU."""
