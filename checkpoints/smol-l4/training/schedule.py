"""A training run that ends by the clock or by a number of steps, and the learning rate along it."""

from __future__ import annotations

import time

import torch


class Clock:
    """seconds: of the whole run.  limit: steps, 0 = by the clock. The rate's time starts with the third step, after warm-up work is done."""

    def __init__(self, seconds: float, limit: int) -> None:
        self.steps = 0
        self._seconds, self._limit = seconds, limit
        self._began = self._rate_began = time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self._began

    def over(self) -> bool:
        return self.seconds() > self._seconds or (self._limit > 0 and self.steps >= self._limit)

    def tick(self) -> None:
        self.steps += 1
        if self.steps == 3:
            self._rate_began = time.monotonic()

    def progress(self) -> float:
        """0 at the start, 1 at the end."""
        if self._limit:
            return self.steps / self._limit
        lost = self._rate_began - self._began
        return max(self.seconds() - lost, 0.0) / max(self._seconds - lost, 1e-9)

    def rate(self, *, warmup: int, tail: float) -> float:
        """Share of the peak rate: a linear rise over `warmup` steps, a linear fall to 2 % over the last `tail` of the run."""
        return min(1.0, (self.steps + 1) / warmup) * min(1.0, max(0.02, (1 - self.progress()) / tail))


def set_rates(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Sets every group to its peak rate times `share`; the peak is remembered on first use."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("peak", group["lr"]) * share
