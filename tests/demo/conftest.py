"""Makes the training scripts importable: they are a package beside the data, not part of l4core."""

from __future__ import annotations

import sys

from l4core.demo.build import CHECKOUT

sys.path.append(str(CHECKOUT))
