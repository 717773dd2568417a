"""What the device can do now: its copy rate and its matrix rate, measured in a second. Any torch device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

CPU_BYTES, BYTES = 256 << 20, 1 << 30
CPU_SIDE, SIDE = 1024, 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """copy: bytes read and written a second.  matmul: floating-point operations a second in `dtype`, of square matrices."""

    copy: float
    matmul: float
    dtype: str


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Takes 2.4 GiB of an accelerator's memory, 0.5 GiB of a CPU's."""
    on_cpu = device.type == "cpu"
    source = torch.ones(CPU_BYTES if on_cpu else BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = CPU_SIDE if on_cpu else SIDE
    a, b = (torch.randn(side, side, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    copied = seconds_each([lambda: target.copy_(source)], device)
    multiplied = seconds_each([lambda: a @ b], device)
    return Rates(
        copy=2 * source.numel() / copied, matmul=2 * side**3 / multiplied, dtype=str(dtype).removeprefix("torch.")
    )


def seconds_each(calls: list[Callable[[], object]], device: torch.device, *, seconds: float = 0.3) -> float:
    """Median time of one of `calls`, made one after the other; queued ahead of the device, so the host's part is hidden where it is the shorter."""
    began = _run(calls, device)
    rounds = max(1, min(200, int(seconds / 5 / max(began, 1e-6))))
    return statistics.median(_run(calls * rounds, device) for _ in range(5)) / (len(calls) * rounds)


def _run(calls: list[Callable[[], object]], device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    for call in calls:
        call()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Wait for the device; a CPU is never behind."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
