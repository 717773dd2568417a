"""Small host values to the device without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["upload"]


def upload(
    values: Sequence[float] | Sequence[int] | npt.NDArray[Any], dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """values: numbers, or an array. Returns a tensor of `dtype` on `device`. `torch.tensor(…, device=…)` would wait until the device has done all
    its earlier work, the forward pass among it; this copy is only queued."""
    host = torch.from_numpy(values).to(dtype) if isinstance(values, np.ndarray) else torch.tensor(values, dtype=dtype)
    return host.to(device, non_blocking=True)
