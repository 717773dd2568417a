"""`l4 serve` with fake_engine.py, for tests of machines and of torchrun: serve_options.py '{"model": …, "nnodes": 2, …}'."""

from __future__ import annotations

import json
import sys

from l4core.config import from_mapping
from l4core.server.app import serve

if __name__ == "__main__":
    serve(*from_mapping(json.loads(sys.argv[1])), factory="fake_engine:build")
