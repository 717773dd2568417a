"""Small values between host and device without waiting: uploads are queued, downloads are asked for now and looked at later."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from l4core.platform import copies_ahead

__all__ = ["Download", "upload", "upload_many"]

ALIGNMENT = 16
"""Bytes. Triton compiles a kernel apart for every set of pointers that are multiples of it and that are not: a stall while requests wait."""


def upload(
    values: Sequence[float] | Sequence[int] | npt.NDArray[Any], dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """values: numbers, or an array. Returns a tensor of `dtype` on `device`. `torch.tensor(…, device=…)` would wait until the device has done all
    its earlier work, the forward pass among it; this copy is only queued."""
    host = torch.from_numpy(values).to(dtype) if isinstance(values, np.ndarray) else torch.tensor(values, dtype=dtype)
    return host.to(device, non_blocking=True)


def upload_many(
    arrays: Sequence[npt.NDArray[Any]], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """One-dimensional arrays → tensors of `dtype` on `device`, in one queued copy out of page-locked memory where the device has that. Each begins
    at a multiple of ALIGNMENT, however long the others are."""
    unit = ALIGNMENT // dtype.itemsize
    begins = [0, *accumulate(-(-len(array) // unit) * unit for array in arrays)]
    host = torch.empty(begins[-1], dtype=dtype, pin_memory=copies_ahead(device.type))
    target = host.numpy()
    for array, begin in zip(arrays, begins, strict=False):
        np.copyto(target[begin : begin + len(array)], array, casting="same_kind")
    moved = host.to(device, non_blocking=True)
    return tuple(moved[begin : begin + len(array)] for array, begin in zip(arrays, begins, strict=False))


class Download:
    """A tensor on its way to the host. The copy is queued behind what the device was asked before, so the tensor may change afterwards; `wait`
    returns when it has arrived."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._event: torch.Event | None = None
        if copies_ahead(tensor.device.type):
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.Event(tensor.device)
            self._event.record()
        else:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)

    def wait(self) -> torch.Tensor:
        """The tensor, on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
