"""How many cases: `make test` runs a smaller number of the same cases that `make test-all` runs."""

import os

FULL = os.environ.get("L4_FULL") == "1"
