"""From file pages to an accelerator's memory at the speed of its bus: threads copy into pinned memory, and the device fetches from there."""

from __future__ import annotations

import threading

import torch

PINNING = ("cuda", "xpu")
"""Device types whose host memory torch can pin."""


class _Half:
    """Pinned memory, and the event behind the last copy out of it."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        self.copied = torch.Event(device=device)


class Staging:
    """Two pinned buffers a thread: while the device copies one, the thread fills the other."""

    def __init__(self, num_bytes: int) -> None:
        """num_bytes: of a buffer. A larger piece is copied without one."""
        self._num_bytes = num_bytes
        self._local = threading.local()

    def copy(self, source: torch.Tensor, place: torch.Tensor) -> None:
        """Fills `place`, a view of any strides on an accelerator, from `source` on the CPU; dtype and order are converted there. Returns before the
        device is done; whoever reads `place` on the device's current stream sees it filled."""
        if place.device.type not in PINNING or source.nbytes > self._num_bytes:
            place.copy_(source)
            return
        half = self._next_half(place.device)
        staged = half.memory[: source.nbytes].view(source.dtype).view(source.shape)
        staged.copy_(source)
        place.copy_(staged.to(place.device, non_blocking=True))
        half.copied.record()

    def _next_half(self, device: torch.device) -> _Half:
        """The half that was used longer ago, once the device has read it."""
        halves: list[_Half] = getattr(self._local, "halves", [])
        if len(halves) < 2:
            half = _Half(self._num_bytes, device)
        else:
            half = halves.pop(0)
            half.copied.synchronize()
        self._local.halves = [*halves, half]
        return half
